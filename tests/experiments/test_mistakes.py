"""What new users get wrong: each mistake is one line that names the way out, status 2, and nothing is written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.sweep.cells import Job

MISTAKES = [  # what is typed, and what the line must say
    ("swep", ["no command 'swep'", "did you mean sweep?", "(see kshot --help)"]),
    ("run demo", ["no command 'run'", "(see kshot --help)"]),
    ("bench trian", ["no command 'trian'", "did you mean train?", "(see kshot bench --help)"]),
    ("data download icons", ["no command 'download'", "(see kshot data --help)"]),
    ("sweep blogg", ["unknown preset 'blogg' (did you mean 'blog'?)", "FILE.yaml"]),
    ("sweep icons", ["unknown preset 'icons'", "--dataset icons"]),
    ("sweep /tmp", ["unknown preset '/tmp'", "--dataset /tmp"]),
    ("sweep --datset icons", ["no option --datset", "did you mean --dataset?", "(see kshot sweep --help)"]),
    ("sweep --data icons", ["no option --data", "did you mean --dataset?"]),
    ("sweep --lr 1e-4", ["no option --lr", "did you mean --set learning_rate=VALUE?"]),
    ("sweep --epochs 3", ["no option --epochs", "did you mean --set views_per_class=VALUE?"]),
    ("sweep --batch-size 8", ["no option --batch-size", "did you mean --set batch_size=VALUE?"]),
    ("sweep --output-dir x", ["no option --output-dir", "did you mean --out?"]),
    ("train --dataset icons --shots 1 --out x --gpu", ["no option --gpu", "did you mean --device cuda?"]),
    ("sweep --set lr=1e-4", ["unknown setting 'lr' (did you mean 'learning_rate'?)"]),
    ("sweep --set learning_rate:1e-4", ["has no value; write it as KEY=VALUE"]),
    ("sweep --set learning_rate=fast", ["settings.learning_rate = 'fast'", "valid number"]),
    ("sweep --model 2b", ["unknown model '2b' (did you mean '2B'?)"]),
    ("sweep --model ./qwen3", ["unknown model './qwen3' (there is no such folder)", "a folder with config.json"]),
    ("sweep --model qwen3-vl-2b", ["unknown model 'qwen3-vl-2b'", "2B", "a hub id such as"]),
    ("sweep --device gpu", ["device 'gpu' is not available here (did you mean 'cuda'?)"]),
    ("sweep --device cuda", ["device 'cuda' is not available here: torch sees no GPU; use --device cpu"]),
    ("sweep --seeds 0..2", ["--seeds '0..2' is not a list of whole numbers; write it as 1,2,4 or as 0-2"]),
    ("sweep --shots 16-1", ["--shots '16-1' is not a list of whole numbers"]),
    ("sweep --method lora", ["unknown method 'lora' (did you mean 'vlm-lora'?)"]),
    ("sweep --method VLM-LoRA", ["unknown method 'VLM-LoRA' (did you mean 'vlm-lora'?)"]),
    ("sweep --dataset caltech-101", ["unknown data set 'caltech-101' (did you mean 'caltech101'?)"]),
    ("sweep --dataset ./nowhere", ["nowhere is not a folder"]),
    ("sweep --dataset imagenet", ["unknown data set 'imagenet'", "folder:PATH", "hub:ID"]),
    ("sweep --dataset digits --shots 500", ["shots", "500", "--allow-fewer"]),
    ("sweep --workers two", ["'--workers'", "(see kshot sweep --help)"]),
    ("train --dataset icons --out x", ["'--shots'", "(see kshot train --help)"]),
    ("train --dataset icons --shots 1,2 --out x", ["'--shots'", "(see kshot train --help)"]),
    ("train --dataset icons --shots 1 --method pixel-knn --out x", ["pixel-knn", "vlm-lora"]),
    ("predict", ["IMAGE", "(see kshot predict --help)"]),
    ("predict cat.jpg", ["--adapter", "--class"]),
    ("predict cat.jpg --adapter nowhere", ["nowhere"]),
    ("export nowhere", ["--merged", "--peft", "--vllm"]),
    ("report nowhere", ["nowhere is no results folder", "kshot sweep"]),
    ("serve --modell x", ["no option --modell", "did you mean --model?", "(see kshot serve --help)"]),
    ("serve --keep forever", ["forever", "30d"]),
    ("serve --shared", ["--shared is for the keys of --api-key-file"]),
    ("sweep --plan --gpu h1000", ["unknown GPU 'h1000' (did you mean 'h100'?)", "l4"]),
    ("sweep --gpu h100", ["--gpu is for --plan"]),
    ("sweep --plan --count 2", ["--count is for --gpu"]),
]


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(("command", "parts"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_way_out(
    tmp_path: Path,
    refused: Callable[..., str],
    ran: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*command.split(), parts=parts)
    assert (ran, [*tmp_path.iterdir()]) == ([], [])


def test_there_are_thirty() -> None:
    assert len(MISTAKES) >= 30
