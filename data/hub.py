"""Reads image classification sets of the Hugging Face hub: which files hold a split, their download, their items.

`datasets` resolves how a set is laid out and stored, `huggingface_hub` downloads and caches. `datasets` is given empty
placeholders for a set's files beside its real card: so only the files of the requested splits are downloaded, and the
cache alone is enough. No code of a set is run.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any, NamedTuple, Self

from data.dataset import Item, content_key
from kshot.errors import LISTED, DatasetError, KshotError, UnknownNameError, listed
from kshot.hub import access_problem, one_line, translated, unreachable_reason, with_retries
from kshot.untrusted import parse_yaml, read_file

log = logging.getLogger("kshot.files")

CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # what a set says of its layout and its columns
FORMATS = ("parquet", "arrow", "imagefolder")  # those that can hold images with class labels
UNREAD = (".py", ".zip")  # `datasets` gives up at code, and takes wrong labels for zipped folders (5.2.0)
MOST_CLASSES = 1_000  # distinct values of a column that has no class names
VALUES = r"u?int\d+$|(large_)?string$|bool$"  # what such a column may hold
BATCH = 1_000  # labels read at a time
PART = 1 << 20  # bytes read at a time for a checksum
MANY, DOWNLOADS = 16, 8  # more files than this are small ones, downloaded so many at a time


class HubName(NamedTuple):
    """OWNER/NAME[@REVISION][#CONFIG]. revision: a branch, tag or commit, "" is main. config: one of the parts that some
    sets have, "" is the default one."""

    hub_id: str
    revision: str = ""
    config: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises DatasetError for a text of another form."""
        parts = re.fullmatch(r"([^@#]+)(?:@([^@#]+))?(?:#([^@#]+))?", text)
        if not parts:
            forms = "hub:ID, hub:ID@REVISION, hub:ID#CONFIG or hub:ID@REVISION#CONFIG"
            raise DatasetError(f"hub:{text} cannot be the name of a set on the hub; write {forms}")
        return cls(*(part or "" for part in parts.groups()))

    def with_config(self, config: str) -> str:
        """How a user names another config of the same revision."""
        return f"hub:{self.hub_id}{self.revision and '@'}{self.revision}#{config}"


@dataclass(frozen=True)
class HubSet:
    """A set as the hub has it.

    revision: the commit, 40 hex digits.
    items: each row with a label once, by split and in the set's order, with path "<split>/<row>"; read from disk as
    they are needed. Raises DatasetError for rows without an image or with a label of no class.
    notes: what a user must know of how it was read. label_column: "" where it is the usual one.
    """

    revision: str
    items: Iterator[Item]
    notes: Sequence[str] = ()
    label_column: str = ""


class Labels(NamedTuple):
    """of_rows: split → the class name of each row, None where its label is not known; only splits that have labels.
    broken: a line for each other label that is of no class. notes: on labels that are not known."""

    of_rows: dict[str, list[str | None]]
    broken: list[str]
    notes: list[str]


class Columns(NamedTuple):
    """The names of the two columns that are read. classes: of the second, () where its values are the classes. usual:
    whether it is the one that is taken where none is named."""

    image: str
    label: str
    classes: tuple[str, ...] = ()
    usual: bool = True


def read(name: HubName, splits: Sequence[str] = (), label_column: str = "") -> HubSet:
    """The set with the splits named (none: all it has). label_column: "" is its only one of class labels, or "label".

    What is not in the hub's cache (HF_HOME) is downloaded before this returns; without a network, or with
    HF_HUB_OFFLINE=1, the cache must have it: a branch then is the commit it was when it was last read. Nothing is left
    to close.
    Raises DatasetError for a set that is not there, not open to this user or not of images with class labels,
    UnknownNameError for a config or a split it does not have, KshotError where the hub cannot be reached.
    """
    hub_id = name.hub_id
    with translated(partial(_explained, hub_id, name.revision)):
        snapshot = _snapshot(hub_id, name.revision or None)
        builder, files = _layout(name, snapshot)
        for split in splits:
            if split not in files:
                raise UnknownNameError(f"split of {hub_id}", split, files)
        wanted = {split: files[split] for split in splits or files}
        _download(hub_id, snapshot.name, list(chain(*wanted.values())))
        builder.config.data_files = {split: [str(snapshot / file) for file in wanted[split]] for split in wanted}
        columns = _columns(hub_id, next(iter(builder.as_streaming_dataset().values())).features, label_column)
        labels = _labels(hub_id, builder, columns)
        items = _items(hub_id, snapshot, builder, columns, labels)
        notes = [*_config_note(name, builder), *labels.notes]
        return HubSet(snapshot.name, items, notes, "" if columns.usual else columns.label)


def _snapshot(hub_id: str, revision: str | None) -> Path:
    """The set's folder in the hub's cache, called after the commit; brings its cards and the list of its files."""
    from huggingface_hub import snapshot_download

    logging.getLogger(snapshot_download.__module__).addFilter(_is_to_be_said)
    return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=list(CARDS)))


