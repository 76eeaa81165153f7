"""The model that a run starts from: made by its flags, with the weights of a checkpoint where one is given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from spikezoo.checkpoint import load_weights, read_config, read_weights
from spikezoo.data import dataset_info
from spikezoo.evaluate import dataset_arguments
from spikezoo.factory import create_model
from spikezoo.neurons import ANALOG, SpikingNeuron
from spikezoo.transforms import FLAGS, TRANSFORMS, apply, replay


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


def initial_model(name: str, path: str, arguments: Mapping[str, Any]) -> Any:
    """A model that starts from a checkpoint of its own or of another network of its layout.

    A spiking network that starts from its trained ReLU twin is ahead of one that starts from nothing by many epochs.
    Membrane normalisation and time constants that the other network lacks start afresh.

    Raises:
        ValueError: The layouts differ.
    """
    config = read_config(path)
    stored = dict(config.get("model_args", {}))
    same = config.get("architecture", name) == name
    other_neurons = stored.get("neuron") in ANALOG and arguments.get("neuron", "relu") not in ANALOG
    other_norms = arguments.get("mpbn", stored.get("mpbn")) != stored.get("mpbn")
    if same and not (other_neurons or other_norms):
        return create_model(name, checkpoint_path=path, **arguments)
    kept = {key: value for key, value in stored.items() if same and key not in ("neuron", "mpbn", "T", "encoding")}
    model: Any = create_model(name, **{**kept, **{k: v for k, v in arguments.items() if k not in FLAGS}})
    model = replay(model, config.get("spikezoo", {}).get("recipe", []))
    fresh = {
        f"{layer}.{key}": value
        for layer, neuron in model.named_modules()
        if isinstance(neuron, SpikingNeuron)
        for key, value in neuron.state_dict().items()
        if key == "w" or key.startswith("norm.")
    }
    changed = [key for key in ("num_classes", "in_chans") if key in arguments]
    load_weights(model, path, weights=fresh | read_weights(path), changed=changed)
    inputs = config.get("spikezoo", {}).get("inputs")
    if inputs and stored.get("in_chans") == model.in_chans:  # what is said of other channels does not fit
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": inputs["mean"], "std": inputs["std"], "inputs": inputs}
    for flag in FLAGS:
        if flag in arguments:
            model = apply(model, flag, **arguments[flag])
    return model
