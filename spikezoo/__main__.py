"""``python -m spikezoo``: the command ``spikezoo``, where it is not on the path."""

import sys

from spikezoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
