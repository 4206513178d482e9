"""Draws the k shots of each class, and splits into train and test. Pure: no files, no global random state.

Images are ordered by the SHA-256 of (seed, class name, image key). An image's rank in its class therefore does not
depend on the order of the rows, on the other classes or on the number of shots.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from data.dataset import SIDES, Example, Item, Split
from kshot.errors import InputError, TooFewImagesError

TEST_SHARE = 5  # one image of five goes to test, at least one per class, where nothing else is stated


def k_shot(
    examples: Sequence[Example], classes: Sequence[str], shots: int, seed: int, *, allow_fewer: bool = False
) -> list[int]:
    """Indices into examples of the k-shot set: class by class, each class a prefix of its permutation for this seed.

    The sets nest in shots. Rows with the same key and label are one image and count once (the first row is returned).
    allow_fewer: a class with fewer images than shots gives all it has; a class with none is still an error.
    Raises InputError if shots < 1; TooFewImagesError.
    """
    if shots < 1:
        raise InputError(f"shots must be 1 or more, not {shots}")
    rows: dict[int, dict[str, int]] = defaultdict(dict)
    for index, example in enumerate(examples):
        rows[example.label].setdefault(example.key, index)
    counts = images_per_class(examples, classes)
    _check_counts({name: n for name, n in counts.items() if n < (1 if allow_fewer else shots)}, shots)
    chosen: list[int] = []
    for label, name in enumerate(classes):
        order = sorted(rows[label], key=partial(_rank, seed, name))
        chosen += (rows[label][key] for key in order[:shots])
    return chosen


def images_per_class(examples: Sequence[Example], classes: Sequence[str]) -> dict[str, int]:
    """Distinct images of each class, by its name."""
    counts = Counter(label for label, _ in {(example.label, example.key) for example in examples})
    return {name: counts[label] for label, name in enumerate(classes)}


def split_items(
    items: Sequence[Item], *, test_size: Callable[[int], int], seed: int, groups: Sequence[str] | None = None
) -> Split:
    """The items of train and of test, both in their order. Those of one class with one key are one image.

    test_size: distinct images of a class → how many of them go to test, at most.
    groups: name of each item's group (default: its key). Within a class a group is never divided; one that is larger
        than the room left in test is passed over, so test may come out smaller than asked.
    """
    members: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item, group in zip(items, groups or [item.key for item in items], strict=True):
        members[item.label][group].add(item.key)
    held_out = {
        (label, key) for label, of_class in members.items() for key in _draw_test(label, of_class, test_size, seed)
    }
    train, test = ([item for item in items if ((item.label, item.key) in held_out) is out] for out in (False, True))
    return train, test


def given_sides(splits: Collection[str]) -> tuple[str, str] | None:
    """The splits for train and test as the source calls them; the one for validation is test where there is no other.
    None where one side is missing."""
    named = {side: [s for name in SIDES[side] for s in splits if s.lower() == name] for side in SIDES}
    train, test = named["train"], named["test"] or named["validation"]
    return (train[0], test[0]) if train and test else None


def one_in_five(count: int) -> int:
    """How many of a class's images go to test, where nothing else is stated."""
    return max(1, count // TEST_SHARE)


def _draw_test(label: str, groups: dict[str, set[str]], test_size: Callable[[int], int], seed: int) -> set[str]:
    """The keys of one class that go to test: whole groups in ranked order, as long as they fit."""
    room = test_size(len(set().union(*groups.values())))
    drawn: set[str] = set()
    for group in sorted(groups, key=partial(_rank, seed, label)):
        if len(drawn | groups[group]) <= room:
            drawn |= groups[group]
    return drawn


def _rank(seed: int, name: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}\0{key}".encode()).digest()


def _check_counts(few: Mapping[str, int], shots: int) -> None:
    """Raise TooFewImagesError, which names the smallest, where classes have too few images. few: their counts."""
    if not few:
        return
    name = min(few, key=lambda name: few[name])
    count, more = few[name], len(few) - 1
    others = f" ({more} more {'class has' if more == 1 else 'classes have'} too few)" if more else ""
    way_out = f"use --shots {count}, --allow-fewer, or in a sweep --most-shots DATASET={count}"
    raise TooFewImagesError(
        f"class {name!r} has {count} distinct train {'image' if count == 1 else 'images'}, "
        f"{shots} shots asked for{others}; {way_out if count else 'add images or drop the class'}"
    )
