"""The command line: ``python -m mlopt explain script.py`` and ``python -m mlopt doctor``.

`main.py` reads the arguments; each command is a file. It uses the public names of mlopt and adds none.
"""

from mlopt.cli.main import main

__all__ = ["main"]
