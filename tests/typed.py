"""Types checked at run time, as jaxtyping's import hook has it, for less than half of its time.

jaxtyping checks the arguments of each call twice, before it and again with what it returns, and makes two
checking functions of each function, of one within another whenever that is made. Here beartype checks the
function itself, once it is called, within the scope of shapes that jaxtyping keeps for a call: the same
annotations, each once.

Does not do: generators, which are jaxtyping's own to check.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping._decorator import _destring_annotation
from jaxtyping._storage import pop_shape_memo, push_shape_memo

_theirs: Callable[..., Any] = jaxtyping.jaxtyped
_made: dict[CodeType, FunctionType] = {}


def install() -> None:
    """From here on, modules that jaxtyping's hook imports are checked this way."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]


def jaxtyped(decorated: Any = None, *, typechecker: Any = None) -> Any:
    """In place of `jaxtyping.jaxtyped`, as the hook writes it above each class and function."""
    if decorated is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(decorated):
        init = vars(decorated).get("__init__")
        if dataclasses.is_dataclass(decorated) and init is not None and not hasattr(init, "__wrapped__"):
            decorated.__init__ = _checked(init)  # type: ignore[misc]
        return decorated
    if inspect.isgeneratorfunction(decorated):
        return _theirs(decorated, typechecker=typechecker)
    return _checked(decorated)


def _checked(function: Any) -> Any:
    checking: Any = None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checking
        if checking is None:
            checking = _beartyped(function)
        push_shape_memo({})
        try:
            return checking(*args, **kwargs)
        finally:
            pop_shape_memo()

    return checked


def _beartyped(function: Any) -> Any:
    """The function with beartype's checks; of one that is made again and again, they are made once."""
    if "<locals>" not in function.__qualname__:
        return _made_for(function)
    if function.__code__ not in _made:
        _made[function.__code__] = _made_for(_hollow(function))
    made = _made[function.__code__]
    if made.__code__ is function.__code__:  # nothing to check
        return function
    same = FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__)
    same.__kwdefaults__ = {**made.__kwdefaults__, "__beartype_func": function}
    return same


def _hollow(function: Any) -> FunctionType:
    """The function without what it holds of the one around it, which would otherwise stay."""
    cells = tuple(CellType() for _ in function.__code__.co_freevars)
    hollow = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    return functools.update_wrapper(hollow, function, updated=())  # type: ignore[return-value]


def _made_for(function: Any) -> Any:
    for name, hint in function.__annotations__.items():  # a name that is there for mypy alone is anything
        function.__annotations__[name] = _destring_annotation(hint, function.__globals__)
    return beartype(function)
