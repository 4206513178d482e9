"""What is checked before the first cell: a model that is nowhere is one line, offline and misspelt told apart."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from experiments.sweep.cells import Job

FROZEN = "sweep --dataset digits --method dinov2-logreg --shots 1,2 --seeds 0-4 --backbone"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A hub that answers every question about a repository with an error, and whose files are not cached."""

    def fail(error: Callable[[], Exception]) -> None:
        def answer(*_: object, **__: object) -> Any:
            raise error()

        def download(*_: object, local_files_only: bool = False, **__: object) -> Any:
            raise LocalEntryNotFoundError("not there") if local_files_only else error()

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return fail


def not_found() -> Exception:
    response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
    return RepositoryNotFoundError("404", response=response)


def test_a_backbone_that_cannot_be_fetched_is_one_line(
    tmp_path: Path, refused: Callable[..., str], ran: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(*FROZEN.split(), "vit_small_patch14_dinov2.lvd142m")
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in line
    assert "backbone vit_small_patch14_dinov2.lvd142m" in line
    assert "give a folder or a file of weights" in line
    assert (ran, [*tmp_path.iterdir()]) == ([], [])


@pytest.mark.parametrize(
    "words", [f"{FROZEN} hf-hub:o/misspelt", "sweep --dataset digits --shots 1 --model o/misspelt"]
)
def test_a_misspelt_name_is_told_apart(
    tmp_path: Path,
    refused: Callable[..., str],
    ran: list[Job],
    online: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    online(not_found)
    line = refused(*words.split())
    assert "the hub has no model o/misspelt, or it is private; check the name" in line
    assert (ran, [*tmp_path.iterdir()]) == ([], [])


def test_the_hosted_service_needs_a_key(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tinker.auth.tinker_has_credentials", lambda: False)
    line = refused("sweep", "--dataset", "digits", "--method", "vlm-lora", "--shots", "1", "--service", "tinker")
    assert "the service tinker needs a key; set TINKER_API_KEY" in line
