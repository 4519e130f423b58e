"""YAML as a policy may use it: plain data, each thing said once and meaning what it looks like.

The scalars are those of YAML 1.2's core schema, in decimal: `off` is a string and not false, `1e6` is a
number, and `010` is neither eight nor ten.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from steerserve.errors import RequestError

__all__ = ["read_yaml"]

MAX_DEPTH = 16
# A parser written in Python takes a second for so many.
MAX_VALUES = 20_000

_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_SCALARS = {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": _INT,
    "float": rf"{_INT}\.[0-9]*(?:[eE][-+]?[0-9]+)?|{_INT}[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
}


def read_yaml(content: bytes) -> object:
    """The one document of a UTF-8 text, as plain values.

    Raises: RequestError naming the line and column.
    """
    try:
        return _Loader(content.decode()).get_single_data()
    except UnicodeDecodeError as error:
        message = f"expected UTF-8, got byte 0x{content[error.start]:02x} at offset {error.start}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" on line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = " ".join(part for part in (error.context, error.problem) if part)
        message = f"expected YAML: {said}{where}"
    except (yaml.YAMLError, ValueError) as error:
        message = f"expected YAML: {error}"
    raise RequestError(" ".join(message.split()), at=())


class _Loader(yaml.SafeLoader):
    """Refuses aliases, tags, repeated keys, keys that are no strings, deep nesting, and lone surrogates."""

    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused("no anchors and aliases", event)
        if event.tag is not None:
            raise _refused("no tags", event)
        if isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(event.value):
            raise _refused("no lone surrogates", event)
        if self.depth >= MAX_DEPTH:
            raise _refused(f"at most {MAX_DEPTH} levels", event)
        if self.values >= MAX_VALUES:
            raise _refused(f"at most {MAX_VALUES} keys and values", event)
        self.values += 1
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                raise _refused("keys to be strings", key)
            if key.value in seen:
                raise _refused(f"each key once, got `{key.value[:64]}` again", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern})\\Z"), None)


def _refused(wanted: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"expected {wanted}", problem_mark=place.start_mark)
