"""The registry, on timm's own: named rows become timm models, and spikezoo's functions find and create them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from spikezoo.neurons import ANALOG, NeuronConfig, UnknownArgumentError, nearest

__all__ = [
    "ModelInfo",
    "ModelRow",
    "create_model",
    "is_model",
    "list_models",
    "list_pretrained",
    "model_info",
    "register_rows",
]

# What every model takes besides its constructor's own arguments: timm's construction switches.
_FACTORY_ARGUMENTS = {
    "cache_dir",
    "feature_cls",
    "features_only",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
}
_NEURON_ARGUMENTS = set(NeuronConfig.__dataclass_fields__) - {"kind"}


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
        weights: Pretrained tags, the default first: tag -> further fields of timm's ``PretrainedCfg``, and ``dataset``,
            the name of the data that the weights are for.
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
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """What :func:`model_info` tells about a name; of its tag, or the default one, where it has weights.

    Attributes:
        name: Architecture.
        family: File that defines it.
        parameters: Trainable parameters.
        T: Time steps.
        neuron: Kind of neuron.
        mpbn: Membrane normalisation, or None.
        num_classes: Classes.
        input_size: Channels, height and width.
        pretrained: Names with tag of all its weights, the default first.
        dataset: What the weights were trained on, or None.
        paper: Where the layout comes from.
        note: What to know about the name.
    """

    name: str
    family: str
    parameters: int
    T: int
    neuron: str
    mpbn: str | None
    num_classes: int
    input_size: tuple[int, int, int]
    pretrained: list[str]
    dataset: str | None
    paper: str
    note: str


_rows: dict[str, ModelRow] = {}
_classes: dict[str, type[nn.Module]] = {}


def _levels(arguments: Mapping[str, Any]) -> int:
    """Feature levels of a model: its stem and its stages, which are blocks where it has a depth."""
    depth = arguments.get("depth")
    return 1 + (depth if isinstance(depth, int) else len(arguments.get("widths", (0, 0))))


def _entrypoint(name: str, module: str, cls: type[nn.Module], row: ModelRow) -> Callable[..., nn.Module]:
    filter_fn = getattr(sys.modules[module], "checkpoint_filter_fn", None)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {**row.arguments, **kwargs}
        if kwargs.get("neuron") in ANALOG:
            # A twin has no membrane potential and no time; only what was asked for by name is a mistake.
            if "mpbn" not in kwargs:
                arguments["mpbn"] = "none"
            if "T" not in kwargs:
                arguments.pop("T", None)
        # timm wraps features_only models in a net that would take the batch for time; the getter goes through the
        # model's own forward_intermediates.
        feature_cfg = {"feature_cls": "getter", "out_indices": tuple(range(_levels(arguments)))}
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        # timm's builder takes classes and channels from there, but the size only of nets that are tied to it.
        arguments.setdefault("img_size", cfg.input_size[-2:])
        return build_model_with_cfg(
            cls, name, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=filter_fn, **arguments
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{row.note}\n\nPaper: {row.paper}. {row.parameters:,} parameters at {row.num_classes} classes."
    return create


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
            "first_conv": "stem.0.conv",
            "classifier": "head.fc",
            "license": "apache-2.0",
            "description": row.note,
            "paper_name": row.paper,
        }
        if events:
            cfg |= {"mean": (0.0,) * row.in_chans, "std": (1.0,) * row.in_chans}
        for tag in row.weights or {"": {}}:
            own = {key: value for key, value in row.weights.get(tag, {}).items() if key != "dataset"}
            cfgs[f"{name}.{tag}" if tag else name] = {**cfg, **own}
    default_cfgs = generate_default_cfgs(cfgs)
    here = sys.modules[module]
    here.default_cfgs = default_cfgs  # type: ignore[attr-defined]  # register_model reads it there
    for name, row in rows.items():
        entry = _entrypoint(name, module, cls, row)
        setattr(here, name, entry)
        timm.models.register_model(entry)
        _rows[name], _classes[name] = row, cls
    return dict(default_cfgs)


def _family(architecture: str) -> str:
    """The file whose table holds the row; its class may come from another file."""
    return timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]


def _split(name: str) -> tuple[str, str]:
    """Check a name and split it into architecture and tag."""
    if not isinstance(name, str):
        raise ValueError(f"Model name {name!r}: expected a string such as 'mpbn_resnet20'.")
    architecture, _, tag = name.partition(".")
    if architecture not in _rows:
        raise ValueError(f"Unknown model {architecture!r}. {nearest(architecture, _rows)} See spikezoo.list_models().")
    tags = _rows[architecture].weights
    if tag and tag not in tags:
        have = f"Its tags: {', '.join(sorted(tags))}." if tags else "It has no pretrained weights yet."
        raise ValueError(f"Unknown tag {tag!r} of model {architecture!r}. {have}")
    return architecture, tag


def _check_arguments(architecture: str, arguments: Mapping[str, Any]) -> None:
    # A family hands on what it does not take itself, so its base's arguments are its own too.
    constructors = [vars(cls)["__init__"] for cls in _classes[architecture].__mro__ if "__init__" in vars(cls)]
    parameters = [p for init in constructors for p in inspect.signature(init).parameters.values()]
    layout = set(_rows[architecture].arguments) - {"mpbn"}
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = (known - {"self"}) | _NEURON_ARGUMENTS | _FACTORY_ARGUMENTS
    for name in arguments:
        if name not in known:
            valid = known - layout - {"neuron_defaults"}
            raise UnknownArgumentError(f"Model {architecture!r} has no argument {name!r}. {nearest(name, valid)}")


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    T: int | None = None,
    mpbn: str | bool | None = None,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model by name.

    Args:
        name: ``architecture`` or ``architecture.tag``, see :func:`list_models`.
        pretrained: Load weights that this project trained; raises where there are none.
        num_classes: Classes of the head; 0 leaves it out.
        in_chans: Input channels.
        img_size: Height and width of the images.
        T: Time steps.
        mpbn: Membrane normalisation: 'channel', 'element' or 'none'. None takes the model's default.
        checkpoint_path: A checkpoint file (safetensors) or a folder that holds one; loaded strictly.
        **kwargs: ``neuron``, ``decay``, ``tau``, ``threshold``, ``v_reset``, ``reset``, ``firing``, ``surrogate``,
            ``surrogate_alpha``, ``detach_reset``, ``global_pool``, ``drop_rate``, ``device``, ``dtype``,
            ``features_only``, ``out_indices``.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: An unknown name, argument or value; the message names the nearest valid ones.
        FileNotFoundError: No checkpoint at ``checkpoint_path``.

    Example:
        >>> model = spikezoo.create_model('mpbn_resnet20', T=2, num_classes=100)
    """
    architecture, _ = _split(name)
    given = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "img_size": img_size,
        "T": T,
        "mpbn": "none" if mpbn is False else mpbn,
        **kwargs,
    }
    given = {key: value for key, value in given.items() if value is not None}
    _check_arguments(architecture, given)
    if pretrained:
        tags = sorted(_rows[architecture].weights)
        if not tags:
            others = ", ".join(list_pretrained()) or "none yet"
            raise ValueError(
                f"Model {architecture!r} has no pretrained weights. Tags that exist: {others}. "
                "Use pretrained=False, or checkpoint_path= for weights of your own."
            )
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **given)
    if checkpoint_path is not None:
        from spikezoo.checkpoint import load_weights

        load_weights(model, checkpoint_path)
    return model


