"""The registry, on timm's own: named rows become timm models, and lists of them and of their weights."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from spikezoo.checkpoint import WEIGHTS_NAME, Config
from spikezoo.checks import nearest
from spikezoo.neurons import ANALOG

__all__ = [
    "SHIPPED",
    "Filter",
    "ModelRow",
    "Pretrained",
    "class_of",
    "family",
    "is_model",
    "list_models",
    "list_pretrained",
    "register_rows",
    "row_of",
    "shipped_folder",
    "split_name",
    "weights_filter",
]

# Checkpoints that come with the package: one folder each, called architecture.tag.
SHIPPED = Path(__file__).parent / "weights"
_CFG_FIELDS = set(PretrainedCfg.__dataclass_fields__)


@dataclass(frozen=True)
class ModelRow:
    """One named model: the arguments that define it and the facts that go with the name.

    Attributes:
        arguments: Constructor arguments.
        parameters: Trainable parameters at the row's classes and channels; a test compares them.
        paper: Where the layout comes from.
        note: One or two sentences on what it is.
        num_classes: Default classes.
        img_size: Default input size.
        in_chans: Default input channels.
        pool_size: Size of the final feature map at the default input size.
        fixed_input_size: Whether linear layers tie the net to its image size.
        first_conv: Name of the first layer with weights.
        weights: Pretrained tags, the default first: tag -> fields of timm's ``PretrainedCfg``, of which ``file`` or
            ``hf_hub_id`` ('org/name@' and a commit) says where they are, and the facts ``dataset``, ``top1`` and
            ``size`` (bytes). The checkpoints that come with the package add their own tags.
    """

    arguments: Mapping[str, Any]
    parameters: int
    paper: str
    note: str
    num_classes: int = 10
    img_size: int = 32
    in_chans: int = 3
    pool_size: tuple[int, int] = (1, 1)
    fixed_input_size: bool = False
    first_conv: str = "stem.0.conv"
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pretrained:
    """One set of weights that this project trained.

    Attributes:
        name: ``architecture.tag``.
        source: 'package' or the repository on the Hub.
        size: Bytes of the weights file, or None where nobody wrote it down.
        top1: Test accuracy in per cent, of this very file.
        dataset: What it was trained and tested on.
        T: Time steps.
    """

    name: str
    source: str
    size: int | None
    top1: float | None
    dataset: str | None
    T: int | None

    def __str__(self) -> str:
        size = "size unknown" if self.size is None else f"{self.size / 1e6:.2f} MB"
        top1 = "accuracy unknown" if self.top1 is None else f"{self.top1:.2f} % on {self.dataset}"
        return f"{self.name}: {self.source}, {size}, {top1}, T={self.T}"


# A family's translation of other names of its weights, such as its authors'.
Filter = Callable[[dict[str, Any], nn.Module], dict[str, Any]]

_rows: dict[str, ModelRow] = {}
_classes: dict[str, type[nn.Module]] = {}


def _levels(arguments: Mapping[str, Any]) -> int:
    """Feature levels of a model: its stem and its stages, which are blocks where it has a depth."""
    depth, hidden = arguments.get("depth"), arguments.get("hidden")
    if "widths" not in arguments and isinstance(hidden, Sequence):
        return len(hidden)  # a net of linear layers, the first of which is its stem
    return 1 + (depth if isinstance(depth, int) else len(arguments.get("widths", (0, 0))))


def _entrypoint(name: str, module: str, cls: type[nn.Module], row: ModelRow) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
        arguments = {**row.arguments, **kwargs}
        # timm wraps features_only models in a net that would take the batch for time; the getter goes through the
        # model's own forward_intermediates.
        feature_cfg = {"feature_cls": "getter", "out_indices": tuple(range(_levels(arguments)))}
        if model is not None:  # made and loaded already, it only wants timm's wrapper
            feature_cfg["out_indices"] = tuple(range(len(getattr(model, "feature_info", ()))))
            return build_model_with_cfg(lambda **_: model, name, False, feature_cfg=feature_cfg, **kwargs)
        if kwargs.get("neuron") in ANALOG:
            # A twin has no membrane potential and no time; only what was asked for by name is a mistake.
            if "mpbn" not in kwargs:
                arguments["mpbn"] = "none"
            for key in ("T", "encoding"):
                if key not in kwargs:
                    arguments.pop(key, None)
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and cfg.file and Path(cfg.file).is_relative_to(SHIPPED):
            # timm alone would neither check the file nor rebuild the model that it belongs to. The one import upwards:
            # timm's door to a name, which stands here, leads through the factory.
            from spikezoo.factory import create_model

            own = {key: value for key, value in kwargs.items() if not key.startswith("pretrained_cfg")}
            return create_model(f"{name}.{cfg.tag}", True, **own)
        if not pretrained and not kwargs.get("pretrained_cfg"):
            # The name alone is the paper's layout, whatever classes, channels and size its weights have.
            for key, value in (
                ("num_classes", row.num_classes),
                ("in_chans", row.in_chans),
                ("img_size", row.img_size),
            ):
                arguments.setdefault(key, value)
        # timm's builder takes classes and channels from there, but the size only of nets that are tied to it.
        arguments.setdefault("img_size", cfg.input_size[-2:])
        return build_model_with_cfg(
            cls,
            name,
            pretrained,
            feature_cfg=feature_cfg,
            pretrained_filter_fn=functools.partial(_plain_weights, weights_filter(name)),
            **arguments,
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{row.note}\n\nPaper: {row.paper}. {row.parameters:,} parameters at {row.num_classes} classes."
    return create


def _plain_weights(filter_fn: Filter | None, weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Timm's filter of weights that it downloaded itself."""
    if any(name.endswith(".bitmask") for name in weights):
        raise ValueError(
            "These weights are stored in spikezoo's sparse code, which timm.create_model cannot read: use "
            "spikezoo.create_model with the same name, or spikezoo.load_sparse_file for the tensors."
        )
    return filter_fn(weights, model) if filter_fn else weights


