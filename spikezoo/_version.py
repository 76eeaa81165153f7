"""The version, in a file that imports nothing, so that building the package needs no torch."""

__version__ = "0.2.0"
