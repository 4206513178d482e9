"""The model card of an adapter: what it says, that it is the same every time, and that its code runs as it stands."""

import json
import re
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import yaml
from peft import PeftModel
from PIL import Image, ImageOps
from stored import CLASSES
from trained import TRAINING, train
from transformers import AutoModelForImageTextToText

from baselines import nano as nano_dinov2
from data.preparation import prepare
from experiments.adapters import folder as cards
from experiments.adapters.folder import Card, read_card
from kshot.checks import folder_of
from kshot.images import open_image
from tests.vlm.checkpoints import random_model, sharded
from tests.vlm.helpers import disturb, stock_logits
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt, template

ROOT = Path(__file__).parents[2]


def card(**changes: Any) -> Card:
    trained = {
        **{"dataset": "caltech101", "protocol": "recipe", "method": "vlm-lora", "shots": 1, "seed": 3},
        "settings": {"model": "Qwen/Qwen3-VL-2B-Instruct", "rank": 8, "limit_test": None, "model_revision": None},
        "data": {"source": "hub", "hub": "dpdl-benchmark/caltech101", "revision": "abc", "ignored": ["x"]},
        "versions": {"kshot": "0.1.0"},
    }
    fields: dict[str, Any] = {
        **{"classes": ("a|b", "`tick`", "<b>"), "prompt": "{image}What, `this`? => A {label}.", "max_side": 48},
        **{"base_model": "Qwen/Qwen3-VL-2B-Instruct", "trained": trained},
    }
    return Card(**{**fields, **changes})


def front(text: str) -> dict[str, Any]:
    """The front matter as any reader of YAML finds it."""
    _, head, _ = text.split("---\n", 2)
    fields: dict[str, Any] = yaml.safe_load(head)
    return fields


@pytest.fixture(scope="module")
def written(adapter: Path) -> str:
    return (adapter / "README.md").read_text(encoding="utf-8")


def test_the_front_matter_of_the_nano_models_adapter(written: str) -> None:
    assert front(written) == {
        **{"base_model": nano.NAME, "library_name": "peft", "pipeline_tag": "image-text-to-text"},
        **{"license": "apache-2.0", "metrics": ["accuracy"]},
        "tags": ["kshot", "lora", "few-shot", "image-classification"],
    }


def test_of_a_hubs_model_and_data_set_the_hub_ids_are_named_and_no_licence_is_made_up() -> None:
    fields = front(cards.readme(card(base_model="Qwen/Qwen3-VL-2B-Instruct@v1")))
    assert (fields["base_model"], fields["datasets"]) == ("Qwen/Qwen3-VL-2B-Instruct", ["dpdl-benchmark/caltech101"])
    assert "license" not in fields


@pytest.mark.parametrize(
    ("backbone", "hub_id"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("hf-hub:timm/vit_x.me", "timm/vit_x.me"),
        ("hf-hub:me/mine@v1", "me/mine"),
        ("/models/vit_x", None),
        (nano_dinov2.NAME, nano_dinov2.NAME),
    ],
)
def test_a_heads_backbone_has_the_name_that_the_hub_knows(backbone: str, hub_id: str | None) -> None:
    assert front(cards.readme(card(kind="head", base_model=backbone))).get("base_model") == hub_id


def test_the_card_says_what_the_record_says(written: str, adapter: Path, photos: Path) -> None:
    recorded = read_card(adapter)
    assert recorded is not None
    trained = recorded.trained
    parts = [
        *(f"`{nano.NAME}`, revision `{nano.REVISION}`", f"**Note.** {nano.NOTE}"),
        *(f"`folder:{photos.name}`".replace("|", "\\|"), f"protocol `{trained['protocol']}`"),
        *("2 labelled images of each class", "| shots | 2 per class |", "| seed | 0 |", "kshot predict IMAGE"),
        *(f"| {name} | " for name in trained["settings"]),
        *(f"| {name} | {version} |" for name, version in trained["versions"].items()),
    ]
    assert [part for part in parts if part not in written] == []
    assert all(f"`{name}`".replace("|", "\\|") in written for name in CLASSES)
    assert not re.search(r"\d+(\.\d+)? ?%", written)  # no accuracy, for none was measured
    assert str(photos.parent) not in written


