"""Tokens become text as the tokenizer's own decode writes it, in whole characters, cut at the first stop string."""

from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vlm import genuine
from vlm import nano
from vlm.local.model.load import load_tokenizer
from vlm.server.openai.text import DecodedText, Vocabulary

NANO = load_tokenizer(nano.NAME)
PIECES = st.one_of(
    st.lists(st.integers(0, 4095), max_size=12),
    st.text("aé☕日🎉 \n", max_size=8).map(NANO.encode),  # characters of 1 to 4 bytes, tokens apart
)


def pieces(tokens: list[int], stops: list[str], tokenizer: Any = NANO) -> list[str]:
    """What can be shown after each token, and at the end."""
    text, taken = DecodedText(Vocabulary(tokenizer), stops), []
    for token in tokens:
        text.add(token)
        taken.append(text.take()[0])
    text.finish("length")
    return [*taken, text.take()[0]]


@given(st.lists(PIECES, max_size=4).map(lambda parts: list(chain(*parts))))
@settings(max_examples=200, deadline=None)
def test_the_text_is_the_tokenizers(tokens: list[int]) -> None:
    assert "".join(pieces(tokens, [])) == NANO.decode(tokens)


@given(PIECES, st.lists(st.text("ab é☕", min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_the_first_stop_cuts_and_nothing_of_it_is_ever_shown(tokens: list[int], stops: list[str]) -> None:
    expected = NANO.decode(tokens)
    for count in range(len(tokens) + 1):  # the first token with which there is one
        so_far = NANO.decode(tokens[:count]).rstrip("\ufffd")
        cuts = [so_far.find(stop) for stop in stops if stop in so_far]
        if cuts:
            expected = so_far[: min(cuts)]
            break
    shown = pieces(tokens, stops)
    assert "".join(shown) == expected


def test_characters_come_whole_and_stops_are_held_back() -> None:
    tokens = NANO.encode("a☕b")
    assert len(tokens) > 3  # the cup is several tokens
    shown = pieces(tokens, [])
    assert [each for each in shown if each] == ["a", "☕", "b"]
    letters = [NANO.encode(sign)[0] for sign in "abcabd"]
    assert pieces(letters, ["abd"]) == ["", "", "abc", "", "", "", ""]
    assert pieces(letters[:5], ["abd"]) == ["", "", "abc", "", "", "ab"]


def test_each_token_says_where_it_begins() -> None:
    tokens = NANO.encode("a☕b")
    text = DecodedText(Vocabulary(NANO))
    for token in tokens:
        text.add(token, -1.0)
    text.finish("length")
    taken = text.take()[1]
    assert [token.id for token in taken] == tokens
    assert [token.start for token in taken] == [0, *[1] * (len(tokens) - 2), 2]


def test_tokens_of_a_stopped_text_are_those_that_begin_in_it() -> None:
    letters = [NANO.encode(sign)[0] for sign in "abcd"]
    text = DecodedText(Vocabulary(NANO), ["bc"])
    for token in letters:
        text.add(token)
    text.finish("length")
    shown, tokens = text.take()
    assert (shown, text.reason) == ("a", "stop")
    assert [token.id for token in tokens] == letters[:1]


def test_names_of_tokens() -> None:
    vocabulary = Vocabulary(NANO)
    parts = NANO.encode("☕")
    assert b"".join(vocabulary.data(token) for token in parts) == "☕".encode()
    assert vocabulary.name(parts[0]).startswith("bytes:\\xe2")
    assert vocabulary.name(NANO.eos_token_id) == "<|im_end|>"
    assert vocabulary.data(99_999) == b""  # the vocabulary of a model may be padded


@genuine.needed
def test_the_genuine_tokenizer_agrees() -> None:
    tokenizer = genuine.tokenizer()
    for written in ("naïve café ☕ 日本 🎉", "<think>\nx</think> <|im_end|> <|box_start|>(1,2)"):
        tokens = tokenizer.encode(written)
        assert "".join(pieces(tokens, [], tokenizer)) == tokenizer.decode(tokens) == written
    assert pytest.approx(len(tokenizer), abs=500) == 151_669
    padded = [9707, 151_900, 0]
    assert "".join(pieces(padded, [], tokenizer)) == tokenizer.decode(padded)
