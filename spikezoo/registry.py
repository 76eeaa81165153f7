"""The registry, on timm's own: named rows become timm models, and spikezoo's functions find and create them."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from spikezoo.checks import UnknownArgumentError, nearest
from spikezoo.neurons import ANALOG, NeuronConfig

__all__ = [
    "FACTORY_ARGUMENTS",
    "ModelInfo",
    "ModelRow",
    "Pretrained",
    "create_model",
    "is_model",
    "is_reference",
    "list_models",
    "list_pretrained",
    "locate",
    "model_info",
    "register_rows",
    "shipped_folder",
]

# What every model takes besides its constructor's own arguments: timm's construction switches.
FACTORY_ARGUMENTS = {
    "cache_dir",
    "feature_cls",
    "features_only",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
}
# Checkpoints that come with the package: one folder each, called architecture.tag.
SHIPPED = Path(__file__).parent / "weights"
_NEURON_ARGUMENTS = set(NeuronConfig.__dataclass_fields__) - {"kind"}


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
class ModelInfo:
    """What :func:`model_info` tells about a name: of a name with tag the model of those weights, else the paper's.

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
        dataset: What the weights, those of the default tag if none is named, were trained on, or None.
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
    filter_fn = getattr(sys.modules[module], "checkpoint_filter_fn", None)

    def create(pretrained: bool = False, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
        arguments = {**row.arguments, **kwargs}
        # timm wraps features_only models in a net that would take the batch for time; the getter goes through the
        # model's own forward_intermediates.
        feature_cfg = {"feature_cls": "getter", "out_indices": tuple(range(_levels(arguments)))}
        if model is not None:  # made and loaded already, it only wants timm's wrapper
            feature_cfg["out_indices"] = tuple(range(len(model.feature_info)))  # type: ignore[arg-type]
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
            # timm alone would neither check the file nor rebuild the model that it belongs to.
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
            pretrained_filter_fn=functools.partial(_plain_weights, filter_fn),
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


def shipped_folder(name: str) -> Path:
    """Where the checkpoint ``architecture.tag`` is, or would be, that comes with the package."""
    return SHIPPED / name


def _shipped(name: str) -> dict[str, dict[str, Any]]:
    """Tags of the checkpoints of an architecture that come with the package, with their facts."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(SHIPPED.glob(f"{name}.*/config.json")):
        try:
            # Read without checks, which wait until somebody asks for the weights: importing must not fail.
            config = json.loads(path.read_text())
            block, cfg = config["spikezoo"], config["pretrained_cfg"]
            facts = {key: cfg[key] for key in ("input_size", "num_classes", "mean", "std") if key in cfg}
            facts = {
                key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()
            }  # as timm's
            facts |= {"dataset": block.get("dataset"), "top1": block.get("results", {}).get("top1")}
            file = path.with_name("model.safetensors")
            size = file.stat().st_size
        except (KeyError, TypeError, ValueError, OSError):
            continue
        arguments = config.get("model_args", {})
        found[path.parent.name.partition(".")[2]] = {**facts, "file": str(file), "size": size, "arguments": arguments}
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


def _check_arguments(architecture: str, arguments: Mapping[str, Any], transforms: Sequence[str] = ()) -> None:
    # A family hands on what it does not take itself, so its base's arguments are its own too.
    constructors = [vars(cls)["__init__"] for cls in _classes[architecture].__mro__ if "__init__" in vars(cls)]
    parameters = [p for init in constructors for p in inspect.signature(init).parameters.values()]
    layout = set(_rows[architecture].arguments) - {"mpbn"}
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = (known - {"self"}) | _NEURON_ARGUMENTS | FACTORY_ARGUMENTS | set(transforms)
    for name in arguments:
        if name not in known:
            valid = known - layout - {"neuron_defaults"}
            raise UnknownArgumentError(f"Model {architecture!r} has no argument {name!r}. {nearest(name, valid)}")


def _pretrained_reference(architecture: str, tag: str) -> str:
    """Where the weights of a tag are: a path, or 'hf-hub:' and a repository."""
    weights = _rows[architecture].weights
    if not weights:
        others = ", ".join(row.name for row in list_pretrained()) or "none yet"
        raise ValueError(
            f"Model {architecture!r} has no pretrained weights. Tags that exist: {others}. "
            "Use pretrained=False, or checkpoint_path= for weights of your own."
        )
    fields = weights[tag or next(iter(weights))]
    return str(fields["file"]) if "file" in fields else f"hf-hub:{fields['hf_hub_id']}"


def create_model(
    name: str | Pretrained,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    T: int | None = None,
    mpbn: str | bool | None = None,
    checkpoint_path: str | Path | None = None,
    use_ema: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a model by name, with weights where asked for.

    Weights come with what made their model: its arguments, T included, are the defaults in place of the name's own,
    and the transforms that were applied to it are applied again before the weights are loaded strictly. With other
    ``num_classes`` or ``in_chans`` than theirs the classifier starts afresh and the first convolution is fitted, and
    a warning says so.

    Args:
        name: ``architecture`` or ``architecture.tag``, see :func:`list_models`, or a row of
            :func:`list_pretrained`; ``local-dir:FOLDER`` for a
            checkpoint; ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION`` for one on the Hugging Face Hub, which is
            taken from the cache without any request where it is there.
        pretrained: Load weights; of a plain name those that this project trained, or an error where there are none.
        num_classes: Classes of the head; 0 leaves it out.
        in_chans: Input channels.
        img_size: Height and width of the images.
        T: Time steps.
        mpbn: Membrane normalisation: 'channel', 'element' or 'none'. None takes the model's default.
        checkpoint_path: A checkpoint file (safetensors) or a folder that holds one.
        use_ema: Take the averaged weights, where ``checkpoint_path`` is a training state.
        **kwargs: ``neuron``, ``decay``, ``tau``, ``threshold``, ``v_reset``, ``reset``, ``firing``, ``surrogate``,
            ``surrogate_alpha``, ``detach_reset``, ``global_pool``, ``drop_rate``, ``device``, ``dtype``,
            ``features_only``, ``out_indices``, ``cache_dir`` (of the Hub); and transforms with their arguments, applied
            last: ``ticket=dict(kind='mpslt', sparsity=0.4)``, ``multisp=dict(patch_ratio=0.3)``,
            ``dynsnn=dict(per='channel')``.

    Returns:
        The model, in training mode; in evaluation mode where a transform that ends training was applied.

    Raises:
        ValueError: An unknown name, argument or value, and the message names the nearest valid ones; weights that do
            not fit or are damaged in any bit.
        FileNotFoundError: No checkpoint at ``checkpoint_path``.
        OSError: The Hub does not answer or does not have it.

    Example:
        >>> model = spikezoo.create_model('mpbn_resnet20', T=2, num_classes=100)
    """
    from spikezoo.checkpoint import find_weights, load_weights, read_config, read_weights
    from spikezoo.transforms import FLAGS, apply, replay

    name = name.name if isinstance(name, Pretrained) else name
    path: Path | None = None
    config: dict[str, Any] = {}
    cache_dir = kwargs.get("cache_dir")
    if use_ema and checkpoint_path is None and not (pretrained and is_reference(name)):
        raise ValueError("use_ema=True: averaged weights are in a training state, so give checkpoint_path=.")
    if is_reference(name):
        if checkpoint_path is not None:
            raise ValueError(f"name={name!r} and checkpoint_path={str(checkpoint_path)!r}: give one of them.")
        path = locate(name, cache_dir)
        config = read_config(path)
        if not isinstance(config.get("architecture"), str):
            raise ValueError(
                f"{name} has no config.json that names its architecture: give the name of the model, and "
                f"checkpoint_path={str(path)!r}."
            )
        architecture, tag = _split(config["architecture"])
        path = path if pretrained else None
    else:
        architecture, tag = _split(name)
        if checkpoint_path is not None:
            path = Path(checkpoint_path)
            config = read_config(path)
            own = config.get("architecture", architecture)
            if own != architecture:
                raise ValueError(
                    f"{path} is a checkpoint of {own!r} and was asked to load into {architecture!r}: create {own!r}."
                )
        elif pretrained and "pretrained_cfg_overlay" not in kwargs:
            path = locate(_pretrained_reference(architecture, tag), cache_dir)
            config = read_config(path)
        elif tag:
            config = {"model_args": _rows[architecture].weights[tag].get("arguments", {})}
    stored = dict(config.get("model_args", {}))
    if foreign := sorted(stored.keys() & (FACTORY_ARGUMENTS | {"device", "dtype"})):
        raise ValueError(
            f"{path or name}: model_args holds {', '.join(foreign)}, which say where a model is made and not what it "
            "is. Was this config.json written by spikezoo.save_checkpoint?"
        )
    # Read, and checked for damage, before anything is made of what the config says.
    weights = read_weights(path, use_ema) if path is not None else None
    given = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "img_size": img_size,
        "T": T,
        "mpbn": "none" if mpbn is False else mpbn,
        **kwargs,
    }
    given = {key: value for key, value in given.items() if value is not None}
    _check_arguments(architecture, given, FLAGS)
    flags = {key: given.pop(key) for key in FLAGS if key in given}
    for flag, value in flags.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{flag}={value!r}: expected the arguments of the transform, such as {flag}={{}}.")
    changed = [key for key in ("num_classes", "in_chans") if key in given]
    features = {key: given.pop(key) for key in ("features_only", "out_indices") if key in given}
    merged = _merge(stored, given)
    _check_arguments(architecture, merged)
    # Weights of ours are loaded here, checked and after the transforms; timm loads only what an overlay asks for.
    overlay = pretrained and "pretrained_cfg_overlay" in kwargs and path is None
    full = f"{architecture}.{tag}" if tag else architecture
    if not config and path is None and not flags:
        return timm.create_model(full, pretrained=overlay, **merged, **features)
    model: Any = timm.create_model(full, pretrained=overlay, **merged)
    model = replay(model, config.get("spikezoo", {}).get("recipe", []))
    if path is not None:
        filter_fn: Filter | None = getattr(sys.modules[_classes[architecture].__module__], "checkpoint_filter_fn", None)
        load_weights(model, path, weights=weights, changed=changed, filter_fn=filter_fn)
        model.pretrained_cfg = {**model.pretrained_cfg, "file": str(find_weights(path))}
        inputs = config.get("spikezoo", {}).get("inputs")
        if inputs and stored.get("in_chans") == model.in_chans:  # what is said of other channels does not fit
            model.pretrained_cfg |= {"mean": inputs["mean"], "std": inputs["std"], "inputs": inputs}
    for flag, value in flags.items():
        model = apply(model, flag, **value)
    if features.get("features_only"):
        return timm.model_entrypoint(architecture)(model=model, **features)
    return model


