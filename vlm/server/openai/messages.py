"""What a chat of the OpenAI API is made of, field by field: messages and their parts, tools, formats of an answer."""

import json
import reprlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

Neutral = dict[str, tuple[Any, ...] | None]  # a field that is not supported → the values without an effect; None: any


class Model(BaseModel):
    """An object of a request; fields that are neither declared nor NEUTRAL are errors, and so are other types."""

    NEUTRAL: ClassVar[Neutral] = {}
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = {name: value for name, value in data.items() if value is not None}
        for name in fields.keys() & cls.NEUTRAL.keys():
            value, allowed = fields.pop(name), cls.NEUTRAL[name]
            if allowed is not None and not any(_same(value, each) for each in allowed):
                raise wrong(name, f"{name} = {reprlib.repr(value)} is not supported by this server; leave it out")
        return fields


def wrong(param: str | None, message: str) -> PydanticCustomError:
    """A validation error about a field, in one line of ours."""
    return PydanticCustomError("wrong", "{message}", {"param": param, "message": message})


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


class TextPart(Model):
    """str in a message."""

    type: Literal["text"]
    text: str


class ImageURL(Model):
    """Where an image is: a data: URL that holds it, or an http(s) address. How many pixels of it the model sees is the
    model's own rule, whatever the detail."""

    NEUTRAL: ClassVar[Neutral] = {"detail": ("auto", "low", "high", "original")}

    url: str


class ImagePart(Model):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _arguments(value: Any) -> dict[str, Any]:
    """What a text holds; without one, nothing."""
    try:
        made = from_json(value or "{}", allow_inf_nan=False) if isinstance(value, str) else value
        json.dumps(made)  # not so an integer of thousands of digits
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    return made


class CalledFunction(Model):
    """A function that was called. arguments: a JSON object, which comes as text."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(Model):
    """A call in the past."""

    NEUTRAL: ClassVar[Neutral] = {"id": None, "index": None}  # results stand in the order of the calls

    type: Literal["function"] = "function"
    function: CalledFunction


SYSTEM = "system", "developer"


class Message(Model):
    """A turn of a conversation. content: as a list of parts, whatever form it came in. reasoning_content: for
    templates that write the thoughts of the past."""

    NEUTRAL: ClassVar[Neutral] = {  # what no template writes, and what this kind of server's answers hold
        "name": None,
        "tool_call_id": None,
        "annotations": ([],),
        "type": ("message", "text"),  # lm-eval's
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = []
    tool_calls: list[ToolCall] = []
    reasoning_content: str | None = None


class Function(Model):
    """A function that may be called. parameters: the JSON schema of its arguments."""

    NEUTRAL: ClassVar[Neutral] = {"strict": None}  # arguments follow the schema in any case

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Model):
    """Something that the model may call: a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Model):
    """The function that must be called."""

    name: str


class NamedTool(Model):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class TextFormat(Model):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Model):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Model):
    """A JSON schema; without one, any JSON object."""

    NEUTRAL: ClassVar[Neutral] = {"strict": None, "name": None, "description": None}

    content: dict[str, Any] | None = Field(None, alias="schema")


class SchemaFormat(Model):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


AnyFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
