"""The flags of training, named as in timm's train.py where timm has them; configs are YAML files of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers
from timm.utils import (
    ParseKwargs,
)

from spikezoo.checkpoint import check_run_file
from spikezoo.checks import nearest
from spikezoo.config_files import find_config, read_yaml
from spikezoo.flags import KeyValue, Parser, Switch, add_flags
from spikezoo.hub import check_repo_id
from spikezoo.transforms import TRANSFORMS

DESCRIPTION = """Train a spiking network: YAML configs and timm's flag names.

    spikezoo train --config quickstart
    spikezoo train --model mpbn_resnet20 --T 1 --dataset cifar10 --data-dir DATA --epochs 10 --lr 0.1
    torchrun --nproc-per-node 2 -m spikezoo train --config quickstart
    spikezoo train --plan PLAN.yaml --data-dir DATA --time-budget 9m

Flags on the command line win over the config. Writes to OUTPUT/EXPERIMENT: args.yaml, metadata.json, summary.csv,
layer_rates.csv, curves.png, firing_rates.png, last.safetensors (everything that --resume needs),
model_best.safetensors and, at the end, the folder's model.safetensors and config.json, which
spikezoo validate --checkpoint takes.

A plan is a queue of such runs in OUTPUT/PLAN/NAME, with OUTPUT/PLAN/results.csv and a picture. Start it again to go on
where it was stopped or killed; what is finished is skipped. Other flags hold for all its runs. Under torchrun each
process takes whole runs. Its YAML:

    runs:                                # each row: flags by name, over those of its config
      - name: fast
        config: base.yaml                # beside the plan
        model_kwargs.decay: 0.5          # a dot reaches into a mapping
        grid: {model_kwargs.threshold: [0.5, 1.0], T: [1, 4]}   # every combination
        seeds: [1, 2, 3]
        paper: {at: [VGG-9, SNN], top1: 85.3}            # what its table prints there, for its results
      - {name: tuned, config: base.yaml, initial_checkpoint: run:fast}   # what that run of this plan wrote
    plot: {x: model_kwargs.threshold, y: top1, by: T}
"""
# timm's, without plateau, whose state it does not save: a resumed run would differ.
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "constant", "none")


# Flags that may differ between the parts of one run: where it runs and what it writes, not what it computes.
NOT_RECIPE = {
    "help",
    "config",
    "imports",
    "resume",
    "no_resume_opt",
    "initial_checkpoint",
    "pretrained",
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
    "count",
    "norm_ops",
    "log_interval",
    "log_wandb",
    "wandb_project",
    "log_tensorboard",
    "stop_when_dead",
    "push_to_hub",
}


NOT_IN_CONFIGS = {"help", "config", "imports", "plan", "time_budget"}


class Precision(Switch):
    """A switch that 'auto' leaves to the processor."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.metavar = "?", "auto"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        """Store true, false or 'auto'."""
        on = not str(option_string).startswith("--no-")
        if values is not None and (values != "auto" or not on):
            parser.error(f"argument {option_string}: {values!r}, expected nothing{' or auto' if on else ''}")
        setattr(namespace, self.dest, values or on)


class Sizes(KeyValue):
    """Pairs SIZE:SHARE, with numbers as keys."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the pairs as a dict."""
        super().__call__(parser, namespace, [value.replace(":", "=") for value in values or ()], option_string)
        pairs = getattr(namespace, self.dest).items()
        setattr(namespace, self.dest, {int(size) if size.isdecimal() else size: share for size, share in pairs})


def _data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        default="digits",
        help="digits, mnist, fashion_mnist, cifar10, cifar100, npz:PATH, "
        "imagenet or another name that timm reads; of events nmnist, cifar10dvs, dvs128gesture, events:PATH "
        "(default: %(default)s)",
    )
    add_flags(group, "data-dir", "dataset-download", "mean", "std")
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
    add_flags(group, "batch-size")
    group.add_argument("-vb", "--validation-batch-size", type=int)
    add_flags(group, "workers")
    add_flags(group, "frames-by", "duration-us")


