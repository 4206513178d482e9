"""The command line: `kshot` or `python -m kshot`."""

from experiments.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
