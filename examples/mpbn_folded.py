"""Membrane potential batch normalisation (MPBN) becomes a threshold and a polarity a channel: the same spikes."""

# %% A trained net with norms on its membrane potentials
import torch

import spikezoo
from spikezoo import data, evaluate

model = spikezoo.create_model("spiking_conv4.digits", pretrained=True).eval()
images, labels = next(iter(data.create_loader("digits", "test", **evaluate.input_options(model, "digits"))))
print("membrane norm:", model.mpbn, "|", model.get_submodule("stages.0.0.neuron"))

# %% Folded: no norm is left behind the neurons, and every spike is where it was
folded = spikezoo.fold_mpbn(model)
print("folded:", folded.get_submodule("stages.0.0.neuron"))
print("the same logits, bit for bit:", torch.equal(folded(images), model(images)))

# %% The batch norms of the convolutions go into their weights; that rounds, so a potential at the threshold may tip
plain = spikezoo.fold_bn(folded)
same = (plain(images).argmax(1) == model(images).argmax(1)).float().mean()
left = sum(isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d) for module in plain.modules())
print(f"{100 * same:.1f} % of the answers stay; {left} batch norms are left")
