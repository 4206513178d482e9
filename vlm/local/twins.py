"""What the local clients have of the SDK's by rule: its `*_async` methods, each a method of the same name for callers
in an event loop, and an error with the way out for what only a server has."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture as Future

from kshot.errors import RequestError

T = TypeVar("T")


class ServerOnlyError(RequestError, AttributeError):
    """A method of the SDK that the client in this process does not have; `hasattr` is False for it."""


def with_refusals(sdk: type) -> Callable[[type[T]], type[T]]:
    """A decorator of a class that stands for one of the SDK's: what that has and this has not is an error that says
    so."""

    def add(cls: type[T]) -> type[T]:
        def missing(self: T, name: str) -> Any:
            if name.startswith("_") or not hasattr(sdk, name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            way_out = "ask a server for it: kshot serve, and vlm.connect with its address"
            raise ServerOnlyError(f"{sdk.__name__}.{name} is not supported by the local service; {way_out}")

        setattr(cls, "__getattr__", missing)  # noqa: B010 - a type checker would take it for every name
        return cls

    return add


def with_async_twins(*submitted: str, awaited: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
    """A decorator of a class that adds `NAME_async` for each name, with the method's arguments.

    submitted: those that give the method's future, once the request is made, as the SDK does. awaited: those that give
    its result.
    """

    def add(cls: type[T]) -> type[T]:
        for name in (*submitted, *awaited):
            setattr(cls, f"{name}_async", _twin(getattr(cls, name), waits=name in awaited))
        return cls

    return add


def _twin(method: Callable[..., Any], *, waits: bool) -> Callable[..., Any]:
    @wraps(method)
    async def twin(*args: Any, **kwargs: Any) -> Any:
        made = method(*args, **kwargs)
        return await made if waits and isinstance(made, Future) else made

    twin.__name__ = twin.__qualname__ = f"{method.__name__}_async"
    return twin
