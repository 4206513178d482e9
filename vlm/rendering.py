"""The process in which chat templates of models are run: `python rendering.py SECONDS BYTES`, which knows jinja2 alone.

A template is a program of strangers. Jinja's sandbox keeps it from files and from Python; this process keeps it from
all the time and memory, also where one operation takes them ('a' * 10**9): past the limits the system ends the process.
Each line of stdin is a request {template, variables}, each line of stdout its answer, {text} or {error}. Without
variables the text is the names that the template reads, in JSON.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 1 << 24  # characters that a template may write


class Generation(Extension):
    """{% generation %}: the marks around what an assistant wrote, which add nothing to the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _fail(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """As `transformers.utils.chat_template_utils` makes it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _names(template: str) -> list[str]:
    """Names that the template reads, but functions."""
    found = {name.name for name in _environment().parse(template).find_all(nodes.Name) if name.ctx == "load"}
    return sorted(found - _environment().globals.keys())


def answer(template: str, variables: Mapping[str, Any] | None) -> dict[str, str]:
    """What the template writes, or why it writes nothing. variables: None for the names that it reads."""
    try:
        text = json.dumps(_names(template)) if variables is None else _compiled(template).render(variables)
    except MemoryError:
        return {"limit": "it takes too much memory"}
    except RecursionError:
        return {"limit": "it calls itself without an end"}
    except Exception as error:  # whatever a template may do
        return {"error": next(iter(str(error).splitlines()), type(error).__name__)[:500]}
    if len(text) > MOST:
        return {"limit": f"it writes {len(text):,} characters, at most {MOST:,} are read"}
    return {"text": text}


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of computing: at its end the system ends the process
        reply = json.dumps(answer(**json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
