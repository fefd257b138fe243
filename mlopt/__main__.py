"""``python -m mlopt``: see `mlopt.cli`."""

import sys

from mlopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
