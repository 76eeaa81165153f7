"""A folder of images, one folder a class, and a net of the zoo with a new head for them."""

# %% Four classes of digits stand for your own images: images/train/CLASS/*.png and images/val/CLASS/*.png
import os
import shutil
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

import spikezoo
from spikezoo import cli

output = Path("output/examples")
digits = load_digits()
for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    if label < 4:
        folder = output / "images" / ("val" if number % 5 == 0 else "train") / f"digit_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{number}.png")

# %% The net keeps its weights but those of the head; flags are those of `spikezoo train`
epochs = os.environ.get("EPOCHS", "4")
shutil.rmtree(output / "finetuned", ignore_errors=True)
flags = f"""--model spiking_conv4.digits --pretrained --num-classes 4 --dataset folder --data-dir {output}/images
    --epochs {epochs} -b 32 --opt adamw --lr 1e-3 --hflip 0 --scale 0.9 1 --ratio 1 1
    --output {output} --experiment finetuned"""
assert cli.main(["train", *flags.split()]) == 0

# %% The checkpoint knows its classes by name
model = spikezoo.create_model(f"local-dir:{output}/finetuned", pretrained=True)
print(model.pretrained_cfg["label_names"])
cli.main(["validate", "--checkpoint", f"{output}/finetuned", "--data-dir", f"{output}/images"])
