"""The one place where rows, weights and transforms meet: models by name, their facts, models from a checkpoint."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, cast, overload

import timm
import torch
from torch import Tensor, nn

from spikezoo import registry
from spikezoo.checkpoint import Config, find_weights, load_weights, stored_numbers
from spikezoo.checks import UnknownArgumentError, is_whole, nearest, switch
from spikezoo.models._base import SpikingModel
from spikezoo.neurons import ANALOG, QCFS, NeuronConfig, SpikingNeuron
from spikezoo.registry import Pretrained, class_of, family, list_pretrained, row_of, split_name, weights_filter
from spikezoo.transforms import FLAGS, apply, replay

__all__ = [
    "FACTORY_ARGUMENTS",
    "ModelInfo",
    "SpikingModel",
    "create_from",
    "create_model",
    "is_reference",
    "locate",
    "model_info",
]

_logger = logging.getLogger("spikezoo")

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
_NEURON_ARGUMENTS = set(NeuronConfig.__dataclass_fields__) - {"kind"}
# What a trained net was trained with and computes otherwise without.
_MEANING = {"T", "neuron", "encoding", *_NEURON_ARGUMENTS} - {"surrogate", "surrogate_alpha", "detach_reset"}
# No net is larger; a file that says so is forged, and a T like that would take the machine's memory.
_MOST = {"depth": 2**10, "T": 2**16}
_MOST_OTHERS = 2**24
_SCHEMES = ("local-dir", "hf-hub", "hf_hub")


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


def model_info(name: str) -> ModelInfo:
    """Facts about a named model: parameters, time steps, neuron, paper and what to know about the name.

    Args:
        name: Architecture, with or without tag.

    Raises:
        ValueError: Unknown name.
    """
    architecture, tag = split_name(name)
    row = row_of(architecture)
    model = create_model(name, device="meta")
    tag = tag or next(iter(row.weights), "")
    height, width = model.img_size
    return ModelInfo(
        name=architecture,
        family=family(architecture),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        T=model.T,
        neuron=model.neuron_config.kind,
        mpbn=model.mpbn,
        num_classes=model.num_classes,
        input_size=(model.in_chans, height, width),
        pretrained=[f"{architecture}.{tag}" for tag in row.weights],
        dataset=row.weights[tag].get("dataset") if tag else None,
        paper=row.paper,
        note=row.note,
    )


# ------------------------------------------------------------------------------------------------- arguments


def _check_arguments(architecture: str, arguments: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Raise where an argument does not exist, or has a size that no net has."""
    # A family hands on what it does not take itself, so its base's arguments are its own too.
    constructors = [vars(cls)["__init__"] for cls in class_of(architecture).__mro__ if "__init__" in vars(cls)]
    parameters = [p for init in constructors for p in inspect.signature(init).parameters.values()]
    layout = set(row_of(architecture).arguments) - {"mpbn"}
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    switches = {p.name for p in parameters if p.annotation == "bool"}
    known = (known - {"self"}) | _NEURON_ARGUMENTS | FACTORY_ARGUMENTS | set(more)
    for name, value in arguments.items():
        if name not in known:
            valid = (known - layout - {"neuron_defaults"}) | {"pretrained", "checkpoint_path", "use_ema"}
            raise UnknownArgumentError(f"Model {architecture!r} has no argument {name!r}. {nearest(name, valid)}")
        if name in switches and name not in more:  # the flag of a transform may share the name
            switch(name, value)  # of any other value the truth would be taken: norm='tdbn' would be a plain norm
        if name == "dtype" and not isinstance(value, torch.dtype):
            raise ValueError(f"dtype={value!r}: expected a type of torch such as torch.float16; commands have --amp.")
        if name == "device":
            try:
                torch.device(value)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device={value!r}: {str(error).splitlines()[0]}.") from None
        most = _MOST.get(name, _MOST_OTHERS)
        for number in _numbers(value):
            if number > most and not name.endswith("seed"):
                raise ValueError(f"{name}={value!r}: no net is that large; expected at most {most:,}.")


