"""The sampling requests of one snapshot: they wait, join its decoder, are told their tokens, and end or fail alone.

Futures are told here, and nowhere else, that a request is over. Knows no threads but that futures may be cancelled from
any, and no other snapshots.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any

from tinker import types

from vlm.local import sampling
from vlm.local.batch import groups, length_of
from vlm.local.decoding import Decoder
from vlm.local.engine import Engine, Snapshot
from vlm.local.sampling import Answer, Ask
from vlm.local.writing import Writer

OnToken = Callable[[Writer], None]


@dataclass(eq=False)
class Request:
    """A sampling request. answer: what is written for it, once its prompt has been read. error: why it has failed.

    Its future stays pending until there is a result, so that it can be cancelled at any time.
    """

    engine: Engine
    snapshot: Snapshot
    ask: Ask
    on_token: OnToken | None
    future: "Future[types.SampleResponse]" = field(default_factory=Future)
    answer: Answer | None = None
    error: BaseException | None = None

    @property
    def brief(self) -> bool:
        """Whether reading the prompt is all it takes."""
        return self.ask.params.max_tokens == 1

    @property
    def writers(self) -> Sequence[Writer]:
        return self.answer.writers if self.answer else ()

    def fits(self) -> bool:
        """Whether it can be asked, as far as that shows before the prompt is read; if not it has failed."""
        try:
            sampling.check(self.engine, self.ask)
        except Exception as error:
            self.fail(error)
        return self.error is None

    def fail(self, error: BaseException) -> None:
        clear_frames(error.__traceback__)  # they hold a pass's tensors, and the error may be kept for long
        self.error = error

    def tell(self, written: set[Writer]) -> None:
        """Pass on who of its writers has got a token."""
        if self.on_token is None:
            return
        try:
            for writer in self.writers:
                if writer in written:
                    self.on_token(writer)
        except BaseException as error:
            self.fail(error)

    def settled(self) -> bool:
        """Whether it is over; then its future has been told, and its writers write no more."""
        if self.error is None and not self.future.cancelled() and not (self.answer and self.answer.done):
            return False
        for writer in self.writers:
            writer.end()
        if self.future.set_running_or_notify_cancel():
            response = self._response()
            if self.error is not None:
                self.future.set_exception(self.error)
            else:
                self.future.set_result(response)
        return True

    def _response(self) -> Any:
        """What was written; where that cannot be said the request fails, and no other."""
        try:
            return self.answer.response() if self.answer and self.error is None else None
        except Exception as error:
            self.fail(error)
            return None


class Lane:
    """The requests of one snapshot: those that wait for a row, and those that are being written."""

    def __init__(self, engine: Engine, snapshot: Snapshot) -> None:
        self.decoder = Decoder(engine, snapshot, sampling.ROWS)
        self.waiting: deque[Request] = deque()
        self._going: list[Request] = []

    @property
    def empty(self) -> bool:
        return not (self.waiting or self._going)

    def take(self, request: Request) -> None:
        """Let it wait for a row, if it can be asked at all."""
        if request.fits():
            self.waiting.append(request)
        else:
            request.settled()

    def turn(self) -> int:
        """Let those join for whom there is a row, and write one token of each sequence; says how many were written."""
        taken = self._taken()
        self._going += taken
        for members in groups([length_of(each.ask.prompt) for each in taken], sampling.ROWS, sampling.POSITIONS):
            self._join([taken[n] for n in members])
        first = {writer for each in taken for writer in each.writers}
        self._tell(first)
        written = self._step()
        self._tell(written)
        return len(first) + len(written)

    def _taken(self) -> list[Request]:
        """Those of the waiting whose prompts are read now, in order: as many as find a row, and one pass's worth."""
        taken, left = list[Request](), deque[Request]()
        free, positions = self.decoder.free, sampling.POSITIONS
        for each in self.waiting:
            if each.settled():
                continue
            if len(taken) == sampling.ROWS or positions <= 0 or not (each.brief or free > 0):
                left.append(each)
                continue
            taken.append(each)
            positions -= length_of(each.ask.prompt)
            free -= 0 if each.brief else each.ask.num_samples
        self.waiting = left
        return taken

    def _join(self, requests: Sequence[Request]) -> None:
        """Read their prompts, together if none of them fails."""
        try:
            answers = sampling.join(self.decoder, [each.ask for each in requests])
        except BaseException as error:
            if len(requests) == 1:
                requests[0].fail(error)
                return
            clear_frames(error.__traceback__)  # they hold the pass's tensors
        else:
            for each, answer in zip(requests, answers, strict=True):
                each.answer = answer
            return
        for each in requests:
            self._join([each])

    def _step(self) -> set[Writer]:
        try:
            return set(self.decoder.step())
        except BaseException as error:
            for each in self._going:
                each.fail(error)
            self.decoder = Decoder(self.decoder.engine, self.decoder.snapshot, self.decoder.rows)
            return set()

    def _tell(self, written: set[Writer]) -> None:
        for each in self._going:
            each.tell(written)
        self._going = [each for each in self._going if not each.settled()]
