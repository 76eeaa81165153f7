"""What a checkpoint says of itself: the reader and the writer of config.json, and of the same entries of a training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from spikezoo.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, file_hash, find_weights, hint
from spikezoo.checkpoint.state import is_state, load_state
from spikezoo.checks import is_number, nearest

__all__ = ["Config", "config_hash", "known_facts", "read_config", "write_config"]

CONFIG_VERSION = 1
# What config.json may name as the code of the tensors: a name from a file never decides what code runs.
FORMATS = ("dense", "spikezoo-sparse")
# Where weights are is no fact of theirs, and a tag names what this project ships: neither goes into a file.
_PLACES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "tag"}
_FACTS = set(PretrainedCfg.__dataclass_fields__) - _PLACES


def known_facts(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ``pretrained_cfg`` what timm knows and what holds wherever the weights are, with tuples as timm has them."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in cfg.items()
        if key in _FACTS and value is not None
    }


@dataclass(frozen=True)
class Config:
    """What a checkpoint says of itself; the one place that knows where in config.json it stands.

    Attributes:
        architecture: Name of the model, '' where nothing says it.
        model_args: Its arguments.
        recipe: Transforms applied, in order: name and arguments.
        inputs: Mean and std of the normalisation that the weights were trained with; of events, what cut the frames.
        dataset: What the weights are for.
        split: Of the dataset, for the results.
        results: What was measured of these very weights.
        pretrained_cfg: timm's facts: input size, crop, interpolation, names of the classes, ...
        sha256: File name -> hash.
        version: Of the format; 0 for what was written before there were versions, or by others.
        form: Code of the tensors: dense or spikezoo-sparse.
        sparsity: Fraction of zeros among all stored numbers.
        parameters: How many the model has.
        spikezoo_version: What wrote it.
    """

    architecture: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    recipe: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    split: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    version: int = 0
    form: str = "dense"
    sparsity: float | None = None
    parameters: int | None = None
    spikezoo_version: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Config:
        """Take the entries of a config as JSON or a training state holds them, {} for none."""
        block, form = config.get("spikezoo", {}), config.get("sparsity_config", {})
        architecture, arguments = config.get("architecture"), dict(config.get("model_args", {}))
        if "num_classes" in config and "spikezoo" in config:  # dense files of ours have it there alone
            arguments.setdefault("num_classes", config["num_classes"])
        return cls(
            architecture=architecture if isinstance(architecture, str) else "",
            model_args=arguments,
            recipe=[(name, dict(arguments)) for name, arguments in block.get("recipe", [])],
            inputs=dict(block.get("inputs") or {}),
            dataset=block.get("dataset"),
            split=block.get("split"),
            results=dict(block.get("results") or {}),
            pretrained_cfg=dict(config.get("pretrained_cfg") or {}),
            sha256=_hashes(config),
            version=block.get("version", 0),
            form=form.get("format", "dense"),
            sparsity=form.get("global_sparsity"),
            parameters=block.get("parameters"),
            spikezoo_version=block.get("spikezoo_version"),
        )

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Read the config of a folder, a weights file or a training state, see :func:`read_config`."""
        return cls.of(read_config(path))

    @property
    def facts(self) -> dict[str, Any]:
        """Timm's facts that hold wherever the weights are, see :func:`known_facts`."""
        return known_facts(self.pretrained_cfg)


