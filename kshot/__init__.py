"""kshot for Python programs: `kshot.connect`, `kshot.sweep`, `kshot.Results` and the errors.

    service = kshot.connect("local")                           the training API: see vlm.service.connect
    results = kshot.sweep("demo", shots=[1, 4], seeds=[0])     a sweep, as `kshot sweep` runs it
    kshot.Results("runs/demo").frame()                         a table (pandas), a row a cell

All but the errors is imported at its first use, so that `import kshot` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kshot.checks import check_packages
from kshot.errors import BusyError as BusyError
from kshot.errors import DatasetError as DatasetError
from kshot.errors import DeniedError as DeniedError
from kshot.errors import EngineLostError as EngineLostError
from kshot.errors import ImageError as ImageError
from kshot.errors import InputError as InputError
from kshot.errors import KshotError as KshotError
from kshot.errors import LostError as LostError
from kshot.errors import MissingError as MissingError
from kshot.errors import ModelError as ModelError
from kshot.errors import NotFiniteError as NotFiniteError
from kshot.errors import PromptError as PromptError
from kshot.errors import RequestError as RequestError
from kshot.errors import ResultsError as ResultsError
from kshot.errors import TooFewImagesError as TooFewImagesError
from kshot.errors import TooLargeError as TooLargeError
from kshot.errors import UnauthorizedError as UnauthorizedError
from kshot.errors import UnknownNameError as UnknownNameError
from kshot.errors import UnsupportedError as UnsupportedError

if TYPE_CHECKING:
    from experiments.sweep import sweep as sweep
    from experiments.sweep.store import Results as Results
    from vlm.service import connect as connect

_AT_FIRST_USE = {"connect": "vlm.service", "Results": "experiments.sweep.store", "sweep": "experiments.sweep"}

__all__ = sorted([*_AT_FIRST_USE, *(name for name in globals() if name.endswith("Error"))])


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module 'kshot' has no attribute {name!r}")
    check_packages()
    return getattr(import_module(_AT_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return __all__