def _numbers(value: object) -> list[int]:
    """The whole numbers of an argument, which may be lists of lists."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int) and is_whole(value) else []


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


def _warn_of_changes(name: str, config: Config, given: Mapping[str, Any], model: SpikingModel, path: Path) -> None:
    """Say what a trained net is asked to compute otherwise than it was trained to."""
    if not config.architecture and not config.model_args:
        _logger.warning(
            "%s: no config.json says how these weights were trained, so %s has what its name means (T=%d, neuron=%s): "
            "give T and the neuron's arguments if they were others.",
            path, name, model.T, model.neuron_config.kind,
        )  # fmt: skip
        return
    trained = {"encoding": "direct", **vars(NeuronConfig()), **row_of(name).arguments}
    trained |= {**trained.get("neuron_defaults", {}), **config.model_args}
    trained.setdefault("neuron", trained.get("kind"))
    changed = [key for key in sorted(_MEANING & given.keys()) if given[key] != trained.get(key)]
    if changed:
        told = ", ".join(f"{key}={given[key]!r} instead of {trained.get(key)!r}" for key in changed)
        _logger.warning(
            "%s: the weights were trained with other arguments (%s); their accuracy is that of what they were trained "
            "with, so measure it again.",
            name, told,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class _Source:
    """What is asked for: an architecture, where its weights are, and what they say of themselves.

    Attributes:
        architecture: Name without tag.
        tag: Of the name, or ''.
        path: Where the weights are; None leaves the model as initialised.
        config: What the checkpoint says.
        stored: Its arguments, as far as they are meant for this model.
        ema: Take the averaged weights of a training state.
        foreign: The weights are of another network of this layout: what they lack of neurons starts afresh.
    """

    architecture: str
    tag: str
    path: Path | None = None
    config: Config = field(default_factory=Config)
    stored: Mapping[str, Any] = field(default_factory=dict)
    ema: bool = False
    foreign: bool = False


def is_reference(name: object) -> bool:
    """Whether a name says where a checkpoint is: ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``."""
    return isinstance(name, str) and name.partition(":")[0] in _SCHEMES and ":" in name


def locate(reference: str, cache_dir: str | Path | None = None) -> Path:
    """The folder or file of a reference, fetched where it is on the Hub; a path stands for itself."""
    scheme, colon, rest = reference.partition(":")
    if colon and scheme in ("hf-hub", "hf_hub"):
        from spikezoo.hub.client import pull  # the network's library, for those who ask for it

        return pull(rest, cache_dir=cache_dir)
    if not is_reference(reference):
        return Path(reference).expanduser()
    if not rest:
        raise ValueError(f"{reference!r}: expected a folder after the colon, as in 'local-dir:output/quickstart'.")
    return Path(rest).expanduser()


def _pretrained_reference(architecture: str, tag: str) -> str:
    """Where the weights of a tag are: a path, or 'hf-hub:' and a repository."""
    weights = row_of(architecture).weights
    if not weights:
        there = [row.name for row in list_pretrained()]
        kin = [name for name in there if _related(architecture, name.partition(".")[0])]
        near = max(kin, key=lambda name: SequenceMatcher(None, name, architecture).ratio(), default="")
        raise ValueError(
            f"Model {architecture!r} has no pretrained weights. "
            + (f"The nearest relative that has is {near!r}. " if near else "")
            + f"Tags that exist: {', '.join(there) or 'none yet'}. "
            "Use pretrained=False, or checkpoint_path= for weights of your own."
        )
    fields = weights[tag or next(iter(weights))]
    return str(fields["file"]) if "file" in fields else f"hf-hub:{fields['hf_hub_id']}"


def _related(one: str, other: str) -> bool:
    """Whether two architectures are of one file, or the class of one is made of the other's."""
    first, second = class_of(one), class_of(other)
    return family(one) == family(other) or issubclass(first, second) or issubclass(second, first)