def list_models(filter: str | Sequence[str] = "", *, pretrained: bool = False, module: str = "") -> list[str]:
    """Names of spikezoo's models.

    Args:
        filter: Wildcards, for instance ``'*resnet*'`` or several of them.
        pretrained: Only models with weights, with their tags.
        module: Only one family's file, for instance ``'spiking_vgg'``.
    """
    modules = set(map(_family, _rows))
    if module and module not in modules:
        raise ValueError(f"Unknown module {module!r}. {nearest(module, modules)}")
    found = timm.list_models(filter, module=module, pretrained=pretrained)
    # timm's listing holds its own models too.
    return [name for name in found if name.partition(".")[0] in _rows]


def list_pretrained(filter: str | Sequence[str] = "") -> list[str]:
    """``architecture.tag`` of every set of weights that this project trained."""
    return list_models(filter, pretrained=True)


def is_model(name: str) -> bool:
    """Whether spikezoo has a model of that name."""
    return isinstance(name, str) and name.partition(".")[0] in _rows


def model_info(name: str) -> ModelInfo:
    """Facts about a named model: parameters, time steps, neuron, paper and what to know about the name.

    Args:
        name: Architecture, with or without tag.

    Raises:
        ValueError: Unknown name.
    """
    architecture, tag = _split(name)
    row = _rows[architecture]
    tag = tag or next(iter(row.weights), "")
    full = f"{architecture}.{tag}" if tag else architecture
    model = create_model(full, device="meta")
    cfg: Any = timm.get_pretrained_cfg(full)
    return ModelInfo(
        name=architecture,
        family=_family(architecture),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        T=model.T,  # type: ignore[arg-type]
        neuron=model.neuron_config.kind,  # type: ignore[union-attr, arg-type]
        mpbn=model.mpbn,  # type: ignore[arg-type]
        num_classes=cfg.num_classes,
        input_size=cfg.input_size,
        pretrained=[f"{architecture}.{tag}" for tag in row.weights],
        dataset=row.weights[tag].get("dataset") if tag else None,
        paper=row.paper,
        note=row.note,
    )
