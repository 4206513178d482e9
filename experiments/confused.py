"""What is taken for what: the most frequent confusions, and images of the worst of them.

Cell records, a results folder and a way to get images in, blocks out; where the folder has no predictions there are
none. It does not know Markdown or HTML, nor where images come from.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.images import decode
from experiments.metrics import Confusion, confusions, scores
from experiments.report_blocks import Block, Cell, Gallery, Photo, Table
from experiments.styles import style
from experiments.tables import Record, largest_shots
from experiments.tables_stored import best_of, runs_of
from kshot_errors import ResultsError

if TYPE_CHECKING:
    import pyarrow as pa

WORST = 10  # confusions shown of a method
PICTURED = 4  # of them with images
PICTURES = 3  # confused test images of each
SIDE = 96  # pixels of an image's longest side

Pictures = Callable[[str, str], bytes | None]  # (data set, key of a test image) -> the encoded image
Training = Callable[[str, int], bytes | None]  # (data set, label) -> an encoded training image of that class


class Album(NamedTuple):
    """Where images of a data set come from, None for one that cannot be had. training: to see beside the others an
    image of the class that was answered; None where there are none of them."""

    pictures: Pictures
    training: Training | None = None


def confusion_blocks(
    folder: Path, cells: Sequence[Record], dataset: str, classes: Sequence[str], album: Album | None = None
) -> Iterator[Block]:
    """The most frequent confusions at the largest shots, summed over seeds: of the best series, and of the best that
    answers in text; a table each, and images of the worst where there is an album. Nothing of a series without
    predictions in the folder or without a confusion.

    classes: the names, by label. Raises ResultsError where a prediction is none of them, ImageError for a picture that
    is no image.
    """
    import pyarrow as pa

    shots = largest_shots(cells, dataset)
    runs = runs_of(folder, cells, dataset, shots)
    texts = scores(cells, dataset, "accuracy_constrained")
    groups = runs, {series: row for series, row in runs.items() if series in texts}
    for series in dict.fromkeys(best_of(cells, dataset, shots, group) for group in groups if group):
        every = pa.concat_tables(runs[series].values())
        found = confusions(every, WORST)
        if found:
            yield _table(series, shots, len(runs[series]), found, classes)
        if album:
            for confusion in found[:PICTURED]:
                yield from _gallery(style(series).title, confusion, every, dataset, classes, album)


def _table(series: str, shots: int, seeds: int, found: Sequence[Confusion], classes: Sequence[str]) -> Table:
    caption = (
        f"{style(series).title} at k = {shots}: the most frequent confusions, in test images "
        f"over {'one seed' if seeds == 1 else f'{seeds} seeds'} and in percent of the images of the class."
    )
    rows = tuple(_row(confusion, classes) for confusion in found)
    return Table(caption, ("class", "taken for", "images", "% of the class"), rows)


def _row(confusion: Confusion, classes: Sequence[str]) -> tuple[Cell, ...]:
    label, prediction, images, share = confusion
    if not 0 <= min(label, prediction) <= max(label, prediction) < len(classes):
        raise ResultsError(f"predictions hold class {max(label, prediction)}, but there are {len(classes)} class names")
    return tuple(map(Cell, (classes[label], classes[prediction], str(images), f"{100 * share:.1f}")))


def _gallery(
    title: str, confusion: Confusion, every: "pa.Table", dataset: str, classes: Sequence[str], album: Album
) -> Iterator[Gallery]:
    """The confused test images that can be had, and after them one to compare with; nothing where there are none."""
    label, prediction = classes[confusion.label], classes[confusion.prediction]
    images = [(key, album.pictures(dataset, key)) for key in _keys(confusion, every)]
    taken = f"test image of {label}, taken for {prediction}"
    photos = [Photo(_thumbnail(image, key), taken, "test") for key, image in images if image is not None]
    if photos and album.training and (image := album.training(dataset, confusion.prediction)) is not None:
        shown = f"training image of {prediction}"
        photos.append(Photo(_thumbnail(image, prediction), shown, shown))
    if photos:
        yield Gallery(f"{title}: {label} taken for {prediction}", tuple(photos))


def _keys(confusion: Confusion, every: "pa.Table") -> list[str]:
    """The test images so confused, those first that most seeds confuse, then by key: PICTURES at most."""
    columns = (every[name].to_pylist() for name in ("key", "label", "prediction"))
    wanted = (confusion.label, confusion.prediction)
    counts = Counter(key for key, *pair in zip(*columns, strict=True) if tuple(pair) == wanted)
    return sorted(counts, key=lambda key: (-counts[key], key))[:PICTURES]


def _thumbnail(image: bytes, what: str) -> bytes:
    """A small JPEG without whatever the original says about itself."""
    small, buffer = decode(image, max_side=SIDE, name=f"image {what[:12]}"), io.BytesIO()
    small.info.clear()
    small.save(buffer, "JPEG")
    return buffer.getvalue()