def _merge(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a checkpoint under those of the user, who may choose another form of the same thing."""
    merged = {**stored, **given}
    for one, other in (("decay", "tau"), ("tau", "decay")):
        if one in given and other not in given:
            merged.pop(other, None)
    if merged.get("neuron") in ANALOG and given.get("neuron") in ANALOG:
        # The twin has no time and no potential: what the checkpoint says of them is not meant for it.
        for key in ("T", "mpbn", "encoding", "encoding_seed", *_NEURON_ARGUMENTS):
            if key not in given:
                merged.pop(key, None)
    return merged


_SCHEMES = ("local-dir", "hf-hub", "hf_hub")


def is_reference(name: object) -> bool:
    """Whether a name says where a checkpoint is: ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``."""
    return isinstance(name, str) and name.partition(":")[0] in _SCHEMES and ":" in name


def locate(reference: str, cache_dir: str | Path | None = None) -> Path:
    """The folder or file of a reference, fetched where it is on the Hub; a path stands for itself."""
    scheme, colon, rest = reference.partition(":")
    if colon and scheme in ("hf-hub", "hf_hub"):
        from spikezoo.hub import pull

        return pull(rest, cache_dir=cache_dir)
    if not is_reference(reference):
        return Path(reference)
    if not rest:
        raise ValueError(f"{reference!r}: expected a folder after the colon, as in 'local-dir:output/quickstart'.")
    return Path(rest)


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


def list_pretrained(filter: str | Sequence[str] = "") -> list[Pretrained]:
    """Every set of weights that this project trained: name with tag, source, size and accuracy.

    Args:
        filter: Wildcards, for instance ``'*resnet*'`` or several of them.

    Example:
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


def model_info(name: str) -> ModelInfo:
    """Facts about a named model: parameters, time steps, neuron, paper and what to know about the name.

    Args:
        name: Architecture, with or without tag.

    Raises:
        ValueError: Unknown name.
    """
    architecture, tag = _split(name)
    row = _rows[architecture]
    model: Any = create_model(name, device="meta")
    tag = tag or next(iter(row.weights), "")
    return ModelInfo(
        name=architecture,
        family=_family(architecture),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        T=model.T,
        neuron=model.neuron_config.kind,
        mpbn=model.mpbn,
        num_classes=model.num_classes,
        input_size=(model.in_chans, *model.img_size),
        pretrained=[f"{architecture}.{tag}" for tag in row.weights],
        dataset=row.weights[tag].get("dataset") if tag else None,
        paper=row.paper,
        note=row.note,
    )
