"""Features that are kept: on disk for a later process that would compute the same bits, and for no other."""

import copy
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tinker import types

from kshot.errors import ModelError
from vlm.inputs import ImageRule
from vlm.local import features, vision
from vlm.local.features import DiskCache, fingerprint
from vlm.local.model.tower import ImageFeatures
from vlm.local.vision import Vision, memory_limit

KEYS = [f"{n:02x}" * 32 for n in range(8)]


def layers(seed: int = 0) -> ImageFeatures:
    return ImageFeatures((1, 4, 4), torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(seed)))


def cache(folder: Path, limit: int = 1 << 20) -> DiskCache:
    return DiskCache(folder, lambda: "f" * 32, limit)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_process_runs_the_tower_zero_times(
    tmp_path: Path, model: Any, chunks: list[types.ImageChunk], dtype: torch.dtype
) -> None:
    model.stock = copy.deepcopy(model.stock).to(dtype)
    expected = Vision(model, disk=tmp_path).features(chunks)
    later = Vision(model, disk=tmp_path, threads=1)
    later.prefetch(chunks)
    assert not later._pixels._started  # what the folder has is not decoded
    found = later.features(chunks)
    assert later.forwards == 0
    for one, other in zip(found, expected, strict=True):
        assert one.values.dtype == dtype
        assert one.grid == other.grid
        assert torch.equal(one.values, other.values)
    assert later.features(chunks)[0].values.data_ptr() == found[0].values.data_ptr()  # from memory by now


def test_files_are_named_by_what_their_content_depends_on(
    tmp_path: Path, model: Any, chunks: list[types.ImageChunk]
) -> None:
    Vision(model, disk=tmp_path).features(chunks[:1])
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    folder, start, name = file.relative_to(tmp_path).parts
    assert folder == fingerprint(model.stock.model.visual, model.rule.processor)
    assert name.startswith(start)
    assert name.endswith(".safetensors")


def test_the_fingerprint_is_of_everything_that_features_depend_on(
    stock: Any, rule: ImageRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual, processor = stock.model.visual, rule.processor
    seen = [fingerprint(visual, processor)]
    assert fingerprint(copy.deepcopy(visual), copy.deepcopy(processor)) == seen[0]
    nudged, turned = copy.deepcopy(visual), copy.deepcopy(visual)
    with torch.no_grad():
        nudged.blocks[3].mlp.linear_fc2.bias[5] += 1e-6
    turned.config.rope_parameters["rope_theta"] = 5000.0
    seen += [fingerprint(other, processor) for other in (nudged, turned, copy.deepcopy(visual).bfloat16())]
    for field, value in {
        "size": {"shortest_edge": 4096, "longest_edge": 8192},
        "image_mean": (0.5, 0.5, 0.4),
        "image_std": (0.5, 0.5, 0.4),
        "resample": 2,
        "rescale_factor": 1 / 256,
        "do_normalize": False,
        "patch_size": 16,
        "merge_size": 1,
    }.items():
        other = copy.deepcopy(processor)
        setattr(other, field, value)
        seen.append(fingerprint(visual, other))
    monkeypatch.setattr(features, "FORMAT", 2)
    seen.append(fingerprint(visual, processor))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, model: Any, chunks: list[types.ImageChunk], damage: str) -> None:
    expected = Vision(model, disk=tmp_path).features(chunks[:1])[0]
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    whole = file.read_bytes()
    changed = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    file.write_bytes({"empty": b"", "cut": whole[:-9], "changed": changed, "foreign": b"\x80\x04pickle" * 9}[damage])
    later = Vision(model, disk=tmp_path)
    assert torch.equal(later.features(chunks[:1])[0].values, expected.values)
    assert later.forwards == 1
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path, model: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"feature cache folder .*file.inner cannot be written \(Not a directory\)"):
        Vision(model, disk=tmp_path / "file" / "inner")


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "write_file", full)
    with pytest.warns(UserWarning, match=r"image features are not kept in .*: No space left on device"):
        cache(tmp_path).put(KEYS[0], layers())


def test_the_least_recently_used_files_go_first(tmp_path: Path) -> None:
    first = cache(tmp_path)
    for age, key in zip((50, 40, 30, 20), KEYS, strict=False):
        first.put(key, layers())
        os.utime(first.path(key), (time.time() - age,) * 2)
    size = first.path(KEYS[0]).stat().st_size
    other = cache(tmp_path, limit=4 * size + size // 2)  # another process: sees what the first one wrote
    assert other.get(KEYS[0]) is not None
    other.put(KEYS[4], layers())
    assert [key in other for key in KEYS[:5]] == [True, False, True, True, True]
    assert first.get(KEYS[1]) is None
    for key in KEYS:
        other.put(key, layers())
        assert len(names(tmp_path)) <= 4


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / ("e" * 32) / "00"
    folder.mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))
    (folder / "weights.safetensors").write_bytes(bytes(5000))
    old, new, done = (folder / f"{start * 64}.safetensors{end}" for start, end in (("0", ""), ("1", ""), ("2", "")))
    old, new = (path.with_name(f".{path.name}.{'a' * 12}.tmp") for path in (old, new))
    for path in (old, new, done):
        path.write_bytes(bytes(5000))
    os.utime(old, (time.time() - 4000,) * 2)  # of a process that was killed
    os.utime(done, (time.time() - 4000,) * 2)
    tight = cache(tmp_path, limit=10000)
    tight.put(KEYS[0], layers())
    assert names(tmp_path) == {"model.safetensors", "weights.safetensors", new.name, tight.path(KEYS[0]).name}


def test_the_memory_limit_is_a_part_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 << 30))
    monkeypatch.setattr(vision, "group_free_bytes", lambda: float("inf"))
    assert memory_limit() == 2 << 30
    monkeypatch.setattr(vision, "group_free_bytes", lambda: 4 << 30)
    assert memory_limit() == 1 << 30
    monkeypatch.setattr(vision.psutil, "virtual_memory", lambda: SimpleNamespace(total=1 << 40))
    monkeypatch.setattr(vision, "group_free_bytes", lambda: float("inf"))
    assert memory_limit() == 16 << 30
