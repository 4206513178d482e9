"""Stop texts: found where a plain search finds them, with work that depends neither on the text nor on the stops."""

import sys
from collections.abc import Callable
from typing import Any

import openai
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types

from kshot.errors import RequestError
from tests.vlm.openai_served import refusal
from vlm import nano
from vlm.local.clients import LocalSamplingClient
from vlm.local.model.load import load_tokenizer
from vlm.local.sampling.decoder import TokenSequence
from vlm.local.sampling.stops import LONGEST, MOST, StopSearch
from vlm.server.openai.requests import MAX_STOPS
from vlm.server.openai.text import DecodedText, Vocabulary

NANO = load_tokenizer(nano.NAME)
LETTERS = st.text("ab", max_size=6)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=7), max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_search_finds_what_find_finds(parts: list[str], stops: list[str]) -> None:
    search, text = StopSearch(stops), ""
    for part in parts:
        before, text = len(text), text + part
        starts = [text.find(stop) for stop in stops if stop in text]
        found = search.add(part)
        if starts:
            assert found is not None
            assert before + found == min(starts)
            return
        assert found is None
        ends = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
        assert search.held == max(ends, default=0)


@given(st.text("ab é☕🎉", max_size=12).map(NANO.encode), st.text("ab é☕", min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_sequence_ends_with_the_first_token_that_completes_a_stop(tokens: list[int], stop: str) -> None:
    sequence = TokenSequence(NANO, types.SamplingParams(stop=[stop]), 0)
    for count, token in enumerate(tokens, 1):
        sequence.append(token, -1.0)
        assert (sequence.reason == "stop") == (stop in NANO.decode(tokens[:count]))
        if sequence.reason:
            return


def lines_of(call: Callable[[], Any]) -> int:
    """How many lines of Python a call takes."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("sign", ["a", "b", "abc"])
def test_a_token_late_in_a_long_text_is_as_much_work_as_an_early_one(sign: str) -> None:
    """Many long stops, whose beginnings the text never has, or all the time."""
    stops = ["a" * (LONGEST - 1 - n) + "c" for n in range(MAX_STOPS)]
    text, tokens = DecodedText(Vocabulary(NANO), stops), NANO.encode(sign)
    sequence = TokenSequence(NANO, types.SamplingParams(stop=stops), 0)

    def more(times: int = 100) -> None:
        for _ in range(times):
            for token in tokens:
                sequence.append(token, -1.0)
                text.add(token)
                text.take()

    more()
    early, _, late = lines_of(more), more(2000), lines_of(more)
    assert late <= 2 * early
    assert text.reason is sequence.reason is None


def test_more_and_longer_stops_are_refused_by_name(
    api: openai.OpenAI, sampler: LocalSamplingClient, prompts: list[tinker.ModelInput]
) -> None:
    for stop, words in ((["a" * (LONGEST + 1)], "1,025 characters"), (["a"] * (MOST + 1), f"at most {MOST}")):
        with pytest.raises(RequestError, match=words):
            sampler.sample(prompts[4], 1, types.SamplingParams(max_tokens=1, stop=stop)).result()
    refusal(api, "completions", "stop holds a text of 20,000 characters", "stop", stop=["b" * 20_000], stream=True)
    for stop in (["b" * (LONGEST - n) for n in range(MAX_STOPS)], "b" * LONGEST):
        answer = api.completions.create(model=nano.NAME, prompt="a", max_tokens=2, stop=stop, temperature=0)
        assert answer.choices[0].finish_reason == "length"
