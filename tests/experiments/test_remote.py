"""A sweep whose model is behind a server: the same command with --service, the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
from trained import TINY

from experiments.sweep.cells import Job
from experiments.sweep.store import Results
from tests.vlm.serving import served

METHODS = ("vlm-zero-shot", "vlm-lora", "pixel-knn")


def test_a_sweep_on_a_server_says_what_one_in_this_process_says(
    photos: Path, tmp_path: Path, kshot: Any, ran: list[Job]
) -> None:
    methods = [argument for method in METHODS for argument in ("--method", method)]
    asked = ("sweep", "demo", "--dataset", f"folder:{photos}", *methods, "--shots", "1", "--seeds", "0", *TINY, "--out")
    with served(tmp_path / "state") as server:
        remote = kshot(*asked, tmp_path / "remote", "--service", server.address)
        assert remote.status == 0, remote.err
        assert server.state.steps.total() > 0
    local = kshot(*asked, tmp_path / "local")
    assert local.status == 0, local.err
    mine, theirs = (Results(tmp_path / where) for where in ("local", "remote"))
    assert [cell["key"] for cell in theirs.cells()] == [cell["key"] for cell in mine.cells()]
    for here, there in zip(mine.cells(), theirs.cells(), strict=True):
        assert here["metrics"].keys() == there["metrics"].keys()
        for name, value in here["metrics"].items():
            if value is not None:
                np.testing.assert_allclose(there["metrics"][name], value, atol=1e-4, err_msg=name)