def test_the_same_training_writes_the_same_bytes(written: str, photos: Path, tmp_path: Path) -> None:
    again = train(photos, tmp_path / "again")
    assert (again / "README.md").read_text(encoding="utf-8") == written


def test_a_base_model_in_a_folder_has_a_name_and_a_fingerprint_and_no_place(
    photos: Path, tmp_path: Path, kshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model card has no place; the records, which loading needs, have it in full, and an upload says so."""
    (tmp_path / "my model").mkdir()
    sharded(tmp_path / "my model")
    monkeypatch.chdir(tmp_path)
    options = ("--model", "my model", "--out", "a", "--push-to-hub", "o/x")
    ended = kshot("train", "--dataset", f"folder:{photos}", *TRAINING, *options)
    assert ended.status == 0, ended.err
    text, recorded = Path("a/README.md").read_text(encoding="utf-8"), read_card(Path("a"))
    assert recorded is not None
    settings = recorded.trained["settings"]
    assert "base_model" not in front(text)
    assert f"`my model`, a folder whose content has the fingerprint `{settings['model_revision']}`" in text
    assert "base = 'PATH/TO/my model'" in text
    assert str(tmp_path) not in text
    assert (recorded.base_folder, settings["model"]) == (tmp_path / "my model", "my model")
    assert json.loads(Path("a/kshot.json").read_text())["base_model"] == f"{tmp_path}/my model"
    first, *_, leaks, last = ended.out.splitlines()
    assert (first, last) == ("wrote a", "nothing was sent; this sends it: kshot push a o/x --yes")
    named = "adapter_config.json, classifier.json, kshot.json"
    assert leaks == f"the base model's folder on this machine is named in {named}"


def test_names_of_any_letters_keep_tables_and_code_whole() -> None:
    text = cards.readme(card())
    (row,) = (line for line in text.splitlines() if line.startswith("| classes"))
    assert row == "| classes | 3: `a\\|b`, `` `tick` ``, `<b>` (all are in `classifier.json`) |"
    assert "`` {image}What, `this`? ``, the answer `A {label}.`" in text
    assert "| limit_test | none |" in text
    assert "base model | `Qwen/Qwen3-VL-2B-Instruct`, the hub's newest revision at the time" in text
    assert "| data set: revision | `abc` |" in text


def test_of_many_classes_a_few_are_shown() -> None:
    text = cards.readme(card(classes=tuple(f"c{n}" for n in range(100))))
    assert "| classes | 100: `c0`, `c1`, `c2`, `c3`, `c4`, and 95 more (all" in text
    assert "`c5`" not in text


def code_of(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


def photograph(mode: str, width: int, height: int) -> Image.Image:
    """Smooth colours and sharp edges, of which the left part is see-through where the mode knows that."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 4), dtype=np.uint8), "RGBA")
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((10, 200, 30, 90), (0, 0, width // 4, height // 3))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "P":
        return image.quantize(32)  # a palette with transparent colours
    return image.convert(mode)


PICTURES = [  # mode, width, height, format, orientation
    *(("RGBA", 700, 300, "PNG", 6), ("LA", 60, 40, "PNG", 1), ("P", 500, 470, "PNG", 1), ("I;16", 600, 200, "PNG", 3)),
    *(
        ("RGB", 481, 333, "JPEG", 8),
        ("CMYK", 900, 600, "JPEG", 1),
        ("L", 100, 30, "JPEG", 5),
        ("RGB", 4000, 30, "PNG", 1),
    ),
    *(
        ("RGB", 4032, 3024, "JPEG", 6),
        ("L", 1930, 2111, "JPEG", 1),
        ("1", 300, 300, "PNG", 1),
        ("RGBA", 90, 90, "WEBP", 6),
    ),
]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: "-".join(map(str, p)))
def test_the_code_makes_the_pixels_that_kshot_shows(picture: tuple[str, int, int, str, int], tmp_path: Path) -> None:
    mode, width, height, format, orientation = picture
    exif, path = Image.Exif(), tmp_path / "image"
    exif[0x0112] = orientation
    photograph(mode, width, height).save(path, format, exif=exif)
    code = code_of(cards.readme(card(max_side=480))).partition("def fitted")
    lines = "".join(code[1:]).partition("inputs =")[0].replace('"IMAGE"', repr(str(path)))
    scope = {"np": np, "Image": Image, "ImageOps": ImageOps, "BytesIO": BytesIO}
    exec(lines, scope)  # noqa: S102 - the point of it
    expected = open_image(prepare(path.read_bytes(), max_side=480))
    np.testing.assert_array_equal(np.asarray(scope["image"]), np.asarray(expected))


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
@pytest.mark.parametrize(("kind", "tied"), [(kind, tied) for kind in ("dense", "sparse") for tied in (True, False)])
def test_merged_by_its_lines_the_model_is_the_unmerged_one(kind: str, tied: bool, tmp_path: Path) -> None:
    base = random_model(tmp_path / "base", kind, tied=tied)
    client = LocalServiceClient(tmp_path).create_lora_training_client(str(base), rank=4, seed=0).result()
    disturb(client)
    adapter = folder_of(tmp_path, client.save_weights_for_sampler("x").result().path)
    lines = code_of(cards.readme(card(base_model=str(base)))).partition("\ndef fitted")[0]
    scope = dict[str, Any]()
    exec(lines.replace(f"'PATH/TO/{base.name}'", repr(str(base))).replace('"DIR"', repr(str(adapter))), scope)  # noqa: S102
    stock = AutoModelForImageTextToText.from_pretrained(base).eval()
    rule, ids = ImageRule.from_pretrained(str(base)), tinker.ModelInput.from_ints([5, 6, 7, 8])
    expected = stock_logits(PeftModel.from_pretrained(stock, adapter), ids, rule)
    merged = scope["model"].merge_and_unload()
    assert (stock_logits(merged, ids, rule) - expected).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert (stock_logits(again, ids, rule) - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
def test_the_code_runs_and_writes_what_kshot_reads(
    written: str, adapter: Path, photos: Path, service: LocalServiceClient
) -> None:
    """With transformers and PEFT alone, on images as they are."""
    from vlm.classifier import generate

    recorded = read_card(adapter)
    assert recorded is not None
    sampler = service.create_sampling_client_from_folder(adapter).result()
    rule = ImageRule.from_pretrained(nano.NAME)
    prompt = Prompt(sampler.get_tokenizer(), rule, recorded.classes, template(recorded.prompt))
    for n, name in enumerate(CLASSES):
        path = photos / name / f"{n}.png"
        (answer,) = generate(sampler, [prepare(path.read_bytes(), max_side=recorded.max_side)], prompt, max_tokens=32)
        place = code_of(written).replace('"DIR"', repr(str(adapter))).replace('"IMAGE"', repr(str(path)))
        with redirect_stdout(StringIO()) as printed:
            exec(compile(place, "README.md", "exec"), {})  # noqa: S102 - the point of the test
        assert printed.getvalue().strip() == answer.partition("\n")[0].strip()
        assert printed.getvalue().strip()


def test_the_card_says_what_a_bare_merge_does(written: str) -> None:
    (text,) = re.findall(r"\*\*Merging\.\*\*.*?\n\n", written, re.DOTALL)
    for part in (
        "bare `merge_and_unload()` changes the embeddings",
        "kshot export DIR --merged OUT",
        "train_unembed=False",
    ):
        assert part in text
