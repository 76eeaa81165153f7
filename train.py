#!/usr/bin/env python3
"""Train a spiking network: YAML configs and timm's flag names.

    python train.py --config configs/quickstart.yaml
    python train.py --model mpbn_resnet20 --T 1 --dataset cifar10 --data-dir DATA --epochs 10 --lr 0.1
    torchrun --nproc-per-node 2 train.py --config configs/quickstart.yaml
    python train.py --plan configs/tickets/sparsity.yaml --data-dir DATA --time-budget 9m

Flags on the command line win over the config. Writes to OUTPUT/EXPERIMENT: args.yaml, metadata.json, summary.csv,
curves.png, last.safetensors (everything that --resume needs), model_best.safetensors and, at the end, the folder's
model.safetensors and config.json, which validate.py --checkpoint takes.

A plan is a queue of such runs in OUTPUT/PLAN/NAME, with OUTPUT/PLAN/results.csv and a picture. Start it again to go on
where it was stopped or killed; what is finished is skipped. Other flags hold for all its runs. Under torchrun each
process takes whole runs. Its YAML:

    runs:                                # each row: flags by name, over those of its config
      - name: ticket
        config: base.yaml                # beside the plan
        ticket.kind: mpslt               # a dot reaches into a mapping
        grid: {ticket.sparsity: [0.2, 0.4], T: [1, 4]}   # every combination
        seeds: [1, 2, 3]
        paper: {at: [VGG-9, BinW-SLT], top1: 85.35}      # what its table prints there, for spikezoo results
      - {name: tuned, config: base.yaml, initial_checkpoint: run:ticket}   # what that run of this plan wrote
    plot: {x: ticket.sparsity, y: top1, by: T}
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import gc
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task.distillation import DistillationTeacher
from timm.utils import (
    CheckpointSaver,
    ModelEmaV3,
    NativeScaler,
    ParseKwargs,
    dispatch_clip_grad,
    distribute_bn,
    get_outdir,
    init_distributed_device,
    is_distributed_env,
    random_seed,
    trim_summary,
    update_summary,
    world_info_from_env,
)
from torch import Tensor, nn
from tqdm import tqdm

import spikezoo
from spikezoo import pictures
from spikezoo.checkpoint import atomic, load_state, load_weights, read_config, read_weights, save_state
from spikezoo.checks import nearest
from spikezoo.data import create_loader, dataset_info
from spikezoo.evaluate import (
    environment,
    evaluate,
    input_options,
    read_layer_rates,
    write_layer_rates,
    write_rows,
)
from spikezoo.hub import check_repo_id
from spikezoo.neurons import ANALOG, SpikingNeuron
from spikezoo.observe import WithRates, failing_layers
from spikezoo.precision import fast_bfloat16
from spikezoo.saving import describe
from spikezoo.train.muon import FixedNormMuon, normalised_weights
from spikezoo.train.rows import PlanRow, read_rows, read_yaml, share_out
from spikezoo.train.start import fresh_membrane_norms, preserve_function, warm_scores
from spikezoo.train.teacher import TeacherCache, weights_digest
from spikezoo.transforms import FLAGS, replay
from spikezoo.transforms.dynsnn import (
    check_reactivation,
    dynsnn_report,
    fade,
    masks_of,
    neuron_rates,
    prune,
    reactivate,
    share,
    threshold_for,
)
from spikezoo.transforms.tickets import set_epoch, tickets

# Logits and the firing rates of every layer and time step, of a batch of images.
Step = Callable[[Tensor], tuple[Tensor, Tensor]]

# timm's, without plateau, whose state it does not save: a resumed run would differ.
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "constant", "none")
# Flags that may differ between the parts of one run: where it runs and what it writes, not what it computes.
NOT_RECIPE = {
    "help",
    "config",
    "resume",
    "no_resume_opt",
    "initial_checkpoint",
    "pretrained",
    "ticket_init",
    "data_dir",
    "dataset_download",
    "val_interval",
    "validation_batch_size",
    "workers",
    "device",
    "output",
    "experiment",
    "plan",
    "time_budget",
    "recovery_interval",
    "checkpoint_hist",
    "log_interval",
    "push_to_hub",
}

NOT_IN_CONFIGS = {"help", "config", "plan", "time_budget"}


# --amp, and --no-amp where a config has it: the command line wins.
Switch = argparse.BooleanOptionalAction


class Arguments(ParseKwargs):
    """timm's K=V pairs, with true and false as YAML has them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the pairs as a dict."""
        spelled = [re.sub("=(true|false)$", lambda found: found[0].title(), value) for value in values]
        super().__call__(parser, namespace, spelled, option_string)


class Precision(Switch):
    """A switch that 'auto' leaves to the processor."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.metavar = "?", "auto"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store true, false or 'auto'."""
        on = not str(option_string).startswith("--no-")
        if values is not None and (values != "auto" or not on):
            parser.error(f"argument {option_string}: {values!r}, expected nothing{' or auto' if on else ''}")
        setattr(namespace, self.dest, values or on)


class Sizes(Arguments):
    """Pairs SIZE:SHARE, with numbers as keys."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the pairs as a dict."""
        super().__call__(parser, namespace, [value.replace(":", "=") for value in values], option_string)
        pairs = getattr(namespace, self.dest).items()
        setattr(namespace, self.dest, {int(size) if size.isdecimal() else size: share for size, share in pairs})


