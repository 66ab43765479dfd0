"""A form filled in: plain values (dicts, lists, scalars) become a dataclass, strictly, each setting checked.

The dataclass is the form: a field's type says what may stand there, and what stands beside the type
(`Annotated[float, Range(…)]`, `Annotated[str, Letters(…)]`) says in which range or letters. `build` fills a
form in; `check` looks at one that was made in code.

Does not do: rules between two settings; those stand in the form's `__post_init__`.
"""

import dataclasses
import re
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal, Protocol, TypeVar, runtime_checkable

from forms.ranges import Range, shown

T = TypeVar("T")
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,9}")


@runtime_checkable
class Rule(Protocol):
    """What stands beside a type: `Range`, `Entries`, `Letters`."""

    def check(self, value: Any, where: str) -> None:
        """Raise `ValueError` naming the setting `where` unless `value` is as the rule says."""
        ...


def build(kind: type[T], values: Any, where: str = "plan") -> T:
    """Build dataclass `kind` from plain `values` (dicts, lists, scalars), strictly.

    Raises `ValueError` naming the setting when a key is unknown or missing, a value has another type, or is
    outside of its range.
    """
    result: T = _value(kind, values, where)
    return result


def check(form: Any, where: str) -> None:
    """Raise `ValueError` unless every setting of a dataclass, and of those inside it, is in its range."""
    kind: Any = type(form)
    for name, hint in hints(kind).items():
        _check(hint, getattr(form, name), f"{where}.{name}")


@cache
def hints(kind: Any) -> dict[str, Any]:
    """Types of a form's settings, with what stands beside them."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def _check(hint: Any, value: Any, where: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if origin is Annotated:
        _check(arguments[0], value, where)
        _rules(hint, value, where)
    elif dataclasses.is_dataclass(hint):
        check(value, where)
    elif origin in (types.UnionType, typing.Union):
        words, inner = _either(arguments)
        if value not in words:
            _check(inner, value, where)
    elif origin is tuple:
        for i, entry in enumerate(value):
            _check(arguments[0] if arguments[-1] is Ellipsis else arguments[i], entry, f"{where}[{i}]")
    elif origin is dict:
        for key, entry in value.items():
            _check(arguments[0], key, f"the name {shown(key)} in {where}")
            _check(arguments[1], entry, f"{where}.{key}")


def _rules(hint: Any, value: Any, where: str) -> None:
    """Check `value` against what stands beside its type; a range holds for each number of a list."""
    for rule in (one for one in typing.get_args(hint)[1:] if isinstance(one, Rule)):
        if isinstance(rule, Range) and isinstance(value, tuple):
            for i, entry in enumerate(value):
                rule.check(entry, f"{where}[{i}]")
        else:
            rule.check(value, where)


def _either(arguments: tuple[Any, ...]) -> tuple[tuple[str, ...], Any]:
    """Of a type that is one or the other (`int | None`, `Literal["auto"] | int`): words, and the type beside
    them."""
    kinds = [a for a in arguments if a is not type(None)]
    if len(kinds) == 1:
        return (), kinds[0]
    (words,) = [a for a in kinds if typing.get_origin(a) is Literal]
    (inner,) = [a for a in kinds if a is not words]
    return typing.get_args(words), inner


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        built = _value(arguments[0], value, where)
        if built is not None:
            _rules(kind, built, where)
        return built
    if origin is Literal:
        if not isinstance(value, str | int) or value not in arguments:
            raise ValueError(
                f"Expected {where} to be one of {', '.join(map(str, arguments))}; got {shown(value)}."
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        words, inner = _either(arguments)
        if isinstance(value, str) and words:
            if value not in words:
                raise ValueError(
                    f"Expected {where} to be {', '.join(words)} or a number; got {shown(value)}."
                )
            return value
        return _value(inner, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"Expected {where} to be a mapping; got {shown(value)}.")
        if arguments[0] is int:  # JSON has no names but texts
            value = {int(k) if isinstance(k, str) and _WHOLE.fullmatch(k) else k: v for k, v in value.items()}
        return {
            _value(arguments[0], k, f"the name {shown(k)} in {where}"): _value(
                arguments[1], v, f"{where}.{k}"
            )
            for k, v in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _float(value, where)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"Expected {where} to be {kind.__name__}; got {shown(value)}.")
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"Expected {where} to be a list; got {shown(value)}.")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ValueError(f"Expected {where} to have {len(kinds)} values; got {len(value)}.")
    return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"Expected {where} to be float; got a whole number that none can hold.") from None


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"Expected {where} to be a mapping; got {shown(value)}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := [name for name in value if name not in fields]:
        raise ValueError(f"{where} has no setting {shown(unknown[0])}; it has {', '.join(fields)}.")
    types_of = hints(kind)
    built = {name: _value(types_of[name], v, f"{where}.{name}") for name, v in value.items()}
    required = {
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(built)):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return kind(**built)
