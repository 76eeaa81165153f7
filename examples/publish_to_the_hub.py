"""A checkpoint for the Hugging Face Hub: the folder as the Hub will show it, the upload, and how others load it."""

# %% What is published is a folder: weights, config.json, a card with results, command and energy
import os
from pathlib import Path

import torch

import spikezoo

output = Path("output/examples")
model = spikezoo.create_model("spiking_conv4.digits", pretrained=True).eval()
spikezoo.push_to_hub(model, "ORG/NAME", model.pretrained_cfg.get("results"), dry_run=output / "card")
print((output / "card" / "README.md").read_text()[:600])

# %% With a token the same goes to the Hub, and comes back by its name: HF_TOKEN=... REPO=you/spiking-digits
if os.environ.get("HF_TOKEN") and os.environ.get("REPO"):
    print(spikezoo.push_to_hub(model, os.environ["REPO"], {"dataset": "digits"}))
    again = spikezoo.create_model(f"hf-hub:{os.environ['REPO']}", pretrained=True).eval()
    images = torch.rand(4, *model.input_shape)
    print("loaded from the Hub, the same logits:", torch.equal(again(images), model(images)))
else:
    print("No HF_TOKEN and REPO: nothing was uploaded.")
