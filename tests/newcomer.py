"""A SEW-ResNet as somebody outside would write it: a block of torch's own layers, in a file of its own."""

from torch import nn

from spikezoo.layers import ConvNormNeuron, Pool, Stem, over_time
from spikezoo.models import SpikingModel
from spikezoo.registry import ModelRow, register_rows


class NewcomerBlock(nn.Module):
    """Two convolutions with norms and neurons, whose spikes are added to the spikes that came in."""

    def __init__(self, inputs, outputs, size, stride, neuron, dd):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **dd), nn.BatchNorm2d(outputs, **dd)
        )
        self.second = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, **dd), nn.BatchNorm2d(outputs, **dd)
        )
        self.out_size = tuple((pixels - 1) // stride + 1 for pixels in size)
        self.fire1, self.fire2 = neuron(outputs, self.out_size), neuron(outputs, self.out_size)
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False, **dd), nn.BatchNorm2d(outputs, **dd)
            )
            self.fire_down = neuron(outputs, self.out_size)

    def forward(self, x):
        y = self.fire2(over_time(self.second, self.fire1(over_time(self.first, x))))
        if self.down is not None:
            x = self.fire_down(over_time(self.down, x))
        return x + y


class NewcomerNet(SpikingModel):
    """A stem, two stages of two blocks, pooling and the classifier."""

    def __init__(self, widths, maximum=False, **kwargs):
        super().__init__(**kwargs)
        size, channels = self.img_size, widths[0]
        stem = ConvNormNeuron(self.in_chans, channels, size, neuron=self.neuron_factory, dd=self.dd)
        pools = [Pool(nn.MaxPool2d(2) if maximum else nn.AvgPool2d(2))]
        size = (size[0] // 2, size[1] // 2)
        self.add_stem(Stem(stem, *pools), channels, 2)
        for index, width in enumerate(widths):
            blocks = []
            for position in range(2):
                stride = 2 if index and position == 0 else 1
                blocks.append(NewcomerBlock(channels, width, size, stride, self.neuron_factory, self.dd))
                channels, size = width, blocks[-1].out_size
            self.add_stage(blocks, width, 2 ** (index + 1))
        self.finish(channels)


ROWS = {
    "newcomer_net": ModelRow(
        {"widths": (6, 8), "neuron_defaults": {"kind": "lif", "decay": 0.5, "threshold": 0.6}},
        parameters=3_896,
        paper="None.",
        note="A net of a test.",
        img_size=16,
    )
}


def register():
    """Make the net known by its name."""
    register_rows(__name__, NewcomerNet, ROWS)
