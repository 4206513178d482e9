"""Chats as the model's template writes them: which template that is, and what it writes.

The template runs in a process of its own, one a model, which is ended where it takes too much time or memory (see
`rendering`), so that no model's template holds up others.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, finalize

from kshot.errors import PromptError
from vlm import rendering

SECONDS = 2.0  # of computing that one conversation may take
MEMORY = 1 << 29  # bytes of address space of the process
LONGEST = 1 << 22  # characters of a conversation, in JSON: far beyond any model's context
THREADS = 2  # a model, that prepare its prompts
PROGRAM = Path(__file__).with_name("rendering.py")
MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers writes it
END_OF_TURN = "<|im_end|>"
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
IMAGE_BLOCK = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
CHATML = Path(__file__).with_name("chatml.jinja").read_text()  # ours: the turns of Qwen3-VL
PROBE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}


class Renderer:
    """The process for one model's templates, started when it is needed, and the threads that prepare its prompts."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS, "kshot-prompts")
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known = dict[str, dict[str, str]]()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """What the template writes. Raises ValueError where it fails, PromptError where it goes beyond a limit."""
        return _text(self._reply(template, variables))

    def known(self, template: str, variables: Mapping[str, Any] | None) -> str:
        """The same, nothing where it fails, for variables that are few: what comes out is kept, limits too. Without
        variables: the names that the template reads, in JSON."""
        key = json.dumps([template, variables], default=str)
        reply = self._known.get(key) or self._reply(template, variables)
        if "ended" not in reply:  # which may go well the next time
            self._known[key] = reply
        try:
            return _text(reply)
        except ValueError:  # a template of texts alone trips over a list
            return ""

    def close(self) -> None:
        """End the threads, when they are done, and the process."""
        self.pool.shutdown()
        with self._lock:
            if self._process is not None:
                self._ending()
                self._process = None

    def _reply(self, template: str, variables: Mapping[str, Any] | None) -> dict[str, str]:
        line = json.dumps({"template": template, "variables": variables}, default=str).encode() + b"\n"
        if len(line) - len(template) > LONGEST:
            raise PromptError(f"the messages have {len(line):,} characters; at most {LONGEST:,} are read")
        if template == CHATML:  # ours: it needs no process
            return rendering.answer(template, variables)
        with self._lock:
            return self._ask(line)

    def _ask(self, line: bytes) -> dict[str, str]:
        if self._process is None:
            command = [sys.executable, "-I", str(PROGRAM), str(SECONDS), str(MEMORY)]
            pipe = subprocess.PIPE
            # a session of its own: Ctrl-C is for the server, which ends it
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
            self._ending = finalize(self, _end, self._process)
        process: Any = self._process  # its pipes are there
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
            if reply := process.stdout.readline():
                answer: dict[str, str] = json.loads(reply)
                return answer
        status, self._process = self._ending(), None
        if status == -signal.SIGPROF:
            return {"limit": f"it computes for more than {SECONDS:g} seconds"}
        return {"ended": f"its process ended with status {status}"}


def _text(reply: Mapping[str, str]) -> str:
    """What was written. Raises as `Renderer.render`."""
    if "error" in reply:
        raise ValueError(reply["error"])
    if "text" not in reply:
        why, way_out = (reply["limit"], "take another model") if "limit" in reply else (reply["ended"], "ask again")
        raise PromptError(f"the model's chat template was ended: {why}; {way_out}")
    return reply["text"]


def _end(process: "subprocess.Popen[bytes]") -> int:
    """The status of a process that has ended by now, or is ended."""
    ending: Any = process  # its pipes are there
    with suppress(BrokenPipeError):
        ending.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    ending.stdout.close()
    return process.wait()


_RENDERERS: "WeakKeyDictionary[Any, Renderer]" = WeakKeyDictionary()
_MAKING = Lock()


def renderer(tokenizer: Any) -> Renderer:
    """The one of a model."""
    with _MAKING:
        if tokenizer not in _RENDERERS:
            _RENDERERS[tokenizer] = Renderer()
        return _RENDERERS[tokenizer]


def close() -> None:
    """End the threads and processes of all models."""
    with _MAKING:
        renderers = [*_RENDERERS.values()]
    for each in renderers:
        each.close()
    with _MAKING:
        _RENDERERS.clear()  # now: what was being prepared finds its own


def chosen(tokenizer: Any, *, takes_images: bool, tools: Sequence[Any] | None = None) -> str | None:
    """The template of a model: its tokenizer's own if that writes images, or the model takes none; else CHATML where
    the tokenizer knows its tokens; else None. Raises PromptError for an own one that goes beyond a limit."""
    try:
        own = str(tokenizer.get_chat_template(tools=tools))
    except ValueError:  # it has none
        own = ""
    if own and (not takes_images or probed(tokenizer, own, [PROBE]).count(IMAGE_BLOCK) == 1):
        return own
    return CHATML if END_OF_TURN in tokenizer.added_tokens_encoder else None


def written(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    begin_answer: bool = False,
    go_on: bool = False,
) -> str:
    """What `tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False,
    add_generation_prompt=begin_answer, continue_final_message=go_on, **variables)` of transformers gives.

    Raises ValueError for what the template cannot write, PromptError where it goes beyond a limit.
    """
    own = tokenizer.get_chat_template(template, tools)
    chat = [_aliased({key: value for key, value in each.items() if value is not None}) for each in messages]
    last = _marked(chat[-1]) if go_on else ""
    values = _variables(tokenizer, chat, tools, variables, begin_answer=begin_answer)
    text = renderer(tokenizer).render(own, values)
    return _until_mark(text, last) if go_on else text


def probed(
    tokenizer: Any,
    template: str,
    messages: Sequence[Any],
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    begin_answer: bool = False,
) -> str:
    """The same of a conversation that is always the same, computed once; nothing where it cannot be written."""
    chat = [_aliased(each) for each in messages]
    values = _variables(tokenizer, chat, tools, variables, begin_answer=begin_answer)
    return renderer(tokenizer).known(template, values)


def names(tokenizer: Any, template: str) -> list[str]:
    """The names that a template reads, beyond those that every conversation has."""
    found: list[str] = json.loads(renderer(tokenizer).known(template, None) or "[]")
    return [name for name in found if name not in _variables(tokenizer, (), None, None, begin_answer=False)]


def _variables(
    tokenizer: Any, chat: Any, tools: Any, more: Mapping[str, Any] | None, *, begin_answer: bool
) -> dict[str, Any]:
    of_chat = {"messages": chat, "tools": tools, "documents": None, "add_generation_prompt": begin_answer}
    return {**tokenizer.special_tokens_map, **(more or {}), **of_chat}


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """A thought also by the name that some templates read."""
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}


def _marked(message: dict[str, Any]) -> str:
    """The last text of a message, which it then has with a mark behind it."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + MARK
        return content
    number = max((n for n, part in enumerate(content) if "text" in part), default=None)
    if number is None:
        raise ValueError("the last message has no text to continue")
    text: str = content[number]["text"]
    message["content"] = [*content[:number], {**content[number], "text": text + MARK}, *content[number + 1 :]]
    return text


def _until_mark(text: str, last: str) -> str:
    """What stands before the mark; where the template has trimmed the message, without white space at the end."""
    before, mark, after = text.rpartition(MARK.strip())
    if not mark or last.strip() not in text:
        raise ValueError("it leaves out the end of the last message, which is to be continued")
    return before if after.startswith(MARK[-1]) else before.rstrip()
