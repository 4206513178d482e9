"""How the fields of a request are read: what may be left out, what is refused by name, which forms become one.

null means the same as leaving a field out. Knows no endpoint.
"""

import reprlib
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 128
Neutral = dict[str, tuple[Any, ...] | None]  # a field that is not built → the values that ask for nothing; None: any


class Model(BaseModel):
    """An object of a request; fields that are neither its own nor NEUTRAL are errors, and so are other types."""

    NEUTRAL: ClassVar[Neutral] = {}
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name in [name for name in given if name not in cls.model_fields]:
            allowed = cls.NEUTRAL.get(name, ())
            if name in cls.NEUTRAL and (allowed is None or any(_same(given[name], each) for each in allowed)):
                del given[name]
            elif name in cls.NEUTRAL:
                raise wrong(name, f"{name} = {reprlib.repr(given[name])} is not supported by this server; leave it out")
        return given


def wrong(param: str | None, message: str) -> PydanticCustomError:
    """A validation error about a field, in one line of ours."""
    return PydanticCustomError("wrong", "{message}", {"param": param, "message": message})


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half a character
        raise ValueError(f"no text: {error.reason}") from error
    return text


Words = Annotated[str, AfterValidator(_encodable)]  # any text
Said = Annotated[Words, Field(min_length=1)]


def listed(kind: str) -> BeforeValidator:
    """A text or a list of them, as a list."""

    def read(value: Any) -> list[str]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
            raise wrong(
                kind, f"{kind} must be a text or a list of texts, none of them empty; got {reprlib.repr(value)}"
            )
        return values

    return BeforeValidator(read)


def prompts(value: Any) -> list[str | list[int]]:
    """The four forms of a prompt as a list of texts or of token lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token, value))):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS and all(map(_is_prompt, value)):
        return value
    forms = f"a text, a list of token ids, or a list of at most {MAX_PROMPTS} of either, none of them empty"
    raise wrong("prompt", f"prompt must be {forms}; got {reprlib.repr(value)}")


def _is_prompt(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or (
        isinstance(value, list) and value != [] and all(map(_is_token, value))
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
