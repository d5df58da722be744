"""Methods of a client, made of descriptions.

    class Files(Generic[M]):
        get = Sends(_calls.get_file)

On a `Files[Sync]`, `get` is `(id: str) -> File`; on a `Files[Async]` it is the same with an
answer to be awaited; on `Files[RawSync]` it returns a `RawResponse[File]`. There is one class
and one line a method, so the twins cannot drift apart, and type checkers see each as it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from recoup._calls import Call
from recoup._flow import Flow, RawResponse
from recoup._http import Async, RawAsync, RawSync, Sync

if TYPE_CHECKING:
    from recoup.schemas import Page

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


class Bound(Protocol[M_co]):
    """Something whose methods are sent by a driver."""

    @property
    def _driver(self) -> M_co: ...


class Sends(Generic[P, T]):
    """A method that sends one call and returns its parsed answer."""

    def __init__(self, describe: Callable[P, Call[T]]) -> None:
        self.describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, bound: Bound[Sync], owner: object) -> Callable[P, T]: ...
    @overload
    def __get__(self, bound: Bound[Async], owner: object) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, bound: Bound[RawSync], owner: object) -> Callable[P, RawResponse[T]]: ...
    @overload
    def __get__(
        self, bound: Bound[RawAsync], owner: object
    ) -> Callable[P, Coroutine[Any, Any, RawResponse[T]]]: ...
    @overload
    def __get__(self, bound: None, owner: object) -> Sends[P, T]: ...

    def __get__(self, bound: Bound[Any] | None, owner: object) -> Any:
        return self if bound is None else _method(self.describe, bound._driver.send)


class Lists(Generic[P, T]):
    """A method that iterates over all pages of a list; raw, it returns one page."""

    def __init__(self, describe: Callable[P, Call[Page[T]]]) -> None:
        self.describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, bound: Bound[Sync], owner: object) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, bound: Bound[Async], owner: object) -> Callable[P, AsyncIterator[T]]: ...
    @overload
    def __get__(self, bound: Bound[RawSync], owner: object) -> Callable[P, RawResponse[Page[T]]]: ...
    @overload
    def __get__(
        self, bound: Bound[RawAsync], owner: object
    ) -> Callable[P, Coroutine[Any, Any, RawResponse[Page[T]]]]: ...
    @overload
    def __get__(self, bound: None, owner: object) -> Lists[P, T]: ...

    def __get__(self, bound: Bound[Any] | None, owner: object) -> Any:
        return self if bound is None else _method(self.describe, bound._driver.pages)


class Runs(Generic[P, T]):
    """A method of several calls that returns a value; it has no raw form."""

    def __init__(self, flow: Callable[P, Flow[T]]) -> None:
        self.flow = flow
        self.__doc__ = flow.__doc__

    @overload
    def __get__(self, bound: Bound[Sync], owner: object) -> Callable[P, T]: ...
    @overload
    def __get__(self, bound: Bound[Async], owner: object) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, bound: None, owner: object) -> Runs[P, T]: ...

    def __get__(self, bound: Bound[Any] | None, owner: object) -> Any:
        return self if bound is None else _method(self.flow, bound._driver.run)


class Emits(Generic[P, T]):
    """A method of several calls that iterates over what its flow emits; it has no raw form."""

    def __init__(self, flow: Callable[P, Flow[None]], of: Callable[[], type[T]]) -> None:
        """`of`: gives the type of what it emits."""
        self.flow, self.of = flow, of
        self.__doc__ = flow.__doc__

    @overload
    def __get__(self, bound: Bound[Sync], owner: object) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, bound: Bound[Async], owner: object) -> Callable[P, AsyncIterator[T]]: ...
    @overload
    def __get__(self, bound: None, owner: object) -> Emits[P, T]: ...

    def __get__(self, bound: Bound[Any] | None, owner: object) -> Any:
        return self if bound is None else _method(self.flow, bound._driver.emitted)


def _method(describe: Callable[..., Any], perform: Callable[[Any], Any]) -> Callable[..., Any]:
    """With the signature and the docstring of the description."""

    @wraps(describe)
    def method(*args: Any, **kwargs: Any) -> Any:
        return perform(describe(*args, **kwargs))

    return method
