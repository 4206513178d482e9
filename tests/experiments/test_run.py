"""What a cell is given: the examples of its shots, each under its own label."""

from experiments.sweep.config import load
from experiments.sweep.grid import plan
from experiments.sweep.run import train_examples


def test_an_image_that_stands_in_two_classes_keeps_both_labels(make_image) -> None:
    """Whichever of them was prepared first."""
    from data.dataset import Dataset, Example, content_key

    image = make_image(4321)
    rows = [Example(content_key(image), image, label) for label in (0, 1)]
    job = plan(load("demo", {"methods": ["pixel-knn"], "shots": [1], "seeds": [0]}, {"max_side": 33})).jobs[0]
    for order in (rows, rows[::-1]):
        found = train_examples(job, Dataset("own", "given", ("cat", "dog"), order, []), 0.0)
        assert [example.label for example in found] == [0, 1]
