"""What commands share: a model with its weights on its device, batches of its data, one image, noise."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checkpoint import Config
from spikezoo.data import Loader, create_loader
from spikezoo.evaluate import input_options, open_model
from spikezoo.factory import SpikingModel
from spikezoo.flags import Parser, add_flags, choose_device

__all__ = ["add_data", "add_name", "batches", "noise", "one_image", "open_net"]


def add_name(parser: Parser) -> None:
    """Add the model's name and its checkpoint, of which one is enough."""
    parser.add_argument("name", nargs="?", help="model, see spikezoo list (default: the checkpoint's)")
    add_flags(parser, "checkpoint")


def add_data(parser: Parser) -> None:
    """Add what says where data is, and where to compute."""
    add_flags(parser, "data-dir", "dataset-download", "split", "seed", "device")


def open_net(
    args: argparse.Namespace,
    given: dict[str, Any],
    dataset: str | None,
    name: str | None = None,
    checkpoint: str | None = None,
) -> tuple[str, SpikingModel, str, str]:
    """Open a model by its name or its checkpoint, and put it on the device.

    Args:
        args: Parsed flags, with those of :func:`add_data`.
        given: Arguments of ``create_model``.
        dataset: Name of the dataset; None takes the checkpoint's, else what fits the model's input.
        name: Name of the model; None takes the checkpoint's.
        checkpoint: A file or folder of weights.

    Returns:
        Its name, the model, its dataset, and where its weights come from.

    Raises:
        ValueError: Neither a name nor a checkpoint that says it, or a device that is not here.
    """
    name = name or (Config.read(checkpoint).architecture if checkpoint else None)
    if not name:
        raise ValueError(
            "Which model? Give its name, such as spikformer_tiny, or a --checkpoint with a config.json that names it."
        )
    device = choose_device(args.device)
    model, dataset, weights = open_model(
        name, given, checkpoint=checkpoint, dataset=dataset, data_dir=args.data_dir, seed=args.seed
    )
    return name, model.to(device), dataset, weights


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def batches(
    args: argparse.Namespace,
    dataset: str,
    model: SpikingModel,
    images: int,
    split: str | None = None,
    *,
    subset: int | None = None,
    channels_last: bool = False,
) -> Loader:
    """Batches of a dataset's images or recordings as a model takes them, on its device."""
    return create_loader(
        dataset,
        split or args.split,
        data_dir=args.data_dir,
        download=args.dataset_download,
        device=device_of(model),
        batch_size=images,
        img_size=model.img_size[0],
        in_chans=model.in_chans,
        num_workers=0,
        subset=subset,
        channels_last=channels_last,
        **input_options(model, dataset),
    )


def noise(model: SpikingModel, images: int) -> Tensor:
    """Random input of a model; of a model that encodes pixels, in [0, 1]."""
    made = (torch.randn if model.encoding == "direct" else torch.rand)(images, *model.input_shape)
    return made.to(device_of(model))


def one_image(loader: Loader, number: int, where: str) -> Tensor:
    """One image of a loader whose batches have one.

    Raises:
        ValueError: The split has fewer.
    """
    if not 0 <= number < len(loader):
        raise ValueError(f"image={number}: {where} has images 0 to {len(loader) - 1}.")
    return next(loader.iterate(number))[0][0]