def _tagged(name: str | Pretrained, pretrained: bool | str) -> tuple[str, bool]:
    """The name with the tag that ``pretrained`` may hold, and whether weights are asked for."""
    name = name.name if isinstance(name, Pretrained) else name
    if not isinstance(pretrained, str):
        return name, bool(pretrained)
    if not isinstance(name, str) or is_reference(name) or name.partition(".")[2] not in ("", pretrained):
        raise ValueError(
            f"pretrained={pretrained!r} with the name {name!r}: a tag goes with the name of an architecture, as in "
            "create_model('spiking_vgg9', pretrained='cifar10'). Use pretrained=True."
        )
    return f"{name.partition('.')[0]}.{pretrained}", True


def _find(
    name: str, pretrained: bool, checkpoint_path: str | Path | None, use_ema: bool, kwargs: Mapping[str, Any]
) -> _Source:
    """Where the model comes from that was asked for."""
    if use_ema and checkpoint_path is None and not (pretrained and is_reference(name)):
        raise ValueError("use_ema=True: averaged weights are in a training state, so give checkpoint_path=.")
    cache_dir = kwargs.get("cache_dir")
    if is_reference(name):
        if checkpoint_path is not None:
            raise ValueError(f"name={name!r} and checkpoint_path={str(checkpoint_path)!r}: give one of them.")
        path = locate(name, cache_dir)
        config = Config.read(path)
        if not config.architecture:
            raise ValueError(
                f"{name} has no config.json that names its architecture: give the name of the model, and "
                f"checkpoint_path={str(path)!r}."
            )
        return _Source(
            *split_name(config.architecture), path if pretrained else None, config, config.model_args, use_ema
        )
    architecture, tag = split_name(name)
    if checkpoint_path is not None:
        path = Path(checkpoint_path).expanduser()
        config = Config.read(path)
        if config.architecture not in ("", architecture):
            own = config.architecture
            raise ValueError(
                f"{path} is a checkpoint of {own!r} and was asked to load into {architecture!r}: create {own!r}."
            )
        return _Source(architecture, tag, path, config, config.model_args, use_ema)
    if pretrained and "pretrained_cfg_overlay" not in kwargs:
        path = locate(_pretrained_reference(architecture, tag), cache_dir)
        config = Config.read(path)
        return _Source(architecture, tag, path, config, config.model_args)
    stored = row_of(architecture).weights[tag].get("arguments", {}) if tag else {}
    return _Source(architecture, tag, stored=stored)