def build_parser() -> argparse.ArgumentParser:
    """The flags, named as in timm's train.py where timm has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults; its keys are these flags")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="digits",
        help="digits, mnist, fashion_mnist, cifar10, cifar100, npz:PATH, "
        "imagenet or another name that timm reads; of events nmnist, cifar10dvs, dvs128gesture, events:PATH "
        "(default: %(default)s)",
    )
    group.add_argument("--data-dir", metavar="DIR", help="folder of the dataset (default: $SPIKEZOO_DATA or ./data)")
    group.add_argument("--dataset-download", action=Switch, default=True)
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="of the channels, for the normalisation: one number or one a channel (default: what the given weights "
        "were trained with, else the dataset's); --mean 0 --std 1 leaves the pixels in [0, 1]",
    )
    group.add_argument("--std", type=float, nargs="+", metavar="X", help="likewise")
    group.add_argument("--train-split", default="train")
    group.add_argument("--val-split", default="test")
    group.add_argument("--subset", type=int, metavar="N", help="train on N images only, classes balanced")
    group.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="hold N training images out, classes balanced and the same for all seeds, and evaluate on them instead of "
        "the test set: for every choice that is made by accuracy",
    )
    group.add_argument("-b", "--batch-size", type=int, default=128)
    group.add_argument("-vb", "--validation-batch-size", type=int)
    group.add_argument("-j", "--workers", type=int, default=2, help="loader processes; small sets are held in memory")
    group.add_argument("--hflip", type=float, help="probability of a horizontal flip (default: the dataset's)")
    group.add_argument(
        "--alternating-flip",
        action=Switch,
        default=False,
        help="mirror an image in every other epoch, half of them from the first on, instead of at random",
    )
    group.add_argument("--crop-padding", type=int, help="padding of the random crop (default: the dataset's)")
    group.add_argument(
        "--translate",
        type=int,
        default=0,
        metavar="PIXELS",
        help="largest shift of an image, mirrored at its border, instead of the random crop",
    )
    group.add_argument(
        "--views",
        type=int,
        metavar="N",
        help="augment every image in N ways, in turn (default: anew in every epoch); what --teacher-cache stores",
    )
    group.add_argument(
        "--progressive",
        nargs="+",
        action=Sizes,
        metavar="SIZE:SHARE",
        help="sizes of the training images by share of the run, of its updates or with --train-time of its time: "
        "16:0.5 24:0.25 32:0.25; whole numbers are updates",
    )
    group.add_argument(
        "--roll", type=int, default=0, metavar="PIXELS", help="largest shift, what leaves on one side comes in again"
    )
    group.add_argument("--cutout", type=int, default=0, metavar="PIXELS", help="side of one square hole an image")
    group.add_argument(
        "--aa", metavar="POLICY", help="cifar10, imagenet, svhn, trivial or timm's rand-... strings; for events snn"
    )
    group.add_argument("--reprob", type=float, default=0.0, help="probability of random erasing")
    group.add_argument("--mixup", type=float, default=0.0)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--mixup-prob", type=float, default=1.0)
    group.add_argument("--mixup-switch-prob", type=float, default=0.5)
    group.add_argument(
        "--frames-by",
        help="of event recordings, which become T frames: number (of events, the default), time or duration",
    )
    group.add_argument("--duration-us", type=int, metavar="US", help="length of a frame, for --frames-by duration")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="spiking_conv4", help="a name of spikezoo.list_models()")
    group.add_argument("--T", type=int, help="time steps, frames of an event recording (default: the model's)")
    group.add_argument("--mpbn", help="membrane normalisation: channel, element, none (default: the model's)")
    group.add_argument("--neuron", help="lif, if, plif, or the twins relu and sign (default: the model's)")
    group.add_argument("--num-classes", type=int, help="(default: the dataset's)")
    group.add_argument("--in-chans", type=int, help="(default: the dataset's)")
    group.add_argument("--img-size", type=int, help="(default: the dataset's)")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=Arguments,
        metavar="K=V",
        help="further arguments of create_model: decay=0.5 surrogate=triangle ...",
    )
    group.add_argument(
        "--ticket",
        nargs="*",
        default={},
        action=Arguments,
        metavar="K=V",
        help="train a lottery ticket: kind=mpslt (lt, slt, mplt) sparsity=0.4 (the fraction removed) scope=layer ...",
    )
    group.add_argument(
        "--multisp",
        nargs="*",
        action=Arguments,
        metavar="K=V",
        help="MultiSp on Spikformer and AutoST models: pep_sparsity=0.4 (removed from the patch embedding's weights) "
        "patch_ratio=0.3 (of the patches removed) binary_pep=true fixed=false ...",
    )
    group.add_argument(
        "--dynsnn",
        nargs="*",
        action=Arguments,
        metavar="K=V",
        help="DynSNN: threshold=0.02 (the firing rate below which neurons fade) or compression=0.5 (of the neurons, "
        "removed) reactivate_at=[2,4] prune_at=6 (after these epochs) per=unit (or channel) ...",
    )
    group.add_argument("--pretrained", action=Switch, default=False)
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE_OR_DIR",
        help="weights to start from: this model's, or those of another network of its layout, such as the ReLU twin",
    )
    group.add_argument(
        "--ticket-init",
        metavar="FILE_OR_DIR",
        help="with --ticket: start the scores from these trained weights of the same net without a ticket",
    )
    group.add_argument("--drop", type=float, default=0.0, help="dropout before the classifier")
    group.add_argument("--grad-checkpointing", action=Switch, default=False)
    group.add_argument("--channels-last", action=Switch, default=False)
    group.add_argument("--torchcompile", action=Switch, default=False, help="compile the whole model")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--opt", default="sgd")
    group.add_argument("--opt-eps", type=float)
    group.add_argument("--opt-betas", type=float, nargs="+")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=5e-4, help="on weights, not on norms and biases")
    group.add_argument("--layer-decay", type=float)
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=Arguments, metavar="K=V")
    group.add_argument("--clip-grad", type=float)
    group.add_argument("--clip-mode", default="norm", choices=("norm", "value", "agc"))
    group.add_argument("--epochs", type=int, default=10)
    group.add_argument("--updates", type=int, metavar="N", help="length of the run in updates, instead of --epochs")
    group.add_argument(
        "--train-time",
        metavar="TIME",
        help="length of the run in time of training alone, instead of --epochs: 30m, 3h. It is measured on the first "
        "steps and turned into updates, which are written down and with which the run repeats",
    )
    group.add_argument("--lr", type=float, default=0.1)
    group.add_argument("--sched", default="cosine", help="cosine, step, multistep, poly, tanh, wsd, constant, ...")
    group.add_argument(
        "--sched-on-updates",
        action=Switch,
        default=True,
        help="schedule every update, not every epoch",
    )
    group.add_argument("--warmup-epochs", type=float, default=0)
    group.add_argument("--warmup-share", type=float, metavar="X", help="warm-up as a share of the run: 0.03")
    group.add_argument("--warmup-lr", type=float, default=1e-5)
    group.add_argument("--warmup-prefix", action=Switch, default=False)
    group.add_argument("--cooldown-epochs", type=int, default=0)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--decay-epochs", type=float, default=30)
    group.add_argument("--decay-milestones", type=int, nargs="+", default=[90, 180, 270])
    group.add_argument("--decay-rate", type=float, default=0.1)
    group.add_argument("--grad-accum-steps", type=int, default=1)
    group.add_argument(
        "--amp", action=Precision, default=False, help="mixed precision; auto: where this processor is fast in it"
    )
    group.add_argument("--amp-dtype", default="bfloat16", choices=("bfloat16", "float16"))

    group = parser.add_argument_group("loss")
    group.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    group.add_argument(
        "--tet", action=Switch, default=False, help="temporal efficient training: the loss of every time step"
    )
    group.add_argument("--tet-lambda", type=float, default=0.0, help="weight of TET's pull of the outputs to 1")
    group.add_argument("--rate-penalty", type=float, default=0.0, help="weight of the firing-rate penalty")
    group.add_argument("--rate-target", type=float, default=0.0, help="layer firing rates below this cost nothing")
    group.add_argument(
        "--teacher", metavar="MODEL", help="learn from its logits too: local-dir:FOLDER, hf-hub:ORG/NAME, NAME.TAG"
    )
    group.add_argument(
        "--teacher-cache",
        metavar="DIR",
        help="with --views: store the teacher's logits of all views there, at full size, or take those stored before",
    )
    group.add_argument("--distill-weight", type=float, default=0.5, help="share of the teacher in the loss")
    group.add_argument("--distill-temperature", type=float, default=4.0, help="what both logits are divided by")
    group.add_argument(
        "--model-ema", action=Switch, default=False, help="keep an average of the weights and evaluate it too"
    )
    group.add_argument("--model-ema-decay", type=float, default=0.999)
    group.add_argument("--model-ema-warmup", action=Switch, default=False)

    group = parser.add_argument_group("run")
    group.add_argument("--plan", metavar="FILE", help="work through a queue of runs, see above")
    group.add_argument(
        "--time-budget", metavar="TIME", help="with --plan: save and stop after 30s, 9m, 2h; start again to go on"
    )
    group.add_argument("--seed", type=int, default=42)
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    group.add_argument("--output", default="output", metavar="DIR")
    group.add_argument(
        "--experiment", metavar="NAME", help="folder in OUTPUT (default: the config's name, or the model's)"
    )
    group.add_argument(
        "--resume",
        metavar="FILE_OR_auto",
        help="continue a run: its last.safetensors or recovery file, "
        "or 'auto' for the newest of OUTPUT/EXPERIMENT (starts afresh where there is none)",
    )
    group.add_argument("--no-resume-opt", action="store_true", help="take only the weights of --resume")
    group.add_argument(
        "--recovery-interval", type=int, default=0, metavar="N", help="save every N batches in mid-epoch"
    )
    group.add_argument("--checkpoint-hist", type=int, default=1, help="how many of the best checkpoints to keep")
    group.add_argument("--eval-metric", default="top1", choices=("top1", "top5", "loss"))
    group.add_argument(
        "--val-interval", type=int, default=1, metavar="N", help="evaluate every N epochs and at the end"
    )
    group.add_argument("--log-interval", type=int, default=50)
    group.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="publish the trained weights and their card on the Hugging Face Hub"
    )
    return parser


def number(value: Any) -> Any:
    """Read what YAML takes for text and Python for a number, such as 3e-4; lists too."""
    if isinstance(value, list):
        return [number(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def convert(action: argparse.Action, key: str, value: Any) -> Any:
    """Give a config value the type that the same flag would have; YAML reads 3e-4 as a string."""
    if value is None:
        if action.default is None:
            return None
        raise ValueError(f"Config key {key!r}: it has no value. Leave it out for the default, {action.default!r}.")
    if isinstance(action, argparse._StoreTrueAction | Switch):
        if isinstance(action, Precision) and value == "auto":
            return value
        if not isinstance(value, bool):
            auto = ", auto" if isinstance(action, Precision) else ""
            raise ValueError(f"Config key {key!r}: {value!r}, expected true or false{auto}.")
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, Mapping):
            example = "{16: 0.5, 32: 0.5}" if isinstance(action, Sizes) else "{decay: 0.5}"
            raise ValueError(f"Config key {key!r}: {value!r}, expected a mapping, for instance {example}.")
        return {name: number(item) for name, item in value.items()}
    many = action.nargs in ("+", "*")
    if isinstance(value, Mapping) or isinstance(value, list) != many:
        raise ValueError(f"Config key {key!r}: {value!r}, expected {'a list' if many else 'one value'}.")
    kind: Callable[[Any], Any] = action.type if callable(action.type) else str
    try:
        converted = [kind(item) for item in value] if many else kind(value)
        if (isinstance(value, float | bool) and kind is int and converted != value) or isinstance(value, bool):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"Config key {key!r}: {value!r}, expected {getattr(kind, '__name__', 'a value')}.") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"Config key {key!r}: {value!r} does not exist. {nearest(value, action.choices)}")
    return converted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line over config over defaults.

    Raises:
        FileNotFoundError: No such config.
        ValueError: A key that is no flag, or a value of another type.
    """
    parser = build_parser()
    first, _ = parser.parse_known_args(argv)
    if first.config:
        path = Path(first.config)
        config = read_yaml(path, "config")
        actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_CONFIGS}
        defaults = {}
        for key, value in config.items():
            dest = str(key).replace("-", "_")
            if dest not in actions:
                raise ValueError(f"Unknown key {key!r} in {path}. {nearest(dest, actions)}")
            defaults[dest] = convert(actions[dest], str(key), value)
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.opt_args = args.opt_kwargs
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    named = Path(args.config).stem if args.config else args.model.replace("/", "_").replace(":", "_")
    args.experiment = args.experiment or named
    for low, names in (
        (0, "recovery_interval workers subset weight_decay warmup_epochs warmup_lr cooldown_epochs min_lr"),
        (0, "rate_penalty rate_target mixup cutmix clip_grad"),
        (1, "epochs updates batch_size validation_batch_size grad_accum_steps"),
        (1, "log_interval val_interval checkpoint_hist"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number of at least {low}.")
    for name in ("smoothing", "tet_lambda", "drop", "momentum", "warmup_share"):
        if not 0 <= (getattr(args, name) or 0) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number in [0, 1).")
    for name in ("lr", "distill_temperature"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0.")
    if not 0 <= args.distill_weight <= 1:
        raise ValueError(f"--distill-weight {args.distill_weight}: expected a number in [0, 1].")
    _check_length(args)
    if args.teacher_cache and not args.teacher:
        raise ValueError(
            f"--teacher-cache {args.teacher_cache} without --teacher: whose logits? Add --teacher NAME.TAG."
        )
    if args.ticket_init and not args.ticket:
        raise ValueError(f"--ticket-init {args.ticket_init} without --ticket. Add --ticket kind=mpslt sparsity=0.4.")
    if args.grad_checkpointing and args.torchcompile:
        raise ValueError(
            "--grad-checkpointing --torchcompile: the compiled recomputation updates the running statistics of the "
            "norms a second time. Leave one of them out."
        )
    if args.opt.lower().removeprefix("lookahead_") not in list_optimizers():
        raise ValueError(f"--opt {args.opt!r} does not exist. {nearest(args.opt, list_optimizers())}")
    if args.sched not in SCHEDULES:
        raise ValueError(f"--sched {args.sched!r} does not exist. {nearest(args.sched, SCHEDULES)}")
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    return args


def _check_length(args: argparse.Namespace) -> None:
    """Raise where the flags that say how long a run is do not go together."""
    if args.updates and args.train_time:
        raise ValueError(f"--updates {args.updates} and --train-time {args.train_time}: give one of them.")
    if args.train_time:
        seconds(args.train_time, "--train-time")
    if (args.updates or args.train_time) and args.sched in ("step", "multistep", "rsqrt"):
        raise ValueError(
            f"--sched {args.sched} counts in epochs: with --updates or --train-time use cosine, poly or constant."
        )
    if (args.updates or args.train_time) and not args.sched_on_updates:
        raise ValueError("--no-sched-on-updates with --updates or --train-time: they schedule every update.")
    if args.warmup_share and args.warmup_epochs:
        raise ValueError(f"--warmup-share {args.warmup_share} and --warmup-epochs {args.warmup_epochs}: give one.")
    given = args.progressive
    if given is None:
        return
    values = list(given.values())
    sound = all(type(size) is int and size > 0 for size in given) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values
    )
    counts = sound and all(isinstance(value, int) for value in values) and values != [1]
    if not sound or not (counts or math.isclose(sum(values), 1, abs_tol=1e-6)):
        raise ValueError(
            f"--progressive {given}: expected sizes with shares that add up to 1, for instance 16:0.5 24:0.25 32:0.25, "
            "or with whole numbers of updates."
        )
    if counts and (args.train_time or args.updates not in (None, sum(values))):
        other = f"--train-time {args.train_time}" if args.train_time else f"--updates {args.updates}"
        raise ValueError(f"--progressive {given} is {sum(values)} updates, and {other} says otherwise. Leave that out.")
    if counts:
        args.updates = sum(values)


class Objective:
    """The loss: cross entropy, hard or soft targets, smoothed; TET's over time steps; the firing-rate penalty.

    Args:
        args: Parsed arguments.
        soft: Whether the targets are distributions (mixup, cutmix).
    """

    def __init__(self, args: argparse.Namespace, soft: bool) -> None:
        self.args = args
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if soft:
            self.criterion = SoftTargetCrossEntropy()
        elif args.smoothing:
            self.criterion = LabelSmoothingCrossEntropy(args.smoothing)

    def __call__(self, output: Tensor, target: Tensor, rates: Tensor, taught: Tensor | None = None) -> Tensor:
        """Loss of logits ``[B, K]``, with TET ``[T, B, K]``, firing rates ``[layers, T]`` and a teacher's logits."""
        output = output.float()
        if self.args.tet:
            loss = torch.stack([self.criterion(step, target) for step in output]).mean()
            weight = self.args.tet_lambda
            if weight:
                loss = (1 - weight) * loss + weight * F.mse_loss(output, torch.ones_like(output))
        else:
            loss = self.criterion(output, target)
        if taught is not None:
            # As timm's LogitDistillationTask; with the temperature squared its gradients keep their size.
            share, heat = self.args.distill_weight, self.args.distill_temperature
            logits = (output.mean(0) if self.args.tet else output) / heat
            wanted = F.log_softmax(taught.float() / heat, -1)
            apart = F.kl_div(F.log_softmax(logits, -1), wanted, reduction="batchmean", log_target=True)
            loss = (1 - share) * loss + share * heat**2 * apart
        if self.args.rate_penalty:
            loss = loss + self.args.rate_penalty * (rates.mean(1) - self.args.rate_target).clamp_min(0).mean()
        return loss


class Saver(CheckpointSaver):
    """timm's saver, writing safetensors; every file takes its name only when it is whole.

    Args:
        snapshot: Returns the training state.
    """

    def __init__(self, snapshot: Callable[[], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(model=None, optimizer=None, **kwargs)
        self.extension = ".safetensors"
        self.snapshot = snapshot

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        save_state(save_path, {**self.snapshot(), "metric": metric, "saver": self.state_dict(epoch, metric)})

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm unlinks dst first, which leaves a moment without any checkpoint

    def _duplicate(self, src: str, dst: str) -> None:
        with atomic(dst) as temporary:
            try:
                os.link(src, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(src, temporary)

    def drop_remains(self) -> None:
        """Remove what a killed process was in the middle of writing."""
        for pattern in (".*.tmp", f"*tmp{self.extension}"):
            for path in Path(self.checkpoint_dir).glob(pattern):
                path.unlink()

    def drop_recovery(self) -> None:
        """Remove the mid-epoch files of an epoch that ended well."""
        for path in Path(self.recovery_dir).glob(f"{self.recovery_prefix}-*{self.extension}"):
            path.unlink()
        self.curr_recovery_file = self.prev_recovery_file = ""


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of all random generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def newest_state(folder: Path) -> Path | None:
    """The state of a run that is furthest: last.safetensors or a later mid-epoch recovery."""
    found: list[tuple[int, int, Path]] = []
    for path in folder.glob("*.safetensors"):
        if path.name == "last.safetensors" or path.name.startswith("recovery-"):
            state = load_state(path, "epoch", "batch")
            found.append((state["epoch"], state["batch"], path))
    return max(found)[2] if found else None


def not_finite(model: nn.Module, images: Tensor, autocast: Callable[[], Any]) -> str:
    """Name of the first layer whose output is not finite, found by running the batch again."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad(), autocast():
            if not torch.isfinite(images).all():
                return "the input images"
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "none of the layers: the loss itself"


def plot(folder: Path, layer_rates: Mapping[str, float]) -> list[Path]:
    """Draw the run's curves and the firing rate of every layer over its epochs; [] without matplotlib."""
    paths = [folder / "curves.png", folder / "firing_rates.png"]
    try:
        pictures.check_picture(paths[0])
    except ValueError:
        print("No pictures: pip install 'spikezoo-snn[plot]' brings matplotlib.")
        return []
    summary = folder / "summary.csv"  # not there where a finished run was resumed into another folder
    rows = list(csv.DictReader(summary.read_text().splitlines())) if summary.is_file() else []
    pictures.draw_training(rows, paths[0])
    if not layer_rates:
        return paths[:1]
    epochs = folder / "layer_rates.csv"
    history = read_layer_rates(epochs, layer_rates) if epochs.is_file() else {}
    title = "Firing rate of every layer on the test set"
    # Of averaged weights the last rates are others than those of the epochs.
    pictures.draw_layer_rates(history or {name: [rate] for name, rate in layer_rates.items()}, paths[1], title)
    return paths


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of create_model; classes, channels and size come from the dataset unless given."""
    info = dataset_info(args.dataset, args.data_dir)
    arguments = {
        "num_classes": args.num_classes or info.num_classes,
        "in_chans": args.in_chans or info.in_chans,
        "img_size": args.img_size or info.img_size,
        "T": args.T,
        "mpbn": args.mpbn,
        "neuron": args.neuron,
        "drop_rate": args.drop or None,
        "ticket": args.ticket or None,
        "multisp": args.multisp,
        "dynsnn": args.dynsnn,
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
        return spikezoo.create_model(name, checkpoint_path=path, **arguments)
    kept = {key: value for key, value in stored.items() if same and key not in ("neuron", "mpbn", "T", "encoding")}
    model = spikezoo.create_model(name, **{**kept, **{k: v for k, v in arguments.items() if k not in FLAGS}})
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
            model = spikezoo.apply(model, flag, **arguments[flag])
    return model


class OutOfTime(Exception):
    """The time budget of a plan is over; what is needed to go on is saved."""


class Run:
    """One training run: everything that is built once, and the loop over it.

    Args:
        args: Parsed flags.
        deadline: When to save and raise :class:`OutOfTime`, by ``time.monotonic()``; of one process only.
    """

    def __init__(self, args: argparse.Namespace, deadline: float = math.inf) -> None:
        self.args, self.deadline = args, deadline
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: no CUDA device is available here. Use --device cpu.")
        self.device = init_distributed_device(args)
        self.main = args.rank == 0
        if args.data_dir and Path(args.data_dir).is_file():
            raise ValueError(
                f"--data-dir {args.data_dir} is one file, which would be training and test set at once: give a folder "
                "that holds train/ and val/, or train.tar and val.tar."
            )
        random_seed(args.seed, 0)  # the same initial weights on every rank

        self.arguments = model_arguments(args)
        if args.initial_checkpoint:
            model = initial_model(args.model, args.initial_checkpoint, self.arguments)
        else:
            model = spikezoo.create_model(args.model, args.pretrained, **self.arguments)
        if args.ticket_init:
            warm_scores(model, args.ticket_init)
        # What was made, with what a checkpoint brought along: it must be made the same way by whoever loads it.
        facts = describe(model)
        args.model, self.arguments, self.recipe = facts["architecture"], facts["model_args"], facts["recipe"]
        model.to(self.device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
        self.model = model
        random_seed(args.seed, args.rank)

        size = model.img_size[0]
        loader = functools.partial(
            create_loader,
            args.dataset,
            data_dir=args.data_dir,
            download=args.dataset_download,
            device=self.device,
            seed=args.seed,
            rank=args.rank,
            world_size=args.world_size,
            img_size=size,
            in_chans=model.in_chans,
            channels_last=args.channels_last,
            num_workers=args.workers,
            **input_options(model, args.dataset, args.mean, args.std, args.frames_by, args.duration_us),
        )
        soft = bool(args.mixup or args.cutmix)
        self.train_loader = loader(
            args.train_split,
            train=True,
            batch_size=args.batch_size,
            subset=args.subset,
            hflip=args.hflip,
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
        self.val_loader = loader(self.val_split, batch_size=args.validation_batch_size or args.batch_size, **held)
        if args.holdout:
            self.val_loader.facts["holdout"] = args.holdout
        info = self.val_loader.info
        frames = {key: value for key, value in self.val_loader.facts.items() if key in ("frames_by", "duration_us")}
        self.inputs = {"mean": list(info.mean), "std": list(info.std), **frames}
        self.dynsnn = self._plan_dynsnn(loader) if args.dynsnn is not None else None
        if args.progressive is not None:
            self._check_progressive(args.model, model)
        self.objective = Objective(args, soft)
        self.cache: TeacherCache | None = None
        half = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
        self.amp = fast_bfloat16(self.device) if args.amp == "auto" else bool(args.amp)
        if self.amp and half is torch.bfloat16 and not fast_bfloat16(self.device) and self.main:
            print(f"Warning: bfloat16 is several times slower than float32 on this {self.device.type}. Use --amp auto.")
        self.autocast: Callable[[], Any] = lambda: torch.autocast(self.device.type, half) if self.amp else nullcontext()
        self.teacher = self._make_teacher() if args.teacher else None
        if args.rate_penalty and not model.neuron_config.spiking:
            raise ValueError(f"--rate-penalty on neuron={model.neuron_config.kind!r}, which does not fire spikes.")

        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"{args.model} has nothing to train: the weights of a baked ticket are final. Save it with 'tune' "
                "applied (spikezoo.apply(model, 'tune')) and start from that."
            )
        if args.initial_checkpoint:
            self._preserve_function(loader)
        # Of a hybrid optimiser such as Muon, the classifier's weights go to the one for vectors.
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), fallback_list=["head.*"])
        if isinstance(self.optimizer, FixedNormMuon):
            self.optimizer.fix_norms(normalised_weights(model))
        self.updates_per_epoch = math.ceil(len(self.train_loader) / args.grad_accum_steps)
        # Sizes of the training images (None: as they are) and their numbers of updates; [] until the time is measured.
        self.sizes: list[tuple[int | None, int]] = []
        if not args.train_time:
            self._set_length(self._shares(args.updates))
        self.scaler = NativeScaler(self.device.type) if self.amp and half is torch.float16 else None
        self.ema = (
            ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        )
        self.epoch, self.batch, self.updates = 0, 0, 0
        self.sums = {"loss": 0.0, "rate": 0.0, "batches": 0, "images": 0, "seconds": 0.0}
        self.rng: list[dict[str, Any]] = []  # of every rank, at the time of the last save
        self._prepare_output()

    def _check_progressive(self, name: str, model: Any) -> None:
        full, sizes = min(model.img_size), sorted(self.args.progressive)
        if model.takes_events:
            raise ValueError(f"--progressive: {name} takes event frames, and only images are shrunk. Leave it out.")
        if sizes == [full]:
            return
        if model.fixed_img_size or model.mpbn == "element":
            raise ValueError(
                f"--progressive: {name} was built for images of {full}x{full} alone. Take a model with global pooling "
                "and, of the membrane norms, mpbn='channel'."
            )
        least = model.min_img_size
        for size in sizes:
            if not least <= size <= full:
                raise ValueError(f"--progressive size {size}: expected {least} to {full} for {name}.")
            model._check_size((size, size))  # the patches of a transformer have to fit

    def _shares(self, updates: int | None) -> list[tuple[int | None, int]]:
        """The sizes of the images and their numbers of updates, of a run of so many (None: of all epochs)."""
        given: dict[Any, Any] = self.args.progressive or {None: 1.0}
        if updates is not None and all(isinstance(value, int) for value in given.values()) and sum(given.values()) > 1:
            return list(given.items())
        total = updates or self.args.epochs * self.updates_per_epoch
        ends = [round(total * part) for part in itertools.accumulate(given.values())]
        ends[-1] = total
        return [(size, end - start) for size, start, end in zip(given, [0, *ends], ends, strict=False)]

    def _set_length(self, sizes: list[tuple[int | None, int]]) -> None:
        """Take the number of updates, and make the schedule for it."""
        args, self.sizes = self.args, sizes
        self.total = sum(count for _, count in sizes)
        settings = scheduler_kwargs(args)
        if args.updates or args.train_time:
            settings["num_epochs"] = self.total
            settings["warmup_epochs"] = round(
                self.total * args.warmup_share if args.warmup_share else args.warmup_epochs * self.updates_per_epoch
            )
            settings["cooldown_epochs"] = args.cooldown_epochs * self.updates_per_epoch
            self.scheduler, _ = create_scheduler_v2(self.optimizer, **settings, updates_per_epoch=1)
            self.epochs = math.ceil(self.total / self.updates_per_epoch)
            return
        if args.warmup_share:
            settings["warmup_epochs"] = args.warmup_share * args.epochs
        self.scheduler, epochs = create_scheduler_v2(
            self.optimizer, **settings, updates_per_epoch=self.updates_per_epoch
        )
        self.epochs = math.ceil(epochs)  # a warmup before the schedule may last half an epoch
        if self.epochs != args.epochs:  # the last size lasts through what the schedule adds
            self.total = self.epochs * self.updates_per_epoch
            *first, (size, _) = sizes
            self.sizes = [*first, (size, self.total - sum(count for _, count in first))]

    def _size_at(self, update: int) -> int | None:
        """Size of the training images at an update, None where they stay as they are."""
        for size, count in self.sizes:
            if update < count:
                return size
            update -= count
        return self.sizes[-1][0]

    def _measure_length(self, run: Step) -> None:
        """Turn the time of the run into updates: by steps of every size, of which nothing is left."""
        args = self.args
        before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), rng_state(self.device)))
        self.model.train()
        groups = itertools.cycle(self.train_loader)
        wanted, shares = seconds(args.train_time, "--train-time"), args.progressive or {None: 1.0}
        sizes: list[tuple[int | None, int]] = []
        for size, part in shares.items():
            times: list[float] = []
            while len(times) < 3 or (len(times) < 20 and sum(times) < 6):
                started = 0.0
                for _ in range(args.grad_accum_steps):
                    images, target = next(groups)
                    started = started or time.perf_counter()
                    output, rates, taught = self._forward(run, images.to(self.device), size, None)
                    self.objective(output, target.to(self.device), rates, taught).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times.append(time.perf_counter() - started)
                if len(times) == 2 and times[0] > 3 * times[1]:
                    del times[0]  # it was compiled there
            step = torch.tensor(sorted(times)[len(times) // 2])
            if args.distributed:
                dist.all_reduce(step, dist.ReduceOp.MAX)
            sizes.append((size, max(round(part * wanted / step.item()), 1)))
        self.model.load_state_dict(before[0])
        self.optimizer.load_state_dict(before[1])
        set_rng_state(before[2], self.device)
        self._set_length(sizes)

    def _preserve_function(self, loader: Callable[..., Any]) -> None:
        """Let membrane norms that the initial checkpoint lacks begin as the identity."""
        norms = fresh_membrane_norms(self.model, read_weights(self.args.initial_checkpoint))
        if not norms:
            return
        batches = loader(self.args.train_split, batch_size=100, subset=min(500, self.train_loader.num_samples))
        preserve_function(self.model, norms, (images for images, _ in batches))

    def _forward(
        self, run: Step, images: Tensor, size: int | None, taught: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, firing rates and the teacher's logits of a batch at a size; given ones were stored before."""
        if size is not None and size != images.shape[-1]:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            if self.model.encoding != "direct":  # a weighted mean may round to above 1, where no code is
                images = images.clamp(0, 1)
        with self.autocast():
            output, rates = run(images)
        if taught is None and self.teacher:
            taught = self.teacher(images)
        return output, rates, taught

    def _make_teacher(self) -> Callable[[Tensor], Tensor]:
        """What gives the teacher's logits of a batch that is normalised for the student."""
        model = spikezoo.create_model(self.args.teacher, pretrained=True).to(self.device)
        if model.num_classes != self.model.num_classes or model.input_shape != self.model.input_shape:
            raise ValueError(
                f"--teacher {self.args.teacher} has {model.num_classes} classes and inputs {model.input_shape}, the "
                f"student {self.model.num_classes} and {self.model.input_shape}: take one trained on the same data."
            )
        if self.args.progressive is not None and not self.args.teacher_cache:
            self._check_progressive(f"--teacher {self.args.teacher}", model)
        if self.args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        teacher = DistillationTeacher(model, device=self.device)
        # What it was trained with; timm's fields hold whatever is customary for the architecture.
        theirs = vars(dataset_info(self.args.dataset, self.args.data_dir)) | input_options(model, self.args.dataset)

        def channels(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=self.device).view(1, -1, 1, 1)

        own = [channels(self.inputs[name]) for name in ("mean", "std")]
        teacher.mean_kd, teacher.std_kd = channels(theirs["mean"]), channels(theirs["std"])
        if self.args.torchcompile:
            teacher.compile()

        def teach(images: Tensor) -> Tensor:
            with torch.no_grad(), self.autocast():
                return teacher(teacher.normalize_input(images, *own))

        if self.args.teacher_cache:
            if self.args.mixup or self.args.cutmix:
                raise ValueError("--teacher-cache with --mixup or --cutmix: mixed images do not come again.")
            facts = {"teacher": weights_digest(model), "teacher_inputs": [list(theirs["mean"]), list(theirs["std"])]}
            self.cache = TeacherCache(self.args.teacher_cache, self.train_loader, teach, facts | {"amp": self.amp})
        return teach

    def _plan_dynsnn(self, loader: Callable[..., Any]) -> dict[str, Any]:
        """The arguments of DynSNN, and what makes the images to measure firing rates on: no augmentation."""
        facts: dict[str, Any] = next(arguments for name, arguments in reversed(self.recipe) if name == "dynsnn")
        last = max([*facts["reactivate_at"], facts["prune_at"] or 0])
        if last > self.args.epochs:
            raise ValueError(f"--dynsnn acts after epoch {last}, and the run has --epochs {self.args.epochs}.")
        if facts["reactivate_at"]:
            check_reactivation(self.model)
        subset = min(facts["samples"], self.train_loader.num_samples)
        batch = self.args.validation_batch_size or self.args.batch_size
        images = functools.partial(loader, self.args.train_split, batch_size=batch, subset=subset)
        return {**facts, "images": images}

    # ------------------------------------------------------------------------------------------------- state

    def _prepare_output(self) -> None:
        args = self.args
        folder = Path(args.output) / args.experiment
        state: dict[str, Any] | None = None
        source: Path | None = None
        if args.resume == "auto":
            source = newest_state(folder)
        elif args.resume:
            source = Path(args.resume)
        if source is not None:
            state = load_state(source)
            self._check(state, source)
            if args.resume != "auto" and source.parent.resolve() != folder.resolve():
                folder = Path(get_outdir(args.output, args.experiment, inc=True)) if self.main else folder
        elif self.main and args.resume != "auto":
            folder = Path(get_outdir(args.output, args.experiment, inc=True))
        if args.distributed:
            shared = [str(folder)]
            dist.broadcast_object_list(shared, src=0)
            folder = Path(shared[0])
        self.folder = folder
        self.saver = None
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.saver = Saver(
                self.snapshot,
                checkpoint_dir=str(folder),
                recovery_dir=str(folder),
                decreasing=args.eval_metric == "loss",
                max_history=args.checkpoint_hist,
            )
            self.saver.drop_remains()
        if state is not None:
            self._restore(state, source)
        if self.main:
            trim_summary(folder / "summary.csv", self.epoch)
            with atomic(folder / "args.yaml") as temporary:
                known = {a.dest for a in build_parser()._actions} - {*NOT_IN_CONFIGS, "resume", "no_resume_opt"}
                kept = {key: value for key, value in vars(args).items() if key in known and value is not None}
                temporary.write_text(yaml.safe_dump(kept, sort_keys=True))
            write_json(folder / "metadata.json", {"command": args.command, "seed": args.seed, **environment()})

    def snapshot(self) -> dict[str, Any]:
        """Everything that the run needs to go on exactly as if it had not stopped."""
        return {
            "architecture": self.args.model,
            "model_args": self.arguments,
            "spikezoo": {
                "dataset": self.args.dataset,
                "split": self.val_split,
                "inputs": self.inputs,
                **self.val_loader.facts,
                "recipe": self.recipe,
            },
            "epoch": self.epoch,
            "batch": self.batch,
            "updates": self.updates,
            "sizes": [list(pair) for pair in self.sizes],
            "amp": self.amp,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "rng": self.rng,
            "recipe": self._fingerprint(),
        }

    def _fingerprint(self) -> dict[str, Any]:
        # What must not change between the parts of one run for it to be the same run.
        names = {action.dest for action in build_parser()._actions} - NOT_RECIPE
        return {name: getattr(self.args, name) for name in sorted(names)} | {"world_size": self.args.world_size}

    def _check(self, state: dict[str, Any], source: Path | None) -> None:
        """Raise where this run cannot go on from a state, before anything is written."""
        theirs = (state["architecture"], state["model_args"], state["spikezoo"].get("recipe", []))
        ours = (self.args.model, self.arguments, self.recipe)
        if theirs != ours:
            raise ValueError(
                f"{source} was written by model {theirs[0]!r} with {theirs[1]} and the transforms {theirs[2]}, and "
                f"this run asks for {ours[0]!r} with {ours[1]} and {ours[2]}. Use the same config, or "
                "--initial-checkpoint."
            )
        if self.args.no_resume_opt:
            return
        recipe = state["recipe"]
        changed = {k: (v, recipe[k]) for k, v in self._fingerprint().items() if k in recipe and recipe[k] != v}
        if changed:
            told = ", ".join(f"{name} is {now!r} and was {then!r}" for name, (now, then) in changed.items())
            raise ValueError(f"Cannot continue {source} exactly: {told}. Use the same flags, or --no-resume-opt.")

    def _restore(self, state: dict[str, Any], source: Path | None) -> None:
        self.model.load_state_dict(state["model"])
        if self.args.no_resume_opt:
            if self.ema:
                self.ema.set(self.model)
            return
        if state.get("sizes"):
            self._set_length([(size, count) for size, count in state["sizes"]])
        if self.amp != state.get("amp", self.amp):
            self.amp = state["amp"]
            print(f"--amp auto was {'on' if self.amp else 'off'} where this run began, and stays so.")
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.updates = state["epoch"], state["batch"], state["updates"]
        self.sums = dict(state["sums"])
        set_rng_state(state["rng"][self.args.rank], self.device)
        if self.saver:
            self.saver.load_state_dict(state["saver"])
        if self.main:
            print(f"Resuming {source} at epoch {self.epoch + 1}, batch {self.batch}.")

    # -------------------------------------------------------------------------------------------------- loop

    def train(self) -> dict[str, Any]:
        """Run all epochs and return the last evaluation."""
        args, model = self.args, self.model
        if self.main:
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(
                f"{args.model}: {count:,} parameters, T={model.T}, neuron={model.neuron_config.kind}, "
                f"mpbn={model.mpbn or 'none'}; {args.dataset}: {self.train_loader.num_samples:,} training and "
                f"{self.val_loader.num_samples:,} test images; {self.device}"
                f"{f' x {args.world_size}' if args.distributed else ''}; output {self.folder}",
                flush=True,
            )
        net: nn.Module = WithRates(model, steps=args.tet)
        if args.distributed:
            net = nn.parallel.DistributedDataParallel(net, [self.device] if self.device.type == "cuda" else None)
        run: Step = net
        if args.torchcompile:
            # Every size of the images has kernels of its own; general ones would be slower.
            dynamic = False if args.progressive else None
            options = model.compile_options if self.device.type == "cpu" else {}
            run = torch.compile(net, dynamic=dynamic, options=options)
        # Evaluation can share the compiled step where that is the plain forward pass.
        compiled = run if args.torchcompile and not args.tet and not args.distributed else None
        results: dict[str, Any] = {}
        if not self.sizes:
            self._measure_length(run)
            if self.main:
                told = " ".join(f"{size}:{count}" for size, count in self.sizes)
                again = f"--progressive {told}" if args.progressive else f"--updates {self.total}"
                print(f"--train-time {args.train_time} is {self.total} updates here; to repeat it: {again}", flush=True)
        if self.cache is not None:
            self.cache.fill(min(self.epochs, args.views), self.device, self.main and sys.stderr.isatty())
        while self.epoch < self.epochs:
            self._train_epoch(net, run)
            self._check_finite()
            if args.distributed:
                distribute_bn(model, args.world_size, True)
                if self.ema:  # that of rank 0, which is the one in the checkpoints
                    distribute_bn(self.ema.module, args.world_size, False)
            sums, lr = self.sums, self.optimizer.param_groups[0]["lr"]
            train = {
                "loss": sums["loss"] / sums["batches"],
                "firing_rate": sums["rate"] / sums["batches"] if model.neuron_config.spiking else None,
                "images_per_second": sums["images"] / sums["seconds"],
                "seconds": sums["seconds"],
            }
            self.epoch, self.batch = self.epoch + 1, 0
            self.sums = dict.fromkeys(self.sums, 0)
            acted = self._act_dynsnn(compiled) if self.dynsnn else {}
            due = self.epoch % args.val_interval == 0 or self.epoch == self.epochs or acted
            results = (self._evaluate(compiled) if due else {}) | acted
            self._collect_rng()
            self._finish_epoch(train, results, lr)
        return results or self._evaluate(compiled)

    def _act_dynsnn(self, compiled: Step | None) -> dict[str, Any]:
        """Reactivate or remove what fades, if that is due after this epoch; what summary.csv says of it."""
        facts, ema = self.dynsnn or {}, self.ema.module if self.ema else None
        told: dict[str, Any] = {"dynsnn_fading": None, "dynsnn_top1_before": None}
        due = "reactivates" if self.epoch in facts["reactivate_at"] else "prunes" * (self.epoch == facts["prune_at"])
        if due:
            with self.autocast():
                rates = neuron_rates(self.model, facts["images"]())
            threshold = facts["threshold"]
            if threshold is None or (due == "prunes" and facts["compression"] is not None):
                threshold = threshold_for(self.model, rates, facts["compression"])
            fading = fade(rates, threshold)
            before = self._evaluate(compiled)
            told["dynsnn_top1_before"] = before.get("ema", before)["top1"]
            told["dynsnn_fading"] = share(self.model, fading)
            if due == "prunes":
                prune(self.model, rates, threshold, self.optimizer, ema)
            else:
                # One generator an epoch: the same weights on all ranks, and in a run that was resumed.
                generator = torch.Generator().manual_seed((self.args.seed << 16) + self.epoch)
                reactivate(self.model, fading, self.optimizer, ema, generator, facts["weights"])
        told["dynsnn_removed"] = share(self.model, {name: ~mask for name, mask in masks_of(self.model).items()})
        if due and self.main:
            print(
                f"epoch {self.epoch}/{self.epochs}: DynSNN {due} {told['dynsnn_fading']:.2f} % of the neurons, with "
                f"firing rates below {threshold:.4g}; top-1 before that {told['dynsnn_top1_before']:.2f} %",
                flush=True,
            )
        return told

    def _evaluate(self, compiled: Step | None) -> dict[str, Any]:
        measure = functools.partial(
            evaluate,
            loader=self.val_loader,
            device=self.device,
            autocast=self.autocast,
            progress=self.main and sys.stderr.isatty(),
        )
        set_epoch(self.model, math.inf)  # a ticket at its final sparsity, at which it is delivered
        results = measure(self.model, compiled=compiled)
        if self.ema:
            results["ema"] = measure(self.ema.module)
        return results

    def _check_finite(self) -> None:
        # A neuron turns nan into silence, so a network with broken weights may still have a finite loss.
        for name, tensor in self.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                self._stop(f"{name} is not finite", self.batch, name.rpartition(".")[0])

    def _collect_rng(self) -> None:
        own = rng_state(self.device)
        self.rng = [own] * self.args.world_size
        if self.args.distributed:
            dist.all_gather_object(self.rng, own)

    def _train_epoch(self, net: nn.Module, run: Step) -> None:
        args, model = self.args, self.model
        net.train()
        self.train_loader.set_epoch(self.epoch)
        set_epoch(model, self.epoch)
        total = len(self.train_loader)
        accumulate = args.grad_accum_steps
        spiking = model.neuron_config.spiking
        bar = tqdm(
            total=total,
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.epochs}",
            disable=not (self.main and sys.stderr.isatty()),
            leave=False,
        )
        shown, since = time.perf_counter(), 0
        last = shown
        last_group = total - (total % accumulate or accumulate)  # a shorter last group is averaged over its own length
        for images, target in self.train_loader.iterate(self.batch):
            images, target = images.to(self.device), target.to(self.device)
            group = total - last_group if self.batch >= last_group else accumulate
            update = (self.batch + 1) % accumulate == 0 or self.batch + 1 == total
            sync = nullcontext() if update or not args.distributed else net.no_sync()  # type: ignore[operator]
            with sync:
                taught = self.cache(self.epoch, self.batch) if self.cache else None
                output, rates, taught = self._forward(run, images, self._size_at(self.updates), taught)
                loss = self.objective(output, target, rates, taught)
                value = loss.item()
                if not math.isfinite(value):
                    layer = not_finite(model, images, self.autocast)
                    self._stop(f"the loss is {value}", self.batch + 1, layer)
                rate = rates.mean().item() if spiking else None
                self.sums["loss"] += value
                self.sums["rate"] += rate or 0.0
                self.sums["batches"] += 1
                self.sums["images"] += len(images) * args.world_size
                loss = loss / group
                if self.scaler:
                    self.scaler(
                        loss,
                        self.optimizer,
                        clip_grad=args.clip_grad,
                        clip_mode=args.clip_mode,
                        parameters=model.parameters(),
                        need_update=update,
                    )
                else:
                    loss.backward()
            self.batch += 1
            since += len(images) * args.world_size
            if update:
                if not self.scaler:
                    if args.clip_grad is not None:
                        dispatch_clip_grad(model.parameters(), args.clip_grad, args.clip_mode)
                    self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.updates += 1
                if self.ema:
                    self.ema.update(model, step=self.updates)
                if self.scheduler:
                    self.scheduler.step_update(self.updates)
            bar.update()
            now = time.perf_counter()
            self.sums["seconds"] += now - last
            last = now
            if self.main and (self.batch % args.log_interval == 0 or self.batch == total):
                line = f"loss {self.sums['loss'] / self.sums['batches']:.4f}, {since / (now - shown):.0f} images/s"
                if rate is not None:
                    line += f", firing rate {rate:.3f}"
                bar.set_postfix_str(line)
                if bar.disable:
                    print(f"epoch {self.epoch + 1}/{self.epochs} batch {self.batch}/{total}: {line}", flush=True)
                shown, since = now, 0
            interval = args.recovery_interval
            over = time.monotonic() >= self.deadline
            if update and (over or (interval and self.batch < total and self.batch % interval == 0)):
                self._check_finite()
                self._collect_rng()
                if self.saver:
                    self.saver.save_recovery(self.epoch, self.batch)
                if over:
                    raise OutOfTime(f"epoch {self.epoch + 1} of {self.epochs}, batch {self.batch} of {total}")
            if self.updates >= self.total:
                break  # a length in updates may end within an epoch
        bar.close()

    def _stop(self, what: str, batch: int, layer: str) -> NoReturn:
        good = newest_state(self.folder)
        raise SystemExit(
            f"Stopped: {what} at epoch {self.epoch + 1}, batch {batch} (update {self.updates}). "
            f"First layer whose output is not finite: {layer}. "
            f"Last good checkpoint: {good or 'none was written yet'}. "
            "A smaller --lr, --clip-grad 1.0 or a longer --warmup-epochs often helps."
        )

    def _finish_epoch(self, train: dict[str, Any], results: dict[str, Any], lr: float) -> None:
        args = self.args
        best = results.get("ema", results)
        if self.scheduler:
            self.scheduler.step(self.epoch, best.get(args.eval_metric))
        if not self.main:
            return
        if not results:  # not evaluated after this epoch
            self.saver.save_recovery(self.epoch, 0)  # type: ignore[union-attr]
            print(
                f"epoch {self.epoch}/{self.epochs}: train loss {train['loss']:.4f}, {train['images_per_second']:.0f} "
                f"images/s, {train['seconds']:.0f} s",
                flush=True,
            )
            return
        keys = ("top1", "top5", "loss", "firing_rate", "images_per_second")
        eval_row = OrderedDict((key, results[key]) for key in keys)
        if "ema" in results:
            eval_row.update((f"ema_{key}", results["ema"][key]) for key in keys[:4])
        eval_row.update((key, value) for key, value in results.items() if key.startswith("dynsnn"))
        update_summary(self.epoch - 1, train, eval_row, filename=self.folder / "summary.csv", lr=lr)
        write_layer_rates(self.folder / "layer_rates.csv", self.epoch - 1, results["layer_firing_rates"])
        self.saver.save_checkpoint(self.epoch - 1, best[args.eval_metric])  # type: ignore[union-attr]
        self.saver.drop_recovery()  # type: ignore[union-attr]
        rate = results["firing_rate"]
        print(
            f"epoch {self.epoch}/{self.epochs}: train loss {train['loss']:.4f}, test loss {results['loss']:.4f}, "
            f"top-1 {results['top1']:.2f} %"
            + (f" (averaged weights {best['top1']:.2f} %)" if self.ema else "")
            + (f", firing rate {rate:.3f}" if rate is not None else "")
            + f", {train['images_per_second']:.0f} images/s, {train['seconds']:.0f} s",
            flush=True,
        )
        if failing := failing_layers(results["layer_firing_rates"]):
            print(f"  say nothing: {', '.join(f'{name} is {what}' for name, what in failing.items())}", flush=True)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the weights that the run delivers, its pictures, and say where everything is."""
        if not self.main:
            return
        model = self.ema.module if self.ema else self.model
        if tickets(model):  # the logits stay, bit for bit, and the file shrinks thirty times
            model = spikezoo.bake(model)
        final = results.get("ema", results)
        measured = {key: final[key] for key in ("top1", "top5", "loss", "samples", "firing_rate")}
        if self.dynsnn:
            measured |= dynsnn_report(model)
        results = {
            "dataset": self.args.dataset,
            "split": self.val_split,
            **self.val_loader.facts,
            **measured,
            "epochs": self.epochs,
            "updates": self.total,
            **({"progressive": dict(self.sizes)} if self.args.progressive else {}),
            "T": self.model.T,
            "precision": self.args.amp_dtype if self.amp else "float32",
            "train_command": self.args.command,
            "seed": self.args.seed,
            **environment(),
        }
        model.pretrained_cfg |= {"mean": self.inputs["mean"], "std": self.inputs["std"], "inputs": self.inputs}
        spikezoo.save_checkpoint(model, self.folder, results)
        drawn = plot(self.folder, final["layer_firing_rates"])
        rate = final["firing_rate"]
        print(f"\nTest accuracy   {final['top1']:.2f} % (last epoch{', averaged weights' if self.ema else ''})")
        if rate is not None:
            print(f"Firing rate     {rate:.3f} spikes per neuron and time step, T={self.model.T}")
        print(f"Checkpoint      {self.folder / 'model.safetensors'}")
        if drawn:
            print(f"Pictures        {', '.join(map(str, drawn))}")
        data = f" --data-dir {shlex.quote(self.args.data_dir)}" if self.args.data_dir else ""
        if self.args.push_to_hub:
            print(f"Published       {spikezoo.push_folder(self.folder, self.args.push_to_hub)}")
        print(f"Validate it     python validate.py --checkpoint {shlex.quote(str(self.folder))}{data}", flush=True)


# ------------------------------------------------------------------------------------------------------- plans

# Flags that a plan sets itself for each of its runs.
SET_BY_PLAN = {*NOT_IN_CONFIGS, "output", "experiment", "resume", "no_resume_opt"}
MEASURES = ("top1", "top5", "loss", "firing_rate", "seconds")


class Planned(NamedTuple):
    """One run of a plan: its name, the row it comes from, what the plan says of it, and its parsed flags."""

    name: str
    row: str
    settings: dict[str, Any]
    args: argparse.Namespace
    plan: PlanRow

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.args.output) / self.args.experiment

    def get(self, key: str) -> Any:
        """A flag of the run, 'name' (of its row) or what a dotted key reaches; None where there is none."""
        value: Any = {**vars(self.args), "name": self.row}
        for part in key.replace("-", "_").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def result(self) -> dict[str, Any] | None:
        """The row of results.csv, None where the run has not ended.

        Raises:
            ValueError: It ended with other flags than the plan's, or its files are damaged.
        """
        if not (self.folder / "config.json").is_file():
            return None
        results = read_config(self.folder)["spikezoo"]["results"]
        last = self.folder / "last.safetensors"
        if last.is_file() and load_state(last, "epoch")["epoch"] != results.get("epochs"):
            return None  # it was started anew since
        then, now = read_yaml(self.folder / "args.yaml", "record"), vars(self.args)
        keys = {action.dest for action in build_parser()._actions} - NOT_RECIPE
        if set(self.args.model) & set(":."):  # a checkpoint, and the record names its architecture
            keys.remove("model")
        if changed := [f"{k} is {now[k]!r} and was {then.get(k)!r}" for k in sorted(keys) if now[k] != then.get(k)]:
            raise ValueError(f"{self.folder} holds a finished run of other flags: {'; '.join(changed)}. Move it away.")
        with open(self.folder / "summary.csv", newline="") as file:
            seconds = sum(float(row["train_seconds"]) for row in csv.DictReader(file))
        paper = {f"paper_{measure}": number for measure, number in self.plan.paper.items()}
        return {"name": self.name, "overrides": self.settings, "seconds": round(seconds, 1), **results, **paper}


def seconds(text: str, flag: str = "--time-budget") -> float:
    """Read a time: 90, 30s, 9m or 2h."""
    try:
        value = float(text.rstrip("smh")) * {"m": 60, "h": 3600}.get(text[-1:], 1)
        if text[-2:-1].isalpha() or not 0 < value < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"{flag} {text!r}: expected a time such as 90, 30s, 9m or 2h.") from None
    return value


def to_flags(settings: Mapping[str, Any], config: Path | None) -> list[str]:
    """The command line of a row's settings; a mapping with dotted keys starts from the config's."""
    base = {str(k).replace("-", "_"): v for k, v in (read_yaml(config, "config") if config else {}).items()}
    actions = {action.dest: action for action in build_parser()._actions if action.dest not in SET_BY_PLAN}
    wanted: dict[str, Any] = {}
    for key, value in settings.items():
        flag, dot, inner = str(key).partition(".")
        dest = flag.replace("-", "_")
        if dest not in actions:
            raise ValueError(f"Unknown key {key!r}. {nearest(dest, actions)}")
        if not dot:
            wanted[dest] = value
        elif isinstance(actions[dest], ParseKwargs):
            wanted[dest] = {**(wanted.get(dest, base.get(dest)) or {}), inner: value}
        else:
            raise ValueError(f"Key {key!r}: {flag!r} is no mapping.")
    flags = []
    for dest, value in wanted.items():
        if value is None:
            raise ValueError(f"Key {dest!r} has no value.")
        value, name = convert(actions[dest], dest, value), dest.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            flags += [f"--{name}", *(f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in value.items())]
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def read_plan(path: Path, output: str, more: Sequence[str]) -> tuple[list[Planned], dict[str, str] | None]:
    """Read and check a whole plan: its runs in order, and what to plot.

    Raises:
        FileNotFoundError: No such plan or config.
        ValueError: Unknown keys, values of another type, two runs of one name.
    """
    rows, chart = read_rows(path)
    if chart is not None and chart["y"] not in MEASURES:
        raise ValueError(f"{path}: plot.y={chart['y']!r} is not measured. {nearest(chart['y'], MEASURES)}")
    folder, runs = Path(output) / path.stem, []
    for row in rows:
        try:
            config = ["--config", str(row.source)] if row.source else []
            argv = [*config, *to_flags(row.placed(folder), row.source), *more]
            argv += ["--output", str(folder), "--experiment", row.name, "--resume", "auto"]
            args = parse_args(argv)
            if not spikezoo.is_model(args.model) and ":" not in args.model:
                raise ValueError(f"Unknown model {args.model!r}. {nearest(args.model, spikezoo.list_models())}")
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{row.where}: {error}") from error
        runs.append(Planned(row.name, row.row, row.settings, args, row))
    return runs, chart


def write_results(folder: Path, runs: Sequence[Planned], chart: Mapping[str, str] | None) -> None:
    """Write results.csv, and the picture, of all runs that have ended, whoever ran them."""

    def ended() -> dict[str, dict[str, Any]]:
        found = {}
        for run in runs:
            try:
                if row := run.result():
                    found[run.name] = row
            except (ValueError, OSError):
                pass  # reported when its turn comes
        return found

    rows = ended()
    while rows:
        write_rows(folder / "results.csv", list(rows.values()))
        if chart:
            plot_results(folder / f"{folder.name}.png", runs, rows, chart)
        before, rows = rows, ended()
        if rows.keys() == before.keys():  # else another process ended a run meanwhile
            return


def plot_results(
    path: Path, runs: Sequence[Planned], rows: Mapping[str, Mapping[str, Any]], chart: Mapping[str, str]
) -> None:
    """Draw a measure over a swept flag, mean and range over seeds, a line per ``by``; level for runs without it."""
    groups: dict[Any, dict[Any, list[float]]] = {}
    for run in runs:
        if run.name in rows and rows[run.name].get(chart["y"]) is not None:
            label = run.get(chart["by"]) if "by" in chart else chart["y"]
            groups.setdefault(label, {}).setdefault(run.get(chart["x"]), []).append(rows[run.name][chart["y"]])
    with suppress(ValueError):  # without matplotlib there is no picture
        pictures.draw_measure(groups, chart["x"], chart["y"], path, chart.get("by", ""), path.stem)


def run_plan(argv: Sequence[str]) -> int:
    """Work through a plan; returns how many runs failed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--time-budget")
    parser.add_argument("--output", default="output")
    own, more = parser.parse_known_args(argv)
    if taken := [f for f in more if f.partition("=")[0] in ("-c", "--config", "--experiment", "--resume")]:
        raise ValueError(f"{' '.join(taken)} with --plan: the plan says that for each of its runs.")
    deadline = time.monotonic() + seconds(own.time_budget) if own.time_budget else math.inf
    local_rank, rank, world = world_info_from_env() if is_distributed_env() else (0, 0, 1)
    launched = {name: os.environ.pop(name, None) for name in ("WORLD_SIZE", "SLURM_NTASKS")}  # each run is on its own
    runs, chart = read_plan(Path(own.plan), own.output, more)
    folder = Path(own.output) / Path(own.plan).stem
    failed, left = 0, []
    share = share_out([run.plan for run in runs], world)[rank]
    mine = [run for run in runs if run.name in share]
    for number, planned in enumerate(mine, 1):
        told = f"[{number}/{len(mine)}] {planned.name}"
        try:
            if planned.result():
                print(f"{told}: finished before.", flush=True)
                continue
            if time.monotonic() >= deadline:
                raise OutOfTime("not started in this budget")
            print(f"{told}: {planned.args.command}", flush=True)
            if world > 1 and planned.args.device is None and torch.cuda.is_available():
                planned.args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
            run = Run(planned.args, deadline)
            run.finish(run.train())
            del run
        except OutOfTime as stopped:
            left.append(f"{planned.name} ({stopped})")
        except (Exception, SystemExit) as error:
            failed += 1
            if not isinstance(error, ValueError | OSError | SystemExit):
                traceback.print_exc()
            print(f"{told}: failed. {type(error).__name__}: {error}", flush=True)
        write_results(folder, runs, chart)
        gc.collect()
        torch.compiler.reset()  # or the next nets would count as recompilations of this one
    write_results(folder, runs, chart)
    if left:
        print(f"Time is over, {len(left)} left: {', '.join(left)}. Give the same command again to go on.", flush=True)
    if failed:
        print(f"{failed} of {len(mine)} runs failed.", flush=True)
    print(f"Results         {folder / 'results.csv'}", flush=True)
    if world > 1:  # torchrun would end the others with the first process that fails
        os.environ.update({name: value for name, value in launched.items() if value is not None})
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=30))
        total = torch.tensor(failed)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return int(total)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, write; returns the exit code, of a plan how many of its runs failed."""
    logging.getLogger("timm").setLevel(logging.WARNING)
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(flag.partition("=")[0] == "--plan" for flag in argv):
        return run_plan(argv)
    args = parse_args(argv)
    if args.time_budget:
        raise ValueError("--time-budget is for --plan FILE; a single run saves with --recovery-interval N.")
    try:
        run = Run(args)
        run.finish(run.train())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 100))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
