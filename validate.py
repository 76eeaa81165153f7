#!/usr/bin/env python3
"""Validate spiking networks: ``spikezoo validate`` in a checkout, and with --ship TAG into the package."""

import sys

from tools.ship import main

if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
