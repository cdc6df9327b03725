"""The entry point of `python -m logitless` and of the `logitless` script, which run without the packages of `train`."""

from __future__ import annotations


def main() -> None:
    """The command line, or what is left of it where a package is missing."""
    try:
        from logitless import cli
    except ModuleNotFoundError as error:
        from logitless import commands

        commands.main(error.name)
    else:
        cli.main()


if __name__ == "__main__":
    main()
