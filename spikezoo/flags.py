"""The flags that several commands share, each declared once, and a parser whose errors are one line."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ParseKwargs

from spikezoo.checks import nearest

__all__ = ["KeyValue", "Parser", "Switch", "add_flags", "choose_device", "import_files", "leave", "whole_flags"]

# --amp, and --no-amp where a config has it: the command line wins.
Switch = argparse.BooleanOptionalAction


class KeyValue(ParseKwargs):
    """timm's K=V pairs, with true and false as YAML has them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the pairs as a dict."""
        pairs = values or ()
        keys = [value.partition("=")[0] for value in pairs]
        for key, value in zip(keys, pairs, strict=True):
            if not key or key == value:
                parser.error(f"argument {option_string}: {value!r}, expected NAME=VALUE")
            if keys.count(key) > 1:
                parser.error(f"argument {option_string}: {key!r} is there twice")
        spelled = [re.sub("=(true|false)$", lambda found: found[0].title(), value) for value in pairs]
        super().__call__(parser, namespace, spelled, option_string)


class Parser(argparse.ArgumentParser):
    """A parser of one command, whose errors are one line; of an unknown flag it names the nearest.

    Args:
        prog: The command as it is typed, ``spikezoo count``.
        description: What it does: the docstring of its file.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument(
            "--import",
            dest="imports",
            action="append",
            metavar="FILE",
            help="run a Python file of yours first, which registers models or transforms; again for more",
        )

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse; the result's ``command`` is the line that was typed."""
        argv = sys.argv[1:] if args is None else list(args)
        found, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"{flag!r} is one word too many, or belongs to a flag.")
            flags = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"unknown flag {flag}. {nearest(flag, flags)}")
        found.command = shlex.join([*self.prog.split(), *argv])
        return found

    def error(self, message: str) -> NoReturn:
        """Leave with one line, without the usage of dozens of flags."""
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: {message}{end} See {self.prog} --help.\n")


_Flags = argparse.ArgumentParser | argparse._ArgumentGroup

# name -> its further spellings and what argparse is told of it.
_SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "checkpoint": ((), {"metavar": "FILE_OR_DIR", "help": "weights, or a folder that training wrote"}),
    "T": ((), {"type": int, "help": "time steps (default: the checkpoint's, else the model's)"}),
    "mpbn": ((), {"help": "membrane normalisation: channel, element or none (default: as T)"}),
    "neuron": ((), {"help": "lif, if, plif, or the twins relu and sign (default: as T)"}),
    "num-classes": ((), {"type": int, "help": "(default: the dataset's)"}),
    "in-chans": ((), {"type": int, "help": "(default: the dataset's)"}),
    "img-size": ((), {"type": int, "help": "(default: the dataset's)"}),
    "model-kwargs": (
        (),
        {
            "nargs": "*",
            "default": {},
            "action": KeyValue,
            "metavar": "K=V",
            "help": "further arguments of create_model: decay=0.5 surrogate=triangle ...",
        },
    ),
    "dataset": ((), {"help": "(default: the checkpoint's, else what fits the model's input)"}),
    "data-dir": ((), {"metavar": "DIR", "help": "folder of the dataset (default: $SPIKEZOO_DATA or ./data)"}),
    "dataset-download": ((), {"action": Switch, "default": True}),
    "split": ((), {"default": "test", "help": "(default: %(default)s)"}),
    "mean": (
        (),
        {
            "type": float,
            "nargs": "+",
            "metavar": "X",
            "help": "of the channels, for the normalisation: one number or one a channel (default: what the weights "
            "were trained with, else the dataset's); --mean 0 --std 1 leaves the pixels in [0, 1]",
        },
    ),
    "std": ((), {"type": float, "nargs": "+", "metavar": "X", "help": "likewise"}),
    "crop-pct": (
        (),
        {
            "type": float,
            "metavar": "X",
            "help": "part of an image file that is evaluated (default: the model's)",
        },
    ),
    "interpolation": ((), {"help": "of its resizing: bicubic, bilinear ... (default: the model's)"}),
    "frames-by": ((), {"help": "of event recordings, which become T frames: number (of events), time or duration"}),
    "duration-us": ((), {"type": int, "metavar": "US", "help": "length of a frame, for --frames-by duration"}),
    "batch-size": (
        ("-b",),
        {"type": int, "default": 128, "metavar": "N", "help": "images computed at once (default: %(default)s)"},
    ),
    "workers": (
        ("-j",),
        {"type": int, "default": 2, "metavar": "N", "help": "loader processes; small sets are held in memory"},
    ),
    "images": ((), {"type": int, "metavar": "N", "help": "the first so many (default: %(default)s)"}),
    "amp": ((), {"action": Switch, "default": False, "help": "mixed precision"}),
    "amp-dtype": ((), {"default": "bfloat16", "choices": ("bfloat16", "float16")}),
    "channels-last": ((), {"action": Switch, "default": False}),
    "torchcompile": ((), {"action": Switch, "default": False, "help": "compile the whole model"}),
    "seed": ((), {"type": int, "default": 42, "help": "of random weights and noise (default: %(default)s)"}),
    "device": ((), {"help": "cpu, cuda, cuda:1 (default: cuda where there is one)"}),
    "plot": ((), {"metavar": "FILE", "help": "picture to write: .png, .pdf or .svg"}),
}


def add_flags(parser: _Flags, *names: str, **changes: Any) -> None:
    """Add shared flags to a command.

    Args:
        parser: The command's parser, or a group of it.
        *names: Flags without their dashes.
        **changes: What this command says differently of all of them, such as ``default`` and ``help``.
    """
    for name in names:
        spelled, told = _SHARED[name]
        parser.add_argument(*spelled, f"--{name}", **{**told, **changes})


def choose_device(name: str | None) -> torch.device:
    """Device of ``--device``, where none is given the GPU where there is one.

    Raises:
        ValueError: A device that is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}. Use --device cpu.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available here. Use --device cpu.")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()}, cuda:0 and so on.")
    return device


def whole_flags(args: argparse.Namespace, *names: str) -> None:
    """Check that flags which were given are at least 1.

    Raises:
        ValueError: One is not; the message names it.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected an integer >= 1.")


def import_files(argv: Sequence[str]) -> None:
    """Run the Python files of ``--import``, each once, as modules of their names.

    Args:
        argv: Words of a command line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file of a name that a module has.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--import", dest="imports", action="append", default=[])
    for name in own.parse_known_args(argv)[0].imports:
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"--import {name}: no such file.")
        loaded = sys.modules.get(path.stem)
        if loaded is not None and getattr(loaded, "__file__", None) == str(path):
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if loaded is not None or not path.stem.isidentifier() or spec is None or spec.loader is None:
            raise ValueError(f"--import {name}: {path.stem!r} is a module already, or no name of one. Rename the file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # registries look a class's module up by its name
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise


def leave(main: Callable[[], int]) -> NoReturn:
    """End this process as a command does: with its exit code, of a user's mistake with one line and 1.

    Args:
        main: Does the work and returns the exit code.
    """
    try:
        code = main()
        sys.exit(code if code in (130, 143) else min(code, 100))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
