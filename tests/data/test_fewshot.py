"""The promises of the sampler and of the split, on random data sets."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import Example, Item
from data.fewshot import k_shot, split_items
from kshot.errors import InputError, TooFewImagesError

CLASSES = ("cat", "dog", "gnu")


def examples_of(keys_of_classes: list[list[str]]) -> list[Example]:
    return [Example(key, key.encode(), label) for label, keys in enumerate(keys_of_classes) for key in keys]


def items_of(keys_of_classes: list[list[str]]) -> list[Item]:
    """Each with a path of its own."""
    return [Item(f"{e.label}/{e.key}", "", CLASSES[e.label], e.image, e.key) for e in examples_of(keys_of_classes)]


def keys_of(examples: list[Example], rows: list[int]) -> list[str]:
    return [examples[row].key for row in rows]


keys = st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=8, max_size=20, unique=True)
data_sets = st.tuples(keys, keys, keys).map(list)
seeds = st.integers(0, 2**32)


@given(data_sets, seeds, st.integers(1, 7))
def test_subsets_nest_and_have_k_images_of_each_class(data_set: list[list[str]], seed: int, shots: int) -> None:
    examples = examples_of(data_set)
    small, large = (k_shot(examples, CLASSES, k, seed) for k in (shots, shots + 1))
    assert set(small) < set(large)
    assert Counter(examples[row].label for row in small) == dict.fromkeys(range(3), shots)
    assert [examples[row].label for row in small] == sorted(examples[row].label for row in small)


@given(data_sets, seeds, st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(data_set: list[list[str]], seed: int, shots: int, rng: Random) -> None:
    examples = examples_of(data_set)
    shuffled = list(examples)
    rng.shuffle(shuffled)
    assert keys_of(examples, k_shot(examples, CLASSES, shots, seed)) == keys_of(
        shuffled, k_shot(shuffled, CLASSES, shots, seed)
    )


@given(data_sets, seeds, st.integers(1, 8))
def test_other_classes_change_nothing(data_set: list[list[str]], seed: int, shots: int) -> None:
    examples, alone = examples_of(data_set), examples_of([data_set[1]])
    together = [e.key for e in (examples[row] for row in k_shot(examples, CLASSES, shots, seed)) if e.label == 1]
    assert together == keys_of(alone, k_shot(alone, ["dog"], shots, seed))


@given(data_sets, seeds, st.integers(1, 8), st.integers(0, 100))
def test_duplicates_count_once(data_set: list[list[str]], seed: int, shots: int, which: int) -> None:
    examples = examples_of(data_set)
    doubled = [*examples, *[examples[which % len(examples)]] * 3]
    assert k_shot(doubled, CLASSES, shots, seed) == k_shot(examples, CLASSES, shots, seed)


def test_seeds_differ() -> None:
    examples = examples_of([[f"{c}{i}" for i in range(50)] for c in "abc"])
    subsets = {tuple(k_shot(examples, CLASSES, 4, seed)) for seed in range(50)}
    assert len(subsets) == 50


def test_every_image_is_drawn_equally_often() -> None:
    examples = examples_of([[str(i) for i in range(10)]])
    drawn = Counter(row for seed in range(2000) for row in k_shot(examples, ["cat"], 3, seed))
    assert all(500 < drawn[row] < 700 for row in range(10))  # 600 expected, 20 the standard deviation


def test_the_permutation_is_the_same_for_ever() -> None:
    examples = examples_of([["a", "b", "c", "d", "e"]])
    assert keys_of(examples, k_shot(examples, ["cat"], 5, 0)) == ["b", "a", "e", "c", "d"]


def test_too_few_images() -> None:
    examples = examples_of([["a", "b", "c"], ["d"]])
    with pytest.raises(TooFewImagesError, match=r"'dog' has 1 distinct train image, 2 shots .*--allow-fewer"):
        k_shot(examples, CLASSES[:2], 2, 0)
    assert len(k_shot(examples, CLASSES[:2], 2, 0, allow_fewer=True)) == 3


def test_a_class_without_images_is_an_error_even_where_fewer_are_allowed() -> None:
    with pytest.raises(TooFewImagesError, match="'dog' has 0 distinct"):
        k_shot(examples_of([["a"]]), CLASSES[:2], 1, 0, allow_fewer=True)


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_below_one(shots: int) -> None:
    with pytest.raises(InputError, match=f"not {shots}"):
        k_shot(examples_of([["a"]]), ["cat"], shots, 0)


@given(data_sets, seeds, st.integers(0, 10), st.integers(1, 4))
def test_a_split_is_stratified_and_never_divides_a_group(
    data_set: list[list[str]], seed: int, size: int, group_size: int
) -> None:
    items, groups = items_of(data_set), [str(i // group_size) for of_class in data_set for i in range(len(of_class))]
    group_of = {item.path: (item.label, group) for item, group in zip(items, groups, strict=True)}
    train, test = split_items(items, test_size=lambda count: size, seed=seed, groups=groups)
    assert sorted([*train, *test], key=items.index) == items
    assert not {group_of[item.path] for item in train} & {group_of[item.path] for item in test}
    per_class = Counter(item.label for item in test)
    for label, of_class in zip(CLASSES, data_set, strict=True):
        assert min(size, len(of_class)) - group_size < per_class[label] <= size


@given(data_sets, seeds, st.randoms(use_true_random=False))
def test_a_split_depends_neither_on_order_nor_on_other_classes(
    data_set: list[list[str]], seed: int, rng: Random
) -> None:
    items = items_of(data_set)
    shuffled = list(items)
    rng.shuffle(shuffled)
    expected, again, cats = (
        {(item.label, item.key) for item in split_items(some, test_size=lambda count: count // 3, seed=seed)[1]}
        for some in (items, shuffled, [item for item in items if item.label == "cat"])
    )
    assert again == expected
    assert cats == {(label, key) for label, key in expected if label == "cat"}


def test_rows_of_one_image_stay_together() -> None:
    train, test = split_items(items_of([["a", "b", "c"]]) * 2, test_size=lambda count: count // 3, seed=0)
    assert (len(train), len(test)) == (4, 2)  # one image of three, in two rows
    assert len({item.key for item in test}) == 1
