"""A binary lottery ticket: scores choose among frozen random signs, and the file takes a bit and a half a weight."""

# %% Train the scores of CONV-4 on digits: 40 % of the weights are removed, the others are +gain or -gain
import os
import shutil
from pathlib import Path

import torch

import spikezoo
from spikezoo import cli

output, epochs = Path("output/examples"), os.environ.get("EPOCHS", "15")
shutil.rmtree(output / "ticket", ignore_errors=True)
flags = f"""--model spiking_conv4 --T 2 --dataset digits --ticket kind=mpslt sparsity=0.4 --epochs {epochs} -b 32
    --opt adam --lr 0.01 --weight-decay 0 --output {output} --experiment ticket"""
assert cli.main(["train", *flags.split()]) == 0

# %% What was saved is the baked ticket: plain weights of three values a layer
ticket = spikezoo.create_model(f"local-dir:{output}/ticket", pretrained=True).eval()
weights = ticket.get_parameter("stages.0.0.conv.weight")
print("values of a layer:", weights.unique().tolist(), f"{100 * (weights == 0).float().mean():.1f} % zeros")
numbers = sum(p.numel() for p in ticket.parameters())
size = (output / "ticket" / "model.safetensors").stat().st_size
print(f"{numbers:,} parameters in {size:,} bytes: {8 * size / numbers:.2f} bits each")

# %% Signs are summed and the sum is scaled, so the order of the sums does not matter: other batches, the same numbers
images = torch.rand(8, *ticket.input_shape)
print("the same logits in parts:", torch.equal(torch.cat([ticket(images[:3]), ticket(images[3:])]), ticket(images)))
