"""For every test: a cache of its own, one thread, no progress bars, so that nothing depends on the machine."""

import gc
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from experiments.sweep.cells import Job

collect_ignore = ["clients"]  # they run in an environment of their own: make test-clients

# before the hub's library is imported: its cache is empty, as on a new machine, and offline nothing is put there
os.environ["HF_HUB_CACHE"] = str(Path(tempfile.gettempdir()) / f"no-hub-cache-{os.getpid()}")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")

# Files that take longest, most of them by starting processes: first, so that no core waits for one of them at the end.
LONG = (
    "test_sweep test_server_fuzz test_server_restart test_cli test_executors test_cli_serve test_server_load "
    "test_bench_overheads test_bench_train test_bench_score test_hub test_loading_hub test_server_end "
    "test_cli_predict test_estimate_features test_compare"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """xdist hands files out in this order (--no-loadscope-reorder)."""
    order = LONG.split()
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder of this session: icons are drawn and nano models written once."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_CACHE", str(path))
        yield path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def _no_sdk_client_stays() -> Iterator[None]:
    """The SDK's clients send heartbeats until they are closed, also to a server that is gone. Their native threads
    would go on in other files' tests, where tracemalloc of Python 3.11 crashes by them (python/cpython#128679)."""
    yield
    if (sdk := sys.modules.get("tinker.lib.internal_client_holder")) is not None:
        for each in gc.get_objects():
            if type(each) is sdk.InternalClientHolder:
                each.close()
        sdk.sessionless_holder_cache._holders.clear()  # or a later server at the same port would be asked by these


@pytest.fixture(scope="session", autouse=True)
def _no_gpu_is_chosen() -> Iterator[None]:
    """A sweep of one's own images is on the CPU unless a test asks for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.sweep.choice._has_gpu", lambda: False)
        yield


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    def make(seed: int, width: int = 64, height: int = 64, format: str = "PNG") -> bytes:
        """An encoded image of smooth random colours."""
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, format)
        return stream.getvalue()

    return make


class Ended(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def kshot(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The console script, run in this process."""
    from tests.experiments.trained import status_of

    def run(*words: object) -> Ended:
        capsys.readouterr()
        return Ended(status_of(*words), *capsys.readouterr())

    return run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> "list[Job]":
    """Cells run in this process, without workers, each of which would import everything anew; the list of them. Figures
    are not drawn, which takes longer than small cells."""
    from matplotlib.figure import Figure

    from tests.experiments.trained import in_this_process

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    return in_this_process(monkeypatch)
