"""Sweeps of models that have no row of their own."""

from pathlib import Path

import pytest
from trained import TINY

from tests.vlm.checkpoints import copied, seeing_model, text_model, with_config


@pytest.mark.slow
def test_a_sweep_of_a_qwen3_5_from_end_to_end(kshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-qwen3.5").mkdir()
    seeing_model(tmp_path / "tiny-qwen3.5", "qwen3_5")
    monkeypatch.chdir(tmp_path)
    methods = [word for name in ("vlm-zero-shot", "vlm-lora", "vlm-vision-linear") for word in ("--method", name)]
    few = ("--limit-test", "12", "--seeds", "0,1", *TINY, "--workers", "1", "--out", "out")
    ended = kshot("sweep", "--dataset", "icons", "--model", "./tiny-qwen3.5", "--shots", "1,4", *methods, *few)
    assert ended.status == 0, ended.err
    report = Path("out/report.md").read_text()
    assert "tiny-qwen3.5" in report
    assert "vlm-lora" in report
    assert len([*Path("out/cells").iterdir()]) == 1 + 2 * 2 * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, "needs its own code (auto_map)"),
        ({"model_type": "gpt_oss"}, "on which LoRA cannot sit"),
    ],
)
def test_what_cannot_be_run_is_status_2(refused, tmp_path: Path, change: dict[str, object], words: str) -> None:
    (tmp_path / "m").mkdir()
    folder = copied(text_model(tmp_path / "m", "deepseek_v3"), tmp_path)
    with_config(folder, **change)
    refused("serve", "--model", folder, parts=[words, str(folder)])
