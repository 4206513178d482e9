"""Reads image classification sets of the Hugging Face hub: which files hold a split, their download, their items.

`datasets` resolves how a set is laid out and stored, `huggingface_hub` downloads and caches. `datasets` is given empty
placeholders for a set's files beside its real card: so only the files of the requested splits are downloaded, and the
cache alone is enough. No code of a set is run.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from data.dataset import Item, content_key
from kshot.errors import DatasetError, KshotError, UnknownNameError
from kshot.hub import access_problem, is_unreachable, one_line, translated, unreachable_reason, with_retries

CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # what a set says of its layout and its columns
FORMATS = ("parquet", "arrow", "imagefolder")  # those that can hold images with class labels
UNREAD = (".py", ".zip")  # `datasets` gives up at code, and takes wrong labels for zipped folders (5.2.0)
MANY, DOWNLOADS = 16, 8  # more files than this are small ones, downloaded so many at a time


@dataclass(frozen=True)
class HubSet:
    """A set as the hub has it.

    revision: the commit, 40 hex digits. classes: the names of its label column, label → name.
    items: each row once, by split and in the set's order, with path "<split>/<row>"; read from disk as they are
    needed. Raises DatasetError for a row without an image or a label.
    """

    revision: str
    items: Iterator[Item]
    classes: tuple[str, ...]


class Columns(NamedTuple):
    """The names of the two columns that are read, and the classes of the second."""

    image: str
    label: str
    classes: tuple[str, ...]


def read(hub_id: str, revision: str | None = None, splits: Sequence[str] | None = None) -> HubSet:
    """The set OWNER/NAME at a branch, tag or commit (None: main), with the splits named (None or none: all it has).

    What is not in the hub's cache (HF_HOME) is downloaded before this returns; without a network, or with
    HF_HUB_OFFLINE=1, the cache must have it: a branch then is the commit it was when it was last read. Nothing is left
    to close.
    Raises DatasetError for a set that is not there, not open to this user or not of images with class labels,
    UnknownNameError for a split it does not have, KshotError where the hub cannot be reached.
    """
    with translated(partial(_explained, hub_id, revision)):
        snapshot = _snapshot(hub_id, revision)
        builder, files = _layout(hub_id, snapshot)
        for split in splits or ():
            if split not in files:
                raise UnknownNameError(f"split of {hub_id}", split, files)
        wanted = {split: files[split] for split in splits or files}
        _download(hub_id, snapshot.name, list(chain(*wanted.values())))
        builder.config.data_files = {split: [str(snapshot / name) for name in wanted[split]] for split in wanted}
        columns = _columns(hub_id, next(iter(builder.as_streaming_dataset().values())).features)
        return HubSet(snapshot.name, _items(hub_id, snapshot, builder, columns), columns.classes)


def _snapshot(hub_id: str, revision: str | None) -> Path:
    """The set's folder in the hub's cache, called after the commit; brings its cards and the list of its files."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=list(CARDS)))


def _layout(hub_id: str, snapshot: Path) -> tuple[Any, dict[str, list[str]]]:
    """The builder that `datasets` takes for the set, and the names of each split's files in it."""
    from datasets import load_dataset_builder
    from huggingface_hub import get_cached_repo_tree

    tree = get_cached_repo_tree(hub_id, repo_type="dataset", revision=snapshot.name)
    with TemporaryDirectory() as temporary:
        home = Path(temporary).resolve() / "set"
        _write_placeholders(home, snapshot, [file.path for file in tree])
        builder = load_dataset_builder(str(home), cache_dir=temporary)
        if builder.name not in FORMATS:
            raise DatasetError(f"{hub_id} is stored as {builder.name}; use a set stored as {', '.join(FORMATS)}")
        files = builder.config.data_files.items()
        return builder, {str(split): [_name_within(hub_id, home, file) for file in names] for split, names in files}


def _write_placeholders(home: Path, snapshot: Path, names: Sequence[str]) -> None:
    """Fill home with an empty file for each name and with the cards. Code and archives, which need reading, are left
    out."""
    home.mkdir()
    for name in names:
        if PurePosixPath(name).suffix in UNREAD or ".." in PurePosixPath(name).parts:
            continue
        path = home / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in CARDS:
            shutil.copyfile(snapshot / name, path)
        else:
            path.touch()


