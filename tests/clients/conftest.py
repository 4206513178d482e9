"""`kshot serve` on the nano model, started with the interpreter that KSHOT_PYTHON names: see `make test-clients`."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MODEL = "kshot/nano-qwen3-vl"
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before the libraries read them


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the server listens."""
    state = tmp_path_factory.mktemp("state")
    start = [os.environ["KSHOT_PYTHON"], "-m", "kshot", "serve", "--model", MODEL, "--port", "0", "--state", str(state)]
    place = Path(__file__).parents[2]
    with subprocess.Popen(start, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            line = process.stdout.readline()  # type: ignore[union-attr]
            found = re.search(r"at (http://\S+)", line)
            assert found, line + process.stdout.read()  # type: ignore[union-attr]
            yield found[1]
        finally:
            process.kill()


@pytest.fixture(scope="session")
def base(address: str) -> str:
    """What OpenAI's clients call the base URL."""
    return f"{address}/v1"