def _augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hflip", type=float, help="probability of a horizontal flip (default: the dataset's)")
    group.add_argument(
        "--alternating-flip",
        action=Switch,
        default=False,
        help="mirror an image in every other epoch, half of them from the first on, instead of at random",
    )
    group.add_argument(
        "--scale", type=float, nargs=2, metavar="X", help="area of random resized crops of image files: 0.08 1"
    )
    group.add_argument("--ratio", type=float, nargs=2, metavar="X", help="and their width by their height: 0.75 1.33")
    group.add_argument(
        "--crop-pct", type=float, metavar="X", help="part of an image file that is evaluated (default: the model's)"
    )
    group.add_argument("--interpolation", help="of their resizing: bicubic, bilinear ... (default: the model's)")
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


def _model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="spiking_conv4", help="a name of spikezoo.list_models()")
    add_flags(group, "T", "mpbn", "neuron", "num-classes", "in-chans", "img-size", "model-kwargs")
    for name, transform in TRANSFORMS.items():
        if transform.flag:
            told: dict[str, Any] = {"nargs": "*", "default": transform.default, "action": KeyValue, "metavar": "K=V"}
            group.add_argument(f"--{name.replace('_', '-')}", **told, help=transform.flag)
        for flag, own in transform.flags.items():
            group.add_argument(flag, **own)
    group.add_argument("--pretrained", action=Switch, default=False)
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE_OR_DIR",
        help="weights to start from: this model's, or those of another network of its layout, such as the ReLU twin",
    )
    group.add_argument("--drop", type=float, default=0.0, help="dropout before the classifier")
    group.add_argument("--grad-checkpointing", action=Switch, default=False)
    add_flags(group, "channels-last", "torchcompile")
    group.add_argument(
        "--sync-bn", action=Switch, default=False, help="norms take the statistics of all processes' batches together"
    )
    group.add_argument(
        "--dist-bn",
        default="reduce",
        choices=("reduce", "broadcast", ""),
        help="running statistics after an epoch: their mean over processes, rank 0's, or each its own",
    )


def _optimisation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--opt", default="sgd")
    group.add_argument("--opt-eps", type=float)
    group.add_argument("--opt-betas", type=float, nargs="+")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=5e-4, help="on weights, not on norms and biases")
    group.add_argument("--layer-decay", type=float)
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=KeyValue, metavar="K=V")
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
    add_flags(group, "amp-dtype")


def _loss(group: argparse._ArgumentGroup) -> None:
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


def _run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--plan", metavar="FILE", help="work through a queue of runs, see above")
    group.add_argument(
        "--time-budget", metavar="TIME", help="with --plan: save and stop after 30s, 9m, 2h; start again to go on"
    )
    add_flags(group, "seed", help="of weights, order, augmentation and noise (default: %(default)s)")
    add_flags(group, "device")
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
    group.add_argument(
        "--count", type=int, default=0, metavar="N", help="count operations and energy on N test images at the end"
    )
    group.add_argument("--norm-ops", type=int, default=0, metavar="N", help="with --count: of norms, an element")
    group.add_argument("--log-interval", type=int, default=50)
    group.add_argument("--log-wandb", action=Switch, default=False, help="log to Weights & Biases too")
    group.add_argument("--wandb-project", metavar="NAME", help="its project")
    group.add_argument("--log-tensorboard", action=Switch, default=False, help="write TensorBoard's files too")
    group.add_argument(
        "--stop-when-dead", action=Switch, default=False, help="stop after an epoch with a layer that never fires"
    )
    group.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="publish the trained weights and their card on the Hugging Face Hub"
    )


def build_parser(prog: str = "spikezoo train") -> Parser:
    """The flags, named as in timm's train.py where timm has them, with those of all transforms."""
    parser = Parser(prog, DESCRIPTION)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults; its keys are these flags")
    _data(parser.add_argument_group("data"))
    _augmentation(parser.add_argument_group("augmentation"))
    _model(parser.add_argument_group("model"))
    _optimisation(parser.add_argument_group("optimisation"))
    _loss(parser.add_argument_group("loss"))
    _run(parser.add_argument_group("run"))
    return parser