def _is_to_be_said(record: logging.LogRecord) -> bool:
    """Not that no card was found: a set needs none."""
    return not record.getMessage().startswith("No files matched")


def _layout(name: HubName, snapshot: Path) -> tuple[Any, dict[str, list[str]]]:
    """The builder that `datasets` takes for the set, and the names of each split's files in it."""
    from huggingface_hub import get_cached_repo_tree

    hub_id = name.hub_id
    tree = get_cached_repo_tree(hub_id, repo_type="dataset", revision=snapshot.name)
    with TemporaryDirectory() as temporary:
        home = Path(temporary).resolve() / "set"
        _write_placeholders(home, snapshot, [file.path for file in tree])
        builder = _builder(name, str(home), temporary)
        if builder.name not in FORMATS:
            raise DatasetError(f"{hub_id} is stored as {builder.name}; use a set stored as {', '.join(FORMATS)}")
        files = builder.config.data_files.items()
        return builder, {str(split): [_name_within(hub_id, home, file) for file in names] for split, names in files}


def _builder(name: HubName, home: str, temporary: str) -> Any:
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        return load_dataset_builder(home, name.config or None, cache_dir=temporary)
    except ValueError:
        configs = get_dataset_config_names(home)
        if name.config and name.config not in configs:
            raise UnknownNameError(f"config of {name.hub_id}", name.config, configs) from None
        if not name.config and len(configs) > 1:
            way_out = f"name one as {name.with_config('CONFIG')}: {', '.join(configs)}"
            raise DatasetError(f"{name.hub_id} has several configs and no default; {way_out}") from None
        raise


def _config_note(name: HubName, builder: Any) -> Iterator[str]:
    used = builder.config.name
    if not name.config and (others := [config for config in builder.builder_configs if config != used]):
        yield f"config {used!r} is used, the default; {name.with_config('CONFIG')} takes {_some(others)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if names[LISTED:] else "")


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
            path.write_bytes(_card(snapshot / name))
        else:
            path.touch()


