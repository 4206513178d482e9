"""kshot for Python programs: `kshot.connect`, `kshot.sweep`, `kshot.Results` and the errors.

    service = kshot.connect("local")                           the training API: see vlm.service.connect
    results = kshot.sweep("demo", shots=[1, 4], seeds=[0])     a sweep, as `kshot sweep` runs it
    kshot.Results("runs/demo").frame()                         a table (pandas), a row a cell

All but the errors is imported at its first use, so that `import kshot` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kshot.checks import check_packages
from kshot.errors import (
    BusyError,
    DatasetError,
    DeniedError,
    ImageError,
    InputError,
    KshotError,
    LostError,
    MissingError,
    ModelError,
    PromptError,
    RequestError,
    ResultsError,
    TooFewImagesError,
    TooLargeError,
    UnauthorizedError,
    UnknownNameError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from experiments.sweep import sweep
    from experiments.sweep.store import Results
    from vlm.service import connect

_AT_FIRST_USE = {"connect": "vlm.service", "Results": "experiments.sweep.store", "sweep": "experiments.sweep"}

__all__ = [
    "BusyError",
    "DatasetError",
    "DeniedError",
    "ImageError",
    "InputError",
    "KshotError",
    "LostError",
    "MissingError",
    "ModelError",
    "PromptError",
    "RequestError",
    "Results",
    "ResultsError",
    "TooFewImagesError",
    "TooLargeError",
    "UnauthorizedError",
    "UnknownNameError",
    "UnsupportedError",
    "connect",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module 'kshot' has no attribute {name!r}")
    check_packages()
    return getattr(import_module(_AT_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
