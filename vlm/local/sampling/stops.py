"""Texts that end a sample, found as it grows: each character is looked at once, however long texts and stops are."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from kshot.errors import RequestError

MOST = 64  # stop texts of one request
LONGEST = 1024  # characters of one of them
REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet
SPLIT = 8  # tokens that a character may be split into: more than the bytes that it has


def check_stops(stops: Sequence[Any]) -> None:
    """Raise RequestError for more texts, or longer ones, than are searched for, and for empty ones. What is no text (a
    token) is left out."""
    texts = [each for each in stops if isinstance(each, str)]
    if len(texts) > MOST:
        raise RequestError(f"stop holds {len(texts):,} texts; at most {MOST} are searched for: leave some out")
    if "" in texts:
        raise RequestError("stop holds an empty text, which stands everywhere; leave it out")
    if (longest := max(map(len, texts), default=0)) > LONGEST:
        raise RequestError(f"stop holds a text of {longest:,} characters; at most {LONGEST:,} are searched for")


class StopSearch:
    """A text that grows, and the stop texts in it (Knuth, Morris and Pratt 1977: the state of a search is how much of
    the stop the text ends with, so that nothing before is read again)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._matched = stops, [0] * len(stops)

    @property
    def held(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop."""
        return max(self._matched, default=0)

    def add(self, more: str) -> int | None:
        """Append to the text. Returns where the first of the stops that are now in it begins, counted from the
        beginning of `more` (below 0: before it), or None."""
        starts = [self._add(number, stop, more) for number, stop in enumerate(self._stops)]
        return min((start for start in starts if start is not None), default=None)

    def _add(self, number: int, stop: str, more: str) -> int | None:
        matched, failure = self._matched[number], _failure(stop)
        if not matched and stop[0] not in more:
            return None
        for at, sign in enumerate(more):
            while matched and stop[matched] != sign:
                matched = failure[matched - 1]
            matched += stop[matched] == sign
            if matched == len(stop):
                return at + 1 - matched
        self._matched[number] = matched
        return None


@lru_cache(maxsize=1024)
def _failure(stop: str) -> tuple[int, ...]:
    """After each character of a stop: the length of the longest shorter beginning of it that stands there too."""
    made, matched = [0], 0
    for sign in stop[1:]:
        while matched and stop[matched] != sign:
            matched = made[matched - 1]
        matched += stop[matched] == sign
        made.append(matched)
    return tuple(made)


class TokenStops:
    """Stop texts in a sequence of tokens. Of the tokens the last few alone are decoded, those before them being text
    already (as vLLM's `detokenize_incrementally` does)."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._search = tokenizer, StopSearch(stops)
        self._start = self._read = 0  # the first token that is decoded, and how much of the text from it was searched

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether the text of all tokens holds a stop; to be asked after each token."""
        text = self._tokenizer.decode(tokens[self._start :])
        whole = text.rstrip(REPLACEMENT)  # what follows may complete a character
        found = self._search.add(whole[self._read :]) is not None
        self._read = max(self._read, len(whole))
        if whole == text or len(tokens) - self._start > SPLIT:
            self._start = len(tokens) - 1  # decoded again: some tokenizers write a first token in another way
            self._read = len(self._tokenizer.decode(tokens[self._start :]))
        return found
