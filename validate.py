#!/usr/bin/env python3
"""Validate spiking networks: ``spikezoo validate`` in a checkout, and with --ship TAG into the package."""

from spikezoo.flags import leave
from tools.ship import main

if __name__ == "__main__":
    leave(main)