def _name_within(hub_id: str, home: Path, file: str) -> str:
    """The name of one of the set's files. A card may name any place on this machine or elsewhere: that is refused."""
    if not Path(file).is_relative_to(home) or ".." in Path(file).parts:
        raise DatasetError(f"the card of {hub_id} names {file!r}, which is none of its files; use another revision")
    return Path(file).relative_to(home).as_posix()


def _download(hub_id: str, commit: str, names: Sequence[str]) -> None:
    if len(names) <= MANY:  # in this thread, where an interrupt is heard at once
        for name in names:
            _download_file(hub_id, commit, name)
        return
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        downloads = [pool.submit(_download_file, hub_id, commit, name) for name in names]
        try:
            for download in downloads:
                download.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after the first that fails


def _download_file(hub_id: str, commit: str, name: str) -> None:
    """One file into the cache, unless it is there: no request is made then."""
    from huggingface_hub import hf_hub_download

    with_retries(hf_hub_download, hub_id, name, repo_type="dataset", revision=commit)


def _columns(hub_id: str, features: Mapping[str, Any]) -> Columns:
    from datasets import ClassLabel, Image

    image, label = _one_of(features, Image, "image"), _one_of(features, ClassLabel, "label")
    if image is None or label is None:
        columns = ", ".join(f"{name} ({_type_of(feature)})" for name, feature in features.items())
        way_out = "use a set that has them, or save its images as PATH/<class>/<image> and give folder:PATH"
        raise DatasetError(f"{hub_id} has the columns {columns}, not one Image and one ClassLabel; {way_out}")
    return Columns(image, label, tuple(features[label].names))


def _one_of(features: Mapping[str, Any], kind: type, usual: str) -> str | None:
    """The one column of that kind; of several (a mask, a species) the one of the usual name."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    return names[0] if len(names) == 1 else next((name for name in names if name == usual), None)


def _type_of(feature: object) -> str:
    from datasets import Value

    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _items(hub_id: str, snapshot: Path, builder: Any, columns: Columns) -> Iterator[Item]:
    from datasets import Image
    from pyarrow.dataset import ParquetFragmentScanOptions

    with translated(partial(_explained, hub_id, snapshot.name)):
        if builder.name == "parquet":
            builder.config.columns = [columns.image, columns.label]  # others are not even read
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)  # else whole files are
        for split, rows in builder.as_streaming_dataset().items():
            for n, row in enumerate(rows.cast_column(columns.image, Image(decode=False))):
                image, label = _image(hub_id, row[columns.image], snapshot), row[columns.label]
                if not image or label is None or not 0 <= label < len(columns.classes):
                    what = "label of its classes" if image else "image"
                    raise DatasetError(f"{hub_id} has no {what} in row {n} of split {split!r}; use another revision")
                yield Item(f"{split}/{n}", str(split), columns.classes[label], image, content_key(image))


def _image(hub_id: str, stored: Mapping[str, Any] | None, snapshot: Path) -> bytes | None:
    """The bytes as they are stored: in the row, or in one of the set's files."""
    content, path = (stored["bytes"], stored["path"]) if stored else (None, None)
    if content is not None or path is None:
        return content
    if not Path(path).is_relative_to(snapshot) or ".." in Path(path).parts:
        raise DatasetError(f"{hub_id} has an image at {path!r}, which is none of its files; use another set")
    return Path(path).read_bytes()


def _explained(hub_id: str, revision: str | None, error: Exception) -> KshotError:
    """An error of the libraries as one of kshot."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    page = f"https://huggingface.co/datasets/{hub_id}"
    if message := access_problem(error, "set", hub_id, page, revision):
        return DatasetError(message)
    if is_unreachable(error):
        return KshotError(
            f"the hub cannot be reached ({unreachable_reason(error)}) and its cache does not hold all of {hub_id}; try "
            "again, set HF_ENDPOINT to a mirror, or use --source archive where the set has one"
        )
    match error:
        case EmptyDatasetError() | DataFilesNotFoundError():
            return DatasetError(f"{hub_id} has no files of {', '.join(FORMATS)}; try revision refs/convert/parquet")
        case OSError(errno=int()):
            return KshotError(f"{hub_id}: {one_line(error)}; HF_HOME names the folder of the hub's cache")
    return DatasetError(f"{hub_id} cannot be read ({one_line(error)}); use another revision or set")