def _hashes(config: Mapping[str, Any]) -> dict[str, str]:
    block = config.get("spikezoo")
    found = block.get("sha256") if isinstance(block, Mapping) else None
    return {name: str(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _check_types(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raise where a config says how to make the model in another form than an object of arguments and a recipe."""
    if not isinstance(arguments := config.get("model_args", {}), dict):
        raise ValueError(f"{path}: model_args is {arguments!r}. Expected an object such as {{'T': 4}}.")
    block = config.get("spikezoo", {})
    recipe = block.get("recipe", []) if isinstance(block, dict) else block
    if not isinstance(recipe, list) or not all(
        isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)
        for entry in recipe
    ):
        raise ValueError(f"{path}: recipe is {recipe!r}. Expected pairs such as ['fold_bn', {{}}].")
    inputs = block.get("inputs")
    for name, value in (
        ("pretrained_cfg", config.get("pretrained_cfg")),
        ("inputs", inputs),
        ("results", block.get("results")),
    ):
        if not isinstance(value, dict | None):
            raise ValueError(f"{path}: {name} is {value!r}. Expected an object of names and values.")
    for name in ("mean", "std"):
        values = inputs.get(name) if inputs else []
        if not (isinstance(values, list | tuple) and all(map(is_number, values))):
            raise ValueError(f"{path}: the {name} of the inputs is {values!r}. Expected a list of numbers.")
    for name in ("dataset", "split"):
        if not isinstance(block.get(name), str | None):
            raise ValueError(f"{path}: {name} is {block[name]!r}. Expected a name.")
    return config


def config_hash(config: Mapping[str, Any]) -> str:
    """The sha256 of a config's content, without the entry that holds it."""
    block = {**config["spikezoo"], "sha256": {k: v for k, v in _hashes(config).items() if k != CONFIG_NAME}}
    return hashlib.sha256(json.dumps({**config, "spikezoo": block}, sort_keys=True).encode()).hexdigest()


def read_config(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: architecture, model_args, recipe and results.

    Args:
        path: A folder with config.json, a weights file beside one, or a training state, which holds it itself.

    Returns:
        The config, {} where there is none.

    Raises:
        ValueError: Damaged, edited without its hash, or of an unknown version or format.
    """
    path = Path(path).expanduser()
    if not (path / CONFIG_NAME).is_file():
        path = find_weights(path)
        if is_state(path):
            return _check_types(load_state(path, "architecture", "model_args", "spikezoo"), path)
    beside = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers or nesting beyond measure
        raise ValueError(f"{beside} is not valid JSON: {error}. {hint(beside, 'It is damaged')}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{beside} holds a {type(config).__name__}: expected an object with architecture and model_args."
        )
    stored = config.get("sparsity_config", {})
    form = stored.get("format", "dense") if isinstance(stored, dict) else stored
    if form not in FORMATS:
        raise ValueError(
            f"{beside}: sparsity_config.format is {form!r}. {nearest(form, FORMATS)} Nothing was loaded; update "
            "spikezoo if the format is newer than this version."
        )
    if "spikezoo" not in config:
        if "sparsity_config" in config:  # only ever written together; without the block nothing vouches for the rest
            raise ValueError(f"{beside} has lost its 'spikezoo' block. {hint(beside, 'It is damaged')}")
        return _check_types(config, beside)
    block = config["spikezoo"]
    version = block.get("version", 0) if isinstance(block, dict) else None
    if version not in (0, CONFIG_VERSION):  # 0: written before the config had versions, and hashes
        raise ValueError(f"{beside} has format version {version!r}; this spikezoo reads {CONFIG_VERSION}. Update it.")
    if (version or "sha256" in block) and _hashes(config).get(CONFIG_NAME) != config_hash(config):
        raise ValueError(
            f"{beside} is not as it was written: it was damaged, or edited by hand. Fetch it again; to change how a "
            "model is made, load it, give other arguments, and spikezoo.save_checkpoint it."
        )
    return _check_types(config, beside)


def write_config(path: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Write a config with its version, the hash of the weights, and its own."""
    block = {**config["spikezoo"], "version": CONFIG_VERSION, "sha256": {WEIGHTS_NAME: file_hash(weights)}}
    whole = json.loads(json.dumps({**config, "spikezoo": block}))  # tuples become lists, as the reader will see them
    whole["spikezoo"]["sha256"][CONFIG_NAME] = config_hash(whole)
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
