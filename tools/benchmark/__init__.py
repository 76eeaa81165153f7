"""Measure how fast a model trains or infers against what a user would do instead, and what a start costs.

Examples:
    python benchmark.py --model mpbn_resnet20 --mode train --T 1 --amp --channels-last --torchcompile
    python benchmark.py --model spiking_resnet19 --mode infer --precision bf16 --batch-size 8 \
        --against spikingjelly spikingjelly-best ann conv-limit --memory
    python benchmark.py --model spiking_vgg9 --mode infer --precision int8 --ticket 0.9
    python benchmark.py --model spiking_vgg9 --mode infer --precision bf16 --T 1 2 4 8 16 --plot growth.png
    python benchmark.py --mode neuron
    python benchmark.py --model spiking_vgg9 --mode size

All sides run in one process and in turns, A B C A B C, so that a busy machine slows all of them, and so do all numbers
of a flag with several; how many times as fast ours is than another is the median of the ratios of neighbours. The first
step of each side, with its compilation, and the warm-up are timed apart. --amp, --channels-last and --torchcompile, or
--precision, which deploys the model, are for spikezoo's side; the baselines have their own forms, and the column
``form`` says which.

``infer`` and ``train`` time steps. ``neuron`` times the LIF neuron alone, ``startup`` imports, the first call of a
deployed model and the loading of a checkpoint. ``size`` measures files: the same weights at random masks, stored
dense, as bitmask and as ticket, against the entropy of the mask.
"""

from tools.benchmark.command import main

__all__ = ["main"]
