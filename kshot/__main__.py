"""The command line: `kshot` or `python -m kshot`."""

import sys
from importlib import import_module

from kshot.checks import check_packages
from kshot.errors import InputError


def main() -> None:
    """Entry point of the console script."""
    try:
        check_packages()
    except InputError as error:
        print(f"kshot: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    import_module("experiments.cli.main").main()


if __name__ == "__main__":
    main()
