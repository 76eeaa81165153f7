#!/usr/bin/env python3
"""Train a spiking network: ``spikezoo train`` in a checkout; ``python train.py --help`` says how."""

import functools

from spikezoo.flags import leave
from spikezoo.train import main

if __name__ == "__main__":
    leave(functools.partial(main, prog="python train.py"))
