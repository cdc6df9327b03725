"""`python -m logitless`, and the `logitless` script: the command line, where its optional packages are installed."""

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
