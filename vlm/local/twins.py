"""The SDK's `*_async` methods: each is a method of the same name, for callers in an event loop."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture as Future

T = TypeVar("T")


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
