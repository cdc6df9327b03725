"""The entry point of `python -m logitless` and of the `logitless` script. It names the package that is missing."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from logitless import cli
    except ModuleNotFoundError as error:
        sys.exit(f"the command line needs {error.name}: pip install 'logitless[train]'")
    cli.main()


if __name__ == "__main__":
    main()
