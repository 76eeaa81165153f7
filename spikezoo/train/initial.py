"""The model that a run starts from: made by its flags, with the weights of a checkpoint where one is given."""

from __future__ import annotations

import argparse
from typing import Any

from spikezoo.data import dataset_info
from spikezoo.evaluate import dataset_arguments
from spikezoo.transforms import FLAGS, TRANSFORMS


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of create_model; classes, channels and size come from the dataset unless given."""
    info = dataset_info(args.dataset, args.data_dir)
    arguments = {
        **dataset_arguments(args.model, info),
        **{key: getattr(args, key) for key in ("num_classes", "in_chans", "img_size") if getattr(args, key)},
        "T": args.T,
        "mpbn": args.mpbn,
        "neuron": args.neuron,
        "drop_rate": args.drop or None,
        **{name: getattr(args, name) for name in FLAGS if getattr(args, name) != TRANSFORMS[name].default},
        **args.model_kwargs,
    }
    return {key: value for key, value in arguments.items() if value is not None}
