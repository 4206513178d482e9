"""The loop of training, on a client that only writes down what it is asked."""

from collections.abc import Iterator
from typing import Any

import pytest
from tinker import types

from kshot.errors import UnknownNameError
from vlm.classifier import fit, steps

ADAM = types.AdamParams(learning_rate=1e-3)


class Diary:
    """A training client, and its futures, by name."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def forward_backward(self, data: list[Any], loss_fn: str) -> Any:
        return self._asked(f"{loss_fn} of {data[0]}")

    def optim_step(self, adam: types.AdamParams) -> Any:
        assert adam is ADAM
        return self._asked("step")

    def data(self, count: int) -> Iterator[Any]:
        for number in range(count):
            self.events.append(f"make {number}")
            yield [number]

    def _asked(self, what: str) -> Any:
        self.events.append(what)
        diary = self

        class Answer:
            def result(self) -> str:
                diary.events.append(f"await {what}")
                return what

        return Answer()


def test_both_requests_are_made_before_either_is_awaited_and_the_next_data_meanwhile() -> None:
    diary: Any = Diary()
    assert list(steps(diary, diary.data(2), "ppo", ADAM)) == [("ppo of 0", "step"), ("ppo of 1", "step")]
    first = ["make 0", "ppo of 0", "step", "make 1", "await ppo of 0", "await step"]
    assert diary.events == [*first, "ppo of 1", "step", "await ppo of 1", "await step"]


def test_without_data_or_with_an_unknown_loss_nothing_is_asked() -> None:
    diary: Any = Diary()
    assert list(steps(diary, [], "cross_entropy", ADAM)) == []
    with pytest.raises(UnknownNameError, match="unknown loss 'hinge'; choose from: text, closed-set"):
        fit(diary, [[(b"", 0)]], diary, ADAM, "hinge")
    assert diary.events == []
