"""Chat templates with a thinking mode, and tokenizers and models that have them."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from tests.vlm import genuine
from tests.vlm.checkpoints import text_model
from vlm import nano
from vlm.service import tokenizer

# As DeepSeek-R1's: the prompt begins the thought, and past answers are cut at its end mark.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}[User]{{ m.content }}{% else %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "[Assistant]{{ content }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[Assistant]<think>\n{% endif %}"
)
# As DeepSeek-V3.1's: a switch, which is off where nothing is said.
DEEPSEEK_SWITCH = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + DEEPSEEK.replace(
    "[Assistant]{{", "[Assistant]</think>{{"
).replace("<think>\n{% endif %}", "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}")


def vision() -> str:
    """Qwen3-VL's template with a thought in the assistant's turn and at the end of the prompt, as its thinking models
    have it."""
    written = genuine.template("qwen3_vl").replace(
        "assistant\\n' }}\n{%- endif %}", "assistant\\n<think>\\n' }}\n{%- endif %}"
    )
    turn = "{%- elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role + '\\n' }}\n"
    thought = "        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}\n"
    assert turn in written
    return written.replace(turn, turn + thought)


@cache
def with_template(template: str) -> Any:
    """The nano tokenizer with another template; not to be changed."""
    made = copy.copy(tokenizer(nano.NAME))
    made.chat_template = template
    return made


def model(folder: Path, template: str, kind: str = "llama") -> Path:
    """Write a random text model with this template."""
    text_model(folder, kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder
