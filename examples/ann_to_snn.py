"""A ReLU network becomes a spiking one without further training, and more time steps bring it nearer to its origin."""

# %% Train a small network of ReLUs on digits
import os
import shutil
from pathlib import Path

import spikezoo
from spikezoo import cli, data, evaluate

output, epochs = Path("output/examples"), os.environ.get("EPOCHS", "10")
for name in ("ann", "qcfs"):
    shutil.rmtree(output / name, ignore_errors=True)
flags = f"""--model spiking_mlp_340 --neuron relu --dataset digits --epochs {epochs} -b 64
    --opt adamw --lr 3e-3 --output {output} --experiment ann"""
assert cli.main(["train", *flags.split()]) == 0
ann = spikezoo.create_model(f"local-dir:{output}/ann", pretrained=True).eval()


def top1(model):
    """Accuracy on the test set, in per cent."""
    loader = data.create_loader("digits", "test", **evaluate.input_options(model, "digits"))
    return evaluate.evaluate(model, loader)["top1"]


# %% Of every ReLU one number is measured on training images: the activation that one spike a step stands for
options = evaluate.input_options(ann, "digits")
images, _ = next(iter(data.create_loader("digits", "train", **{**options, "batch_size": 256})))
print(f"ReLU: {top1(ann):.2f} %")
for T in (4, 8, 16, 32):
    snn = spikezoo.convert(ann, images, T=T, mode="99.9%", half_threshold=True).eval()
    print(f"spiking, T={T}: {top1(snn):.2f} %")

# %% With quantised activations whose threshold is learned (QCFS) few steps are enough, and nothing is measured
flags = flags.replace("--neuron relu", "--neuron qcfs --model-kwargs qcfs_levels=4").replace("ment ann", "ment qcfs")
assert cli.main(["train", *flags.split()]) == 0
twin = spikezoo.create_model(f"local-dir:{output}/qcfs", pretrained=True).eval()
print(f"QCFS: {top1(twin):.2f} %, spiking at T=4: {top1(spikezoo.convert(twin).eval()):.2f} %")
