"""Recordings of an event camera: files, frames, a picture, a trained net, its spikes."""

# %% Bars that move to the right and to the left stand for recordings; .npz has t (microseconds), x, y, p
import os
import shutil
from pathlib import Path

import numpy as np

from spikezoo import cli

output, epochs = Path("output/examples"), os.environ.get("EPOCHS", "4")
draw = np.random.default_rng(0)
for split, count in (("train", 16), ("test", 8)):
    for name, direction in (("left", -1), ("right", 1)):
        folder = output / "bars" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            t = np.sort(draw.integers(0, 50_000, 1500))
            edge = (draw.integers(16) + direction * t * 16 // 50_000) % 16
            polarity = draw.integers(0, 2, len(t))
            np.savez(
                folder / f"{number}.npz", t=t, x=(edge + polarity) % 16, y=draw.integers(0, 16, len(t)), p=polarity
            )
(output / "bars" / "sensor.txt").write_text("16 16")
data = f"--dataset events:{output}/bars"

# %% Events are summed in T frames of two polarities
cli.main(["events", f"events:{output}/bars", "--T", "6", "--plot", f"{output}/events.png"])

# %% A net that takes frames [B, T, 2, H, W]; no flips, which would turn left into right
shutil.rmtree(output / "bars_net", ignore_errors=True)
flags = f"""--model spiking_conv4 --T 6 {data} --in-chans 2 --img-size 16 --num-classes 2 --epochs {epochs} -b 8
    --opt adamw --lr 2e-3 --hflip 0 --output {output} --experiment bars_net"""
assert cli.main(["train", *flags.split()]) == 0
cli.main(["raster", "--checkpoint", f"{output}/bars_net", *data.split(), "--plot", f"{output}/bars.png"])
