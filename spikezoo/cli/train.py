"""Train a spiking network after a YAML config and flags, or work through a plan of such runs."""

from __future__ import annotations

from spikezoo.train import main

__all__ = ["main"]