@overload
def create_model(
    name: str | Pretrained, pretrained: bool | str = ..., *, features_only: Literal[True], **kwargs: Any
) -> nn.Module: ...
@overload
def create_model(
    name: str | Pretrained,
    pretrained: bool | str = ...,
    *,
    num_classes: int | None = ...,
    in_chans: int | None = ...,
    img_size: int | Sequence[int] | None = ...,
    T: int | None = ...,
    mpbn: str | bool | None = ...,
    checkpoint_path: str | Path | None = ...,
    use_ema: bool = ...,
    **kwargs: Any,
) -> SpikingModel: ...
def create_model(
    name: str | Pretrained,
    pretrained: bool | str = False,
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
    ``num_classes`` or ``in_chans`` than theirs the classifier starts afresh and the first convolution is fitted; a
    warning says so, and where they shall run with another T or other neurons than they were trained with.

    Args:
        name: ``architecture`` or ``architecture.tag``, see :func:`list_models`, or a row of
            :func:`list_pretrained`; ``local-dir:FOLDER`` for a
            checkpoint; ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION`` for one on the Hugging Face Hub, which is
            taken from the cache without any request where it is there.
        pretrained: Load weights; of a plain name those that this project trained, or an error where there are none.
            A tag loads those of that tag.
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
        The model, in training mode; in evaluation mode where a transform that ends training was applied. With
        ``features_only`` timm's wrapper of it.

    Raises:
        ValueError: An unknown name, argument or value, and the message names the nearest valid ones; weights that do
            not fit or are damaged in any bit.
        FileNotFoundError: No checkpoint at ``checkpoint_path``.
        OSError: The Hub does not answer or does not have it.

    Examples:
        >>> model = spikezoo.create_model('mpbn_resnet20', T=2, num_classes=100)
    """
    source = _find(*_tagged(name, pretrained), checkpoint_path, use_ema, kwargs)
    arguments = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "T": T, "mpbn": mpbn, **kwargs}
    return _make(source, arguments, bool(pretrained) and "pretrained_cfg_overlay" in kwargs)


def create_from(name: str, path: str | Path, **arguments: Any) -> SpikingModel:
    """A model that starts from a checkpoint of its own or of another network of its layout.

    A spiking network that starts from its trained ReLU twin is ahead of one that starts from nothing by many epochs.
    Membrane normalisation, time constants and learned thresholds that the other network lacks start afresh.

    Args:
        name: Architecture, as for :func:`create_model`.
        path: A checkpoint file or a folder that holds one.
        **arguments: See :func:`create_model`.

    Raises:
        ValueError: The layouts differ.

    Examples:
        >>> model = create_from('spiking_resnet20', 'output/twin', T=1, neuron='lif')
    """
    path = Path(path).expanduser()
    config, (architecture, tag) = Config.read(path), split_name(name)
    same, stored = config.architecture in ("", architecture), config.model_args
    was, wanted = stored.get("neuron"), arguments.get("neuron", stored.get("neuron", "relu"))
    # A quantised twin has thresholds, which the other twins and spiking nets lack.
    other_neurons = was in ANALOG and (wanted not in ANALOG or (was == "qcfs") != (wanted == "qcfs"))
    other_norms = arguments.get("mpbn", stored.get("mpbn")) != stored.get("mpbn")
    if same and not (other_neurons or other_norms):
        return create_model(name, checkpoint_path=path, **arguments)
    # Of another layout's name no argument is meant for this one; of the twin's all but those of its neurons.
    own = ("neuron", "mpbn", "T", "encoding")
    kept = {key: value for key, value in stored.items() if same and key not in own}
    source = _Source(architecture, tag, path, config, kept, foreign=True)
    return cast(SpikingModel, _make(source, arguments))


def _make(source: _Source, arguments: Mapping[str, Any], overlay: bool = False) -> nn.Module:
    """Make the model of a source with the arguments given: row, then transforms, then weights, then more transforms."""
    architecture, path, recipe = source.architecture, source.path, source.config.recipe
    if foreign := sorted(source.stored.keys() & (FACTORY_ARGUMENTS | {"device", "dtype"})):
        raise ValueError(
            f"{path or architecture}: model_args holds {', '.join(foreign)}, which say where a model is made and not "
            "what it is. Was this config.json written by spikezoo.save_checkpoint?"
        )
    given = {key: value for key, value in arguments.items() if value is not None}
    if given.get("mpbn") is False:
        given["mpbn"] = "none"
    _check_arguments(architecture, given, FLAGS)
    flags = {key: given.pop(key) for key in FLAGS if key in given}
    for flag, value in flags.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{flag}={value!r}: expected the arguments of the transform, such as {flag}={{}}.")
    features = {key: given.pop(key) for key in ("features_only", "out_indices") if key in given}
    merged = _merge(source.stored, given)
    _check_arguments(architecture, merged)
    full = f"{architecture}.{source.tag}" if source.tag else architecture
    if path is None and not source.stored and not recipe and not flags:
        # Weights of ours are loaded below, checked and after the transforms; timm loads what an overlay asks for.
        return timm.create_model(full, pretrained=overlay, **merged, **features)
    if path is not None and not path.is_relative_to(registry.SHIPPED):
        _check_plausible(path, full, merged)
    model = cast(SpikingModel, timm.create_model(full, pretrained=overlay, **merged))
    model = replay(model, recipe)
    if path is not None:
        model = _load(model, source, path, given)
    for flag, value in flags.items():
        model = apply(model, flag, **value)
    if features.get("features_only"):
        return timm.model_entrypoint(architecture)(model=model, **features)
    return model


def _check_plausible(path: Path, full: str, arguments: Mapping[str, Any]) -> None:
    """Raise where a config asks for a net far larger than its weights, before the memory is taken for it."""
    stored = stored_numbers(path)
    outline = timm.create_model(full, **{**arguments, "device": "meta"})
    asked = sum(tensor.numel() for tensor in outline.state_dict().values())
    if stored is not None and asked > 2**26 + 2**6 * stored:
        raise ValueError(
            f"{path} holds {stored:,} numbers, and its arguments {dict(arguments)} make a net of {asked:,}: they do "
            "not belong together. Was this config.json written by spikezoo.save_checkpoint?"
        )


def _fresh(model: nn.Module) -> dict[str, Tensor]:
    """Membrane norms, learned time constants and thresholds of a model, which another network of its layout lacks."""
    return {
        f"{layer}.{key}": value
        for layer, neuron in model.named_modules()
        if isinstance(neuron, SpikingNeuron | QCFS)
        for key, value in neuron.state_dict().items()
        if key in ("w", "threshold") or key.startswith("norm.")
    }


def _without_thresholds(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a quantised twin without the learned thresholds, for a model that has none."""
    own = model.state_dict().keys()
    return {name: value for name, value in weights.items() if name in own or not name.endswith(".threshold")}


def _load(model: SpikingModel, source: _Source, path: Path, given: Mapping[str, Any]) -> SpikingModel:
    """Load a source's weights, and take over what is known of their inputs and classes."""
    trained = source.config.model_args
    places = {"num_classes": "classifier", "in_chans": "first_conv"}
    changed = [key for key in places if key in given]
    # The stem and the head of a baked ticket compute with its two values, which fitted or fresh weights have not.
    layers = [str(model.pretrained_cfg[places[key]]) for key in changed if trained.get(key, given[key]) != given[key]]
    if layers and any(name == "bake" for name, _ in source.config.recipe):
        model = apply(model, "release", layers=layers)
        if isinstance(model.get_classifier(), nn.Linear) and model.pretrained_cfg["classifier"] in layers:
            cast(nn.Linear, model.get_classifier()).reset_parameters()  # a ticket's two values are no start
    fresh = _fresh(model) if source.foreign else {}
    quantised = source.foreign and trained.get("neuron") == "qcfs"
    filter_fn = _without_thresholds if quantised else weights_filter(source.architecture)
    load_weights(model, path, source.ema, fresh=fresh, changed=changed, filter_fn=filter_fn)
    if not source.foreign:
        _warn_of_changes(source.architecture, source.config, given, model, path)
    same_inputs = trained.get("in_chans") == model.in_chans  # what is said of other channels does not fit
    same_classes = trained.get("num_classes", model.num_classes) == model.num_classes
    names = {"interpolation", "crop_pct", "crop_mode", "test_crop_pct"}
    names |= ({"mean", "std"} if same_inputs else set()) | (
        {"label_names", "label_descriptions"} if same_classes else set()
    )
    facts = {key: value for key, value in source.config.facts.items() if key in names}
    said = facts.get("label_names")
    named = isinstance(said, tuple) and all(isinstance(name, str) for name in said)
    if said is not None and not (named and len(said) == model.num_classes):
        _logger.warning("%s: its label_names are no %d names and are left out.", path, model.num_classes)
        del facts["label_names"]
    shape = {"input_size": (model.in_chans, *model.img_size), "num_classes": model.num_classes}
    model.pretrained_cfg = {**model.pretrained_cfg, **facts, **shape, "file": str(find_weights(path))}
    if same_inputs and source.config.inputs:
        model.inputs = source.config.inputs
    return model
