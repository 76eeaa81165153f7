"""What a run is built of: its model, its batches, its teacher."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from timm.task.distillation import DistillationTeacher
from torch import Tensor

from spikezoo.checkpoint import read_weights
from spikezoo.convert import share_thresholds
from spikezoo.data import Loader, create_loader, dataset_info
from spikezoo.evaluate import input_options
from spikezoo.factory import SpikingModel, create_from, create_model
from spikezoo.train.initial import model_arguments
from spikezoo.train.length import check_sizes
from spikezoo.train.start import fit_thresholds, fresh_membrane_norms, preserve_function
from spikezoo.train.teacher import weights_digest
from spikezoo.transforms import TRANSFORMS

__all__ = ["Batches", "build_model", "build_teacher"]


def build_model(args: argparse.Namespace, device: torch.device) -> SpikingModel:
    """The model of a run, with the weights that it starts from, on its device.

    Args:
        args: Parsed flags.
        device: Where to.
    """
    if args.data_dir and Path(args.data_dir).is_file():
        raise ValueError(
            f"--data-dir {args.data_dir} is one file, which would be training and test set at once: give a folder "
            "that holds train/ and val/, or train.tar and val.tar."
        )
    arguments = model_arguments(args)
    if args.initial_checkpoint:
        model = create_from(args.model, args.initial_checkpoint, **arguments)
    else:
        model = create_model(args.model, args.pretrained, **arguments)
    for transform in TRANSFORMS.values():
        if transform.initialise:
            transform.initialise(model, args)
    if model.neuron_config.kind == "qcfs":
        with suppress(ValueError):  # max-pooling, attention: convert says why that cannot spike; it trains
            share_thresholds(model)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.rate_penalty and not model.neuron_config.spiking:
        raise ValueError(f"--rate-penalty on neuron={model.neuron_config.kind!r}, which does not fire spikes.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{args.model} has nothing to train: all its weights are final. Add --tune, which trains on those of a "
            "baked model that are not zero."
        )
    return model


class Batches:
    """The batches of a run.

    Args:
        args: Parsed flags.
        model: The model, whose inputs they become.
        device: Where to.

    Attributes:
        train: Augmented training images, shuffled.
        val: What the run is evaluated on: the test split, or with ``--holdout`` training images that are held out.
        val_split: Its name.
        inputs: Mean, standard deviation and, of events, how recordings become frames; it travels with the weights.
    """

    def __init__(self, args: argparse.Namespace, model: SpikingModel, device: torch.device) -> None:
        self.args = args
        given = (args.mean, args.std, args.frames_by, args.duration_us, args.crop_pct, args.interpolation)
        seen = input_options(model, args.dataset, *given)
        seen.pop("label_names", None)  # classes have the numbers that this data gives them
        self.common: dict[str, Any] = {
            "data_dir": args.data_dir,
            "download": args.dataset_download,
            "device": device,
            "seed": args.seed,
            "rank": args.rank,
            "world_size": args.world_size,
            "img_size": model.img_size[0],
            "in_chans": model.in_chans,
            "channels_last": args.channels_last,
            "num_workers": args.workers,
            **seen,
        }
        soft = bool(args.mixup or args.cutmix)
        self.train = self.open(
            args.train_split,
            train=True,
            batch_size=args.batch_size,
            subset=args.subset,
            hflip=args.hflip,
            **{key: tuple(getattr(args, key)) for key in ("scale", "ratio") if getattr(args, key)},
            crop_padding=args.crop_padding,
            translate=args.translate,
            alternating_flip=args.alternating_flip,
            views=args.views,
            holdout=args.holdout,
            roll=args.roll,
            cutout=args.cutout,
            auto_augment=args.aa,
            reprob=args.reprob,
            mixup=args.mixup,
            cutmix=args.cutmix,
            mixup_prob=args.mixup_prob,
            mixup_switch_prob=args.mixup_switch_prob,
            smoothing=args.smoothing if soft else 0.0,
            num_classes=model.num_classes,
        )
        held = {"holdout": args.holdout, "held_out": True} if args.holdout else {}
        self.val_split = args.train_split if args.holdout else args.val_split
        self.val = self.open(self.val_split, batch_size=args.validation_batch_size or args.batch_size, **held)
        if args.holdout:
            self.val.facts["holdout"] = args.holdout
        info = self.val.info
        frames = {key: value for key, value in self.val.facts.items() if key in ("frames_by", "duration_us")}
        self.inputs = {"mean": list(info.mean), "std": list(info.std), **frames}

    def open(self, split: str, **options: Any) -> Loader:
        """Batches of a split, with options of ``create_loader`` besides those of all."""
        return create_loader(self.args.dataset, split, **self.common, **options)

    def plain(self, most: int, batch_size: int | None = None) -> Loader:
        """At most so many training images, classes balanced, without augmentation."""
        batch = batch_size or self.args.validation_batch_size or self.args.batch_size
        return self.open(self.args.train_split, batch_size=batch, subset=min(most, self.train.num_samples))

    def preserve_function(self, model: SpikingModel) -> None:
        """Let membrane norms and learned thresholds that the initial checkpoint lacks change as little as they can."""
        known = read_weights(self.args.initial_checkpoint)
        norms = fresh_membrane_norms(model, known)
        if norms:
            preserve_function(model, norms, (images for images, _ in self.plain(500, 100)))
        if model.neuron_config.kind == "qcfs" and not any(name.endswith(".threshold") for name in known):
            fit_thresholds(model, (images for images, _ in self.plain(500, 100)))


def build_teacher(
    args: argparse.Namespace,
    student: SpikingModel,
    inputs: dict[str, Any],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """What gives the teacher's logits of a batch that is normalised for the student, and what they depend on.

    Args:
        args: Parsed flags.
        student: The model that is trained.
        inputs: What its images are normalised with.
        device: Where to compute.
        autocast: Makes the context of forward passes.

    Raises:
        ValueError: A teacher of other classes or inputs.
    """
    model = create_model(args.teacher, pretrained=True).to(device)
    if model.num_classes != student.num_classes or model.input_shape != student.input_shape:
        raise ValueError(
            f"--teacher {args.teacher} has {model.num_classes} classes and inputs {model.input_shape}, the "
            f"student {student.num_classes} and {student.input_shape}: take one trained on the same data."
        )
    if args.progressive is not None and not args.teacher_cache:
        check_sizes(f"--teacher {args.teacher}", model, args.progressive)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    teacher = DistillationTeacher(model, device=device)
    # What it was trained with; timm's fields hold whatever is customary for the architecture.
    theirs = vars(dataset_info(args.dataset, args.data_dir)) | input_options(model, args.dataset)

    def channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).view(1, -1, 1, 1)

    own = [channels(inputs[name]) for name in ("mean", "std")]
    teacher.mean_kd, teacher.std_kd = channels(theirs["mean"]), channels(theirs["std"])
    if args.torchcompile:
        teacher.compile()

    def teach(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            logits: Tensor = teacher(teacher.normalize_input(images, *own))
            return logits

    facts = {"teacher": weights_digest(model), "teacher_inputs": [list(theirs["mean"]), list(theirs["std"])]}
    return teach, facts
