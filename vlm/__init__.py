"""The vision-language side: prompts, the training API, the local engine, classification by answering in text.

`connect` gives a service client whose methods, arguments and futures are those of the official `tinker` SDK. Importing
this package loads neither torch nor transformers nor the SDK: they are loaded where they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.inputs import ImageRule as ImageRule
    from vlm.inputs import datum as datum
    from vlm.inputs import image_chunk as image_chunk
    from vlm.inputs import model_input as model_input
    from vlm.prompts import Prompt as Prompt
    from vlm.prompts import template as template
    from vlm.scoring import score_choices as score_choices
    from vlm.service import connect as connect
    from vlm.thinking import split_tokens as split_tokens

_PUBLIC = {
    "connect": "vlm.service",
    "score_choices": "vlm.scoring",
    "Prompt": "vlm.prompts",
    "template": "vlm.prompts",
    "ImageRule": "vlm.inputs",
    "datum": "vlm.inputs",
    "image_chunk": "vlm.inputs",
    "model_input": "vlm.inputs",
    "split_tokens": "vlm.thinking",
}
__all__ = sorted(_PUBLIC)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
