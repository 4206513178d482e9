"""The command line: `kshot` or `python -m kshot`."""

import sys

from kshot.checks import check_packages
from kshot.errors import InputError


def main() -> None:
    """Entry point of the console script."""
    try:
        check_packages()
    except InputError as error:
        print(f"kshot: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    from experiments.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
