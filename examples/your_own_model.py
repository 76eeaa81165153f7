"""A block and a model of your own, outside the package: counted, folded, saved and deployed as any other."""

# %% A residual block that adds spikes to spikes, as SEW-ResNet's; time meets the batch inside ConvNormNeuron
import torch
from torch import nn

import spikezoo
from spikezoo.layers import ConvNormNeuron, Stem
from spikezoo.models import SpikingModel
from spikezoo.registry import ModelRow, register_rows


class AddSpikes(nn.Module):
    """Two convolutions with neurons, whose spikes are added to those that come in: integers from 0 to 2."""

    def __init__(self, channels, size, neuron, dd):
        super().__init__()
        self.one = ConvNormNeuron(channels, channels, size, neuron=neuron, dd=dd)
        self.two = ConvNormNeuron(channels, channels, size, neuron=neuron, dd=dd)

    def forward(self, x):
        """Map spikes ``[T, B, C, H, W]`` to sums of the same shape."""
        return x + self.two(self.one(x))


class MyNet(SpikingModel):
    """A stem, blocks, and the head that every model has."""

    def __init__(self, width: int = 16, depth: int = 2, **kwargs):
        super().__init__(**kwargs)
        stem = ConvNormNeuron(self.in_chans, width, self.img_size, neuron=self.neuron_factory, dd=self.dd)
        self.add_stem(Stem(stem), width, 1)
        blocks = [AddSpikes(width, stem.out_size, self.neuron_factory, self.dd) for _ in range(depth)]
        self.add_stage(blocks, width, 1)
        self.finish(width)


# %% A row gives it a name; the number of parameters is a check
ROWS = {"my_net": ModelRow({"width": 16}, parameters=10_170, paper="None.", note="A net of one's own.", img_size=8)}
default_cfgs = register_rows(__name__, MyNet, ROWS)
model = spikezoo.create_model("my_net", T=2).eval()
print(spikezoo.model_info("my_net"))

# %% Everything else follows from the data flow
images = torch.rand(4, 3, 8, 8)
print(spikezoo.count(model, images).table())
print("folded, largest difference:", (spikezoo.fold_bn(model)(images) - model(images)).abs().max().item())
spikezoo.save_checkpoint(model, "output/examples/my_net", {"dataset": "none"})
again = spikezoo.create_model("local-dir:output/examples/my_net", pretrained=True).eval()
print("saved and loaded:", torch.equal(again(images), model(images)))
print(
    "firing rates:",
    {name: round(float(rates.mean()), 3) for name, rates in spikezoo.firing_rates(model, images).items()},
)

# %% In a file of its own it trains, too: spikezoo train --import your_own_model.py --model my_net --dataset digits