def recipe_flags() -> set[str]:
    """The flags that say what a run computes, which must not change between its parts."""
    starts = {flag.strip("-").replace("-", "_") for t in TRANSFORMS.values() for flag in t.flags}
    return {action.dest for action in build_parser()._actions} - NOT_RECIPE - starts


def known_flags() -> dict[str, argparse.Action]:
    """The flags that configs and args.yaml may hold, by their names there."""
    return {action.dest: action for action in build_parser()._actions if action.dest not in NOT_IN_CONFIGS}


def number(value: object) -> object:
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
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"Config key {key!r}: {value!r}, expected {getattr(kind, '__name__', 'a value')}.") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"Config key {key!r}: {value!r} does not exist. {nearest(value, action.choices)}")
    return converted


def parse_args(argv: Sequence[str] | None = None, prog: str = "spikezoo train") -> argparse.Namespace:
    """Command line over config over defaults.

    Raises:
        FileNotFoundError: No such config.
        ValueError: A key that is no flag, or a value of another type.
    """
    parser = build_parser(prog)
    first, _ = parser.parse_known_args(argv)
    if first.config:
        path = find_config(first.config)
        config = read_yaml(check_run_file(path))
        actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_CONFIGS}
        defaults = {}
        for key, value in config.items():
            dest = str(key).replace("-", "_")
            if dest not in actions:
                raise ValueError(f"Unknown key {key!r} in {path}. {nearest(dest, actions)}")
            if dest in defaults:
                raise ValueError(f"Key {key!r} in {path} is there twice, with - and with _. Leave one out.")
            defaults[dest] = convert(actions[dest], str(key), value)
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.opt_args = args.opt_kwargs
    named = Path(args.config).stem if args.config else args.model.replace("/", "_").replace(":", "_")
    args.experiment = args.experiment or named
    _check(args)
    for transform in TRANSFORMS.values():
        if transform.check_flags:
            transform.check_flags(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raise where a flag is out of its range, or where flags do not go together."""
    for low, names in (
        (0, "recovery_interval workers subset weight_decay warmup_epochs warmup_lr cooldown_epochs min_lr"),
        (0, "rate_penalty rate_target mixup cutmix clip_grad count norm_ops"),
        (1, "epochs updates batch_size validation_batch_size grad_accum_steps"),
        (1, "log_interval val_interval checkpoint_hist img_size in_chans num_classes T"),
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
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: expected a whole number from 0 to 2**32 - 1.")
    if Path(args.experiment).is_absolute() or ".." in Path(args.experiment).parts:
        raise ValueError(f"--experiment {args.experiment}: expected the name of a folder. Its place is --output DIR.")
    _check_length(args)
    if args.teacher_cache and not args.teacher:
        raise ValueError(
            f"--teacher-cache {args.teacher_cache} without --teacher: whose logits? Add --teacher NAME.TAG."
        )
    if args.sync_bn and (args.torchcompile or args.grad_checkpointing):
        other = "torchcompile" if args.torchcompile else "grad-checkpointing"
        raise ValueError(f"--sync-bn --{other}: norms that wait for other processes cannot have it. Drop one of them.")
    if args.grad_checkpointing and args.torchcompile:
        raise ValueError(
            "--grad-checkpointing --torchcompile: the compiled recomputation updates the running statistics of the "
            "norms a second time. Leave one of them out."
        )
    if args.opt.lower().removeprefix("lookahead_") not in list_optimizers():
        raise ValueError(f"--opt {args.opt!r} does not exist. {nearest(args.opt, map(str, list_optimizers()))}")
    if args.sched not in SCHEDULES:
        raise ValueError(f"--sched {args.sched!r} does not exist. {nearest(args.sched, SCHEDULES)}")
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)


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


def seconds(text: str, flag: str = "--time-budget") -> float:
    """Read a time: 90, 30s, 9m or 2h."""
    try:
        value = float(text.rstrip("smh")) * {"m": 60, "h": 3600}.get(text[-1:], 1)
        if text[-2:-1].isalpha() or not 0 < value < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"{flag} {text!r}: expected a time such as 90, 30s, 9m or 2h.") from None
    return value
