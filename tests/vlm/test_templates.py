"""Chat templates of strangers: each is ended at a limit of time or memory, by one line, and holds up no other."""

import copy
import threading
from typing import Any

import psutil
import pytest

from kshot.errors import PromptError
from vlm import nano, templates
from vlm.local.model.load import load_tokenizer
from vlm.server.openai import chat
from vlm.server.openai.requests import ChatRequest

NANO = load_tokenizer(nano.NAME)
MESSAGES = [{"role": "user", "content": "hello"}]
LOOP = "{% for _ in range(99999) %}"
GROW = "{% set n = namespace(a='aa') %}{% for _ in range(99) %}{% set n.a = "
HOSTILE = {
    "nested loops": (LOOP + LOOP + "{% endfor %}{% endfor %}", "more than 0.3 seconds"),
    "a number": ("{% set n = messages|length + 8 %}{{ (n ** (n ** n)) % 7 }}", "more than 0.3 seconds"),
    "a constant": ("{{ 'a' * 10 ** 10 }}", "too much memory"),
    "a form": ("{{ '%1000000000d' % 1 }}", "too much memory"),
    "a width": ("{{ 'a'|center(10 ** 10) }}", "too much memory"),
    "doubling": (GROW + "n.a ~ n.a %}{% endfor %}", "ended"),
    "replacing": (GROW + "n.a.replace('a', n.a) %}{% endfor %}", "ended"),
    "joining": ("{{ range(99999)|join('ab' * 9999) }}", "too much memory"),
    "a long answer": (LOOP + "{{ 'a' * 1000 }}{% endfor %}", "characters, at most"),
    "a macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without an end"),
    "a deep text": ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "ended"),
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.3)


def with_template(template: str | None) -> Any:
    """A tokenizer with this template for texts; by its images it is taken for the model's own."""
    made = copy.copy(NANO)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def renderer() -> templates.Renderer:
    return templates.Renderer()


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_never_ends_or_takes_all_memory_is_ended(kind: str, renderer: templates.Renderer) -> None:
    template, words = HOSTILE[kind]
    before = psutil.Process().memory_info().rss
    with pytest.raises(PromptError, match=words) as caught:
        renderer.render(template, {"messages": MESSAGES})
    assert "\n" not in str(caught.value)
    assert psutil.Process().memory_info().rss < before + (64 << 20)
    assert renderer.render("{{ messages[0].content }}", {"messages": MESSAGES}) == "hello"


def test_a_failing_template_is_named_in_one_line() -> None:
    request = ChatRequest(model="any", messages=MESSAGES)
    own = with_template(None)
    for template in ("{{ 1 / 0 }}", "{{ raise_exception('no\nmore') }}", "{{ none.x.y }}"):
        own.chat_template = templates.CHATML + "{% if messages[0].content == 'hello' %}" + template + "{% endif %}"
        with pytest.raises(PromptError, match="chat template cannot write these messages") as caught:
            chat.conversation(request, own)
        assert "\n" not in str(caught.value)


def test_a_model_that_never_ends_is_asked_once_and_others_go_on() -> None:
    """Its template computes for ever already on the question whether it knows images."""
    request, hostile = ChatRequest(model="any", messages=MESSAGES), with_template(HOSTILE["nested loops"][0])
    expected = chat.conversation(request, with_template(templates.CHATML)).text
    failures = list[str]()

    def ask() -> None:
        for _ in range(20):
            with pytest.raises(PromptError) as caught:
                chat.conversation(request, hostile)
            failures.append(str(caught.value))

    asking = threading.Thread(target=ask)
    asking.start()
    other = with_template(templates.CHATML)
    assert [chat.conversation(request, other).text for _ in range(3)] == [expected] * 3
    asking.join(60)
    assert len(failures) == 20
    assert set(failures) == {
        "the model's chat template was ended: it computes for more than 0.3 seconds; take another model"
    }
    assert templates.renderer(other).pool is not templates.renderer(hostile).pool


def test_a_conversation_beyond_any_context_is_refused() -> None:
    messages = [{"role": "user", "content": "a" * (templates.LONGEST + 1)}]
    with pytest.raises(PromptError, match="characters; at most"):
        chat.conversation(ChatRequest(model="any", messages=messages), with_template(None))


def test_a_process_ends_with_its_model() -> None:
    made = templates.Renderer()
    made.render("a", {})
    process = made._process
    assert process is not None
    del made
    assert process.wait(60) is not None


@pytest.mark.parametrize("go_on", [False, True])
@pytest.mark.parametrize("last", ["an answer ", "an answer"])
def test_texts_are_those_of_transformers(last: str, *, go_on: bool) -> None:
    """Named forms, thoughts, generation marks, special tokens, white space that a template trims."""
    template = (
        "{{ eos_token }}{% for m in messages %}{% generation %}{{ m.role }}:{{ m.content|trim }}{{ m.thinking }}"
        "{{ m.reasoning_content }}{% endgeneration %}{% if loop.index > 8 %}{% break %}{% endif %}\n{% endfor %}"
        "{{ tools|tojson(indent=2) }}{{ strftime_now('%Y') }}{{ namespace(a=1).a }}{{ dict(a=1)['a'] }}"
        "{% if add_generation_prompt %}now{% endif %}"
    )
    own = with_template(template)
    turns = [*MESSAGES, {"role": "assistant", "reasoning_content": "hm é", "content": last}]
    offered = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, "é\u2028"]}}}]
    written = templates.written(own, turns, offered, begin_answer=not go_on, go_on=go_on)
    options = {"add_generation_prompt": not go_on, "continue_final_message": go_on}
    assert written == own.apply_chat_template(turns, tools=offered, tokenize=False, **options)