def _card(path: Path) -> bytes:
    """A card, once it is known to be of a sane size with all that its aliases repeat, which `datasets` prints and
    compares. Raises OSError, ValueError."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    content = read_file(path)
    text = content.decode(errors="replace")
    block = REGEX_YAML_BLOCK.search(text)
    if path.suffix == ".yaml" or block:
        parse_yaml(block[2] if block else text)
    return content


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
    """One file into the cache, unless it is there and whole: no request is made then. Raises DatasetError where what
    comes is not what the hub says it is."""
    from huggingface_hub import hf_hub_download

    for _ in range(2):
        path = Path(with_retries(hf_hub_download, hub_id, name, repo_type="dataset", revision=commit))
        if _is_whole(blob := path.resolve()):
            return
        log.warning("%s is damaged; %s of %s is downloaded again", blob, name, hub_id)
        blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise DatasetError(f"{name} of {hub_id} comes with another content than the hub states; try again later")


def _is_whole(blob: Path) -> bool:
    """Whether a file of the hub's cache has the content that it was stored with: it is called after its checksum, a
    SHA-256, or of a small file that of git. Where the cache has no blobs there is none."""
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", blob.name):
        return True
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(blob.name) == 40:
        digest.update(f"blob {blob.stat().st_size}\0".encode())
    with blob.open("rb") as file:
        while part := file.read(PART):
            digest.update(part)
    return digest.hexdigest() == blob.name


def _columns(hub_id: str, features: Mapping[str, Any], label_column: str = "") -> Columns:
    """The columns of images and labels. Raises DatasetError that says all that is wrong, and what --label-column may
    name: columns of class labels, of texts or of whole numbers."""
    from datasets import ClassLabel, Image, Value

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    values = [n for n, f in features.items() if isinstance(f, Value) and re.match(VALUES, f.dtype)]
    image, usual = _one_of(images, "image"), _one_of(labels, "label")
    label, wrong = label_column or usual, []
    if image is None:
        wrong.append("several columns of images and none called image" if images else "no column of images")
    if label is None:
        wrong.append("several columns of class labels and none called label" if labels else "no column of class labels")
    elif label not in (*labels, *values):
        wrong.append(f"no column {label!r} of labels, texts or whole numbers")
    if image is None or label is None or wrong:
        columns = ", ".join(f"{name} ({_type_of(feature)})" for name, feature in features.items())
        way_out = "use a set that has them, or save its images as PATH/<class>/<image> and give folder:PATH"
        if image is not None and (labels or values):
            way_out = f"choose one with --label-column: {', '.join(labels or values)}"
        raise DatasetError(f"{hub_id} has {' and '.join(wrong)}; its columns are {columns}; {way_out}")
    return Columns(image, label, tuple(features[label].names) if label in labels else (), label == usual)


def _one_of(names: Sequence[str], usual: str) -> str | None:
    """The one column; of several (a mask, a species) the one of the usual name."""
    return names[0] if len(names) == 1 else next((name for name in names if name == usual), None)


def _type_of(feature: object) -> str:
    from datasets import Value

    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _labels(hub_id: str, builder: Any, columns: Columns) -> Labels:
    """The labels of all rows; no image is read. Raises DatasetError where no row has one."""
    features, column = builder.info.features, columns.label
    if builder.name == "parquet":
        builder.config.columns = [column]
    splits = {split: rows.select_columns([column]) for split, rows in builder.as_streaming_dataset().items()}
    found = {split: [label for batch in rows.iter(BATCH) for label in batch[column]] for split, rows in splits.items()}
    builder.info.features = features  # it has forgotten the other columns
    names: dict[Any, str | None] = {**dict(enumerate(columns.classes)), None: None, -1: None}
    if not columns.classes:
        names = _classes_of_values(f"{hub_id}, column {column!r}", found)
    broken = [
        f"label {label} in row {n} of split {split!r} is of none of its {len(columns.classes)} classes"
        for split, labels in found.items()
        for n, label in enumerate(labels)
        if label not in names
    ]
    of_rows, notes = {split: [names.get(label) for label in labels] for split, labels in found.items()}, list[str]()
    known = {split: labels for split, labels in of_rows.items() if any(label is not None for label in labels)}
    if not (known or broken):
        raise DatasetError(f"{hub_id} has no row with a label (-1 and null are none); use another revision or set")
    for split, labels in of_rows.items():
        if split not in known:
            notes.append(f"split {split!r} has no labels and is not used")
        elif count := labels.count(None):
            notes.append(f"rows without a label are not used: {count:,} of split {split!r}")
    return Labels(known, broken, notes)


def _classes_of_values(what: str, found: Mapping[str, Sequence[Any]]) -> dict[Any, str | None]:
    """Value → class name, None where it stands for no label: an empty text; -1 where values are counted from 0, or
    where a whole split has no other. Raises DatasetError for too many values, or such of a single row."""
    counts = Counter(value for values in found.values() for value in values)
    none = {None} | ({-1} if 0 in counts or any({*values} == {-1} for values in found.values()) else set())
    names = {value: None if value in none or not str(value).strip() else str(value) for value in counts}
    if (number := sum(name is not None for name in names.values())) > MOST_CLASSES:
        problem = f"{number:,} different values, more than {MOST_CLASSES:,} classes"
        raise DatasetError(f"{what}: {problem}; choose another with --label-column")
    if single := [name for value, name in names.items() if name is not None and counts[value] == 1]:
        raise DatasetError(listed(what, [f"{name!r} is the value of one row; a class needs two" for name in single]))
    return names


def _items(hub_id: str, snapshot: Path, builder: Any, columns: Columns, labels: Labels) -> Iterator[Item]:
    from datasets import Image
    from pyarrow.dataset import ParquetFragmentScanOptions

    broken = [*labels.broken]
    with translated(partial(_explained, hub_id, snapshot.name)):
        if builder.name == "parquet":
            builder.config.columns = [columns.image, columns.label]  # others are not even read
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)  # else whole files are
        splits = builder.as_streaming_dataset()
        for split, names in labels.of_rows.items():
            rows = splits[split].cast_column(columns.image, Image(decode=False))
            for n, (row, name) in enumerate(zip(rows, names, strict=True)):
                if name is None:
                    continue
                if image := _image(hub_id, row[columns.image], snapshot):
                    yield Item(f"{split}/{n}", split, name, image, content_key(image))
                else:
                    broken.append(f"no image in row {n} of split {split!r}")
        if broken:
            raise DatasetError(listed(f"{hub_id} has broken rows; use another revision or set", broken))


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
    if reason := unreachable_reason(error):
        return KshotError(
            f"the hub cannot be reached ({reason}) and its cache does not hold all of {hub_id}; try "
            "again, set HF_ENDPOINT to a mirror, or use --source archive where the set has one"
        )
    match error:
        case ValueError() if names := _repeated_names(error):
            return DatasetError(
                f"{hub_id} has several classes of one name: {_some(names)}; use another revision or set"
            )
        case EmptyDatasetError() | DataFilesNotFoundError():
            return DatasetError(f"{hub_id} has no files of {', '.join(FORMATS)}; try revision refs/convert/parquet")
        case OSError(errno=int()):
            return KshotError(f"{hub_id}: {one_line(error)}; HF_HOME names the folder of the hub's cache")
    return DatasetError(f"{hub_id} cannot be read ({one_line(error)}); use another revision or set")


def _repeated_names(error: Exception) -> list[str]:
    """The names for which a ClassLabel refused itself: its error does not say them, and no one else has read them."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    names = getattr(frame.f_locals.get("self"), "names", None) or []
    return [repr(name) for name, count in Counter(map(str, names)).items() if count > 1]