def row_of(architecture: str) -> ModelRow:
    """The row of an architecture."""
    return _rows[architecture]


def class_of(architecture: str) -> type[nn.Module]:
    """The class of an architecture's models."""
    return _classes[architecture]


def weights_filter(architecture: str) -> Filter | None:
    """What translates other names of a family's weights, such as its authors', or None."""
    return getattr(sys.modules[_classes[architecture].__module__], "checkpoint_filter_fn", None)


def shipped_folder(name: str) -> Path:
    """Where the checkpoint ``architecture.tag`` is, or would be, that comes with the package."""
    return SHIPPED / name


def _shipped(name: str) -> dict[str, dict[str, Any]]:
    """Tags of the checkpoints of an architecture that come with the package, with their facts."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(SHIPPED.glob(f"{name}.*/config.json")):
        try:
            # Read without checks, which wait until somebody asks for the weights: importing must not fail.
            config = Config.of(json.loads(path.read_text(encoding="utf-8")))
            file = path.with_name(WEIGHTS_NAME)
            size = file.stat().st_size
        except (AttributeError, TypeError, ValueError, OSError):
            continue
        facts: dict[str, Any] = {
            key: config.facts[key] for key in ("input_size", "num_classes", "mean", "std") if key in config.facts
        }
        facts |= {"dataset": config.dataset, "top1": config.results.get("top1")}
        facts |= {"file": str(file), "size": size, "arguments": config.model_args}
        found[path.parent.name.partition(".")[2]] = facts
    return found


def register_rows(module: str, cls: type[nn.Module], rows: Mapping[str, ModelRow]) -> dict[str, Any]:
    """Register named models with timm.

    Args:
        module: ``__name__`` of the file that defines them.
        cls: Class that the rows' arguments go to.
        rows: Name -> row.

    Returns:
        The file's ``default_cfgs`` in timm's form.

    Raises:
        ValueError: A name that is taken, by timm or by spikezoo.
    """
    cfgs: dict[str, Any] = {}
    rows = {name: replace(row, weights={**row.weights, **_shipped(name)}) for name, row in rows.items()}
    for name, row in rows.items():
        if timm.is_model(name):
            raise ValueError(f"Model name {name!r} is taken already: registering it again would hide the other one.")
        imagenet = row.img_size >= 64
        events = row.in_chans != 3  # counts of events are no colours
        cfg = {
            "input_size": (row.in_chans, row.img_size, row.img_size),
            "fixed_input_size": row.fixed_input_size,
            "pool_size": row.pool_size,
            "num_classes": row.num_classes,
            "crop_pct": 0.875 if imagenet and not events else 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406) if imagenet else (0.4914, 0.4822, 0.4465),
            "std": (0.229, 0.224, 0.225) if imagenet else (0.2023, 0.1994, 0.2010),
            "first_conv": row.first_conv,
            "classifier": "head.fc",
            "license": "apache-2.0",
            "description": row.note,
            "paper_name": row.paper,
        }
        if events:
            cfg |= {"mean": (0.0,) * row.in_chans, "std": (1.0,) * row.in_chans}
        for tag in row.weights or {"": {}}:
            own = {key: value for key, value in row.weights.get(tag, {}).items() if key in _CFG_FIELDS}
            cfgs[f"{name}.{tag}" if tag else name] = {**cfg, **own}
    default_cfgs = generate_default_cfgs(cfgs)
    here = sys.modules[module]
    vars(here)["default_cfgs"] = default_cfgs  # register_model reads it there
    for name, row in rows.items():
        entry = _entrypoint(name, module, cls, row)
        setattr(here, name, entry)
        timm.models.register_model(entry)
        _rows[name], _classes[name] = row, cls
    return dict(default_cfgs)


def family(architecture: str) -> str:
    """The file whose table holds the row; its class may come from another file."""
    return timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]


def split_name(name: str) -> tuple[str, str]:
    """Check a name and split it into architecture and tag.

    Raises:
        ValueError: Unknown; the message names the nearest.
    """
    if not isinstance(name, str):
        raise ValueError(f"Model name {name!r}: expected a string such as 'mpbn_resnet20'.")
    architecture, _, tag = name.partition(".")
    if architecture not in _rows and any(mark in name for mark in "/\\:"):
        raise ValueError(
            f"Model name {name!r}: for a checkpoint in a folder write 'local-dir:FOLDER', for one on the Hugging Face "
            "Hub 'hf-hub:ORG/NAME'; names without prefix are those of spikezoo.list_models()."
        )
    if architecture not in _rows:
        raise ValueError(f"Unknown model {architecture!r}. {nearest(architecture, _rows)} See spikezoo.list_models().")
    tags = _rows[architecture].weights
    if tag and tag not in tags:
        have = f"Its tags: {', '.join(sorted(tags))}." if tags else "It has no pretrained weights yet."
        raise ValueError(f"Unknown tag {tag!r} of model {architecture!r}. {have}")
    return architecture, tag


def list_models(filter: str | Sequence[str] = "", *, pretrained: bool = False, module: str = "") -> list[str]:
    """Names of spikezoo's models.

    Args:
        filter: Wildcards, for instance ``'*resnet*'`` or several of them.
        pretrained: Only models with weights, with their tags.
        module: Only one family's file, for instance ``'spiking_vgg'``.
    """
    modules = set(map(family, _rows))
    if module and module not in modules:
        raise ValueError(f"Unknown module {module!r}. {nearest(module, modules)}")
    found = timm.list_models(filter, module=module, pretrained=pretrained)
    # timm's listing holds its own models too.
    return [name for name in found if name.partition(".")[0] in _rows]


def list_pretrained(filter: str | Sequence[str] = "") -> list[Pretrained]:
    """Every set of weights that this project trained: name with tag, source, size and accuracy.

    Args:
        filter: Wildcards, for instance ``'*resnet*'`` or several of them.

    Examples:
        >>> print(*spikezoo.list_pretrained(), sep='\\n')
    """
    found = []
    for name in list_models(filter, pretrained=True):
        architecture, _, tag = name.partition(".")
        facts = _rows[architecture].weights[tag]
        source = "package" if "file" in facts else str(facts.get("hf_hub_id"))
        T = facts.get("arguments", {}).get("T")
        found.append(Pretrained(name, source, facts.get("size"), facts.get("top1"), facts.get("dataset"), T))
    return found


def is_model(name: str) -> bool:
    """Whether spikezoo has a model of that name."""
    return isinstance(name, str) and name.partition(".")[0] in _rows
