"""YAML as people write settings: read strictly, so that what is read is what is seen.

YAML's core schema (1.2) and less: `true` and `false` only, decimal numbers only (010 and 12:30 are text), a
day (2027-06-30) is a day. No key twice, no anchors, aliases, merges or tags, bounded size and depth. A
setting that is a number but is written as text is then refused by its form, by name.

Does not do: say what the values mean (`forms/form.py`), or write.
"""

import datetime
import re
from typing import Any

import yaml
from yaml import events, nodes

from forms.ranges import brief

LONGEST = 100_000
"""Bytes of a text, at most."""
DEEPEST = 12
"""Lists and mappings within each other, at most."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, with other words for plain values, and no key twice."""

    def construct_mapping(self, node: nodes.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with distinct text keys; raises `ValueError`."""
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"a setting's name is text; got {str(key)[:60]!r} in line {_line(key_node)}")
            if key in values:
                raise ValueError(f"{key[:60]!r} is there twice, again in line {_line(key_node)}")
            values[key] = self.construct_object(value_node, deep=True)
        return values


def _mapping(loader: _Loader, node: nodes.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node)


def _integer(loader: _Loader, node: nodes.ScalarNode) -> int:
    return int(node.value)


def _number(loader: _Loader, node: nodes.ScalarNode) -> float:
    return float(node.value)


def _day(loader: _Loader, node: nodes.ScalarNode) -> datetime.date:
    return datetime.date.fromisoformat(node.value)


_Loader.yaml_implicit_resolvers = {}
_TAG = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{0,20})?(?:[eE][-+]?[0-9]{1,2})?", list("-+0123456789")),
    ("timestamp", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", list("0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor(_TAG + "map", _mapping)
_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", _number)
_Loader.add_constructor(_TAG + "timestamp", _day)


def read_yaml(text: str | bytes, what: str = "YAML") -> Any:
    """The value that `text` (UTF-8) holds; raises `ValueError` in one line that says `what` was expected."""
    if len(text) > LONGEST:
        raise ValueError(f"Expected {what} of at most {LONGEST:,} characters; got {len(text):,}.")
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8")
        _check_events(plain)
        return yaml.load(plain, Loader=_Loader)
    except UnicodeError:
        raise ValueError(f"Expected {what} in UTF-8; got other bytes.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {what}; it is not YAML ({_reason(error)}).") from None
    except ValueError as error:
        raise ValueError(f"Expected {what}; {error}.") from None


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = _line(event)
        if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"anchors and aliases are not read; there is one in line {line}")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"tags are not read; there is one in line {line}")
        depth += isinstance(event, events.CollectionStartEvent) - isinstance(event, events.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels, in line {line}")


def _line(where: nodes.Node | events.Event) -> int:
    assert where.start_mark is not None  # PyYAML marks whatever it reads from text
    return int(where.start_mark.line) + 1


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return brief(error)
