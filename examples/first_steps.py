"""A trained spiking net: its answer, its spikes, its energy."""

# %% A net of the package, and images of handwritten digits that come with scikit-learn
from pathlib import Path

import spikezoo
from spikezoo import data, evaluate, pictures

output = Path("output/examples")
output.mkdir(parents=True, exist_ok=True)
print(*spikezoo.list_pretrained("spiking_conv4*"), sep="\n")
model = spikezoo.create_model("spiking_conv4.digits", pretrained=True).eval()
images, labels = next(iter(data.create_loader("digits", "test", **evaluate.input_options(model, "digits"))))

# %% What it says, and how sure it is
answer = pictures.answer_of(model, images[0])
print(f"digit {labels[0]}:", {name: round(share, 3) for name, share in answer.items()})

# %% All of the test set
result = evaluate.evaluate(model, data.create_loader("digits", "test", **evaluate.input_options(model, "digits")))
print(f"top-1 {result['top1']:.2f} %, {result['firing_rate']:.3f} spikes a neuron and time step")

# %% Its spikes, layer by layer, and what they cost beside a network of ReLUs
pictures.draw_raster(*pictures.spikes_over_time(model, images[0]), output / "spikes.png")
count = spikezoo.count(model, images[:32])
print(count.table())
print(f"{count.percent_of_ann_exact:.1f} % of the energy of the ReLU twin")
