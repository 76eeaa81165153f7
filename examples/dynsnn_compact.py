"""DynSNN: neurons that hardly fire are removed while the network trains, then cut out of its weights."""

# %% Half of the hidden neurons go after half of the run; a penalty on firing rates makes some of them superfluous
import os
import shutil
from pathlib import Path

import torch

import spikezoo
from spikezoo import cli

output, epochs = Path("output/examples"), int(os.environ.get("EPOCHS", "16"))
shutil.rmtree(output / "pruned", ignore_errors=True)
flags = f"""--model spiking_mlp_340 --T 4 --dataset digits --epochs {epochs} -b 32 --opt adamw --lr 4e-3
    --weight-decay 0 --rate-penalty 1 --dynsnn compression=0.5 prune_at={max(1, epochs // 2)}
    --output {output} --experiment pruned"""
assert cli.main(["train", *flags.split()]) == 0

# %% The mask says who is left; compaction leaves the others out, and the answers stay
pruned = spikezoo.create_model(f"local-dir:{output}/pruned", pretrained=True).eval()
small = spikezoo.compact(pruned)
images = torch.rand(16, *pruned.input_shape)
print("parameters:", *(sum(p.numel() for p in model.parameters()) for model in (pruned, small)))
print("largest difference of the logits:", (pruned(images) - small(images)).abs().max().item())

# %% What the removal saves, and a file of the small net
print("synaptic operations:", *(round(spikezoo.count(model, images).sops_exact) for model in (pruned, small)))
spikezoo.save_checkpoint(small, output / "small", {"dataset": "digits"})
again = spikezoo.create_model(f"local-dir:{output}/small", pretrained=True).eval()
print("loads as it was:", torch.equal(again(images), small(images)))
