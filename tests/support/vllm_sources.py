"""vLLM's Python as text: classes, what they define, and what a model's class reaches. Nothing is imported.

So one version is read while another is installed, and so is a model whose kernels are not here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

__all__ = ["Definition", "Sources"]

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Defined = _Function | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Definition:
    """A class, function or value at the top level of a module."""

    module: str
    name: str
    node: ast.AST = field(compare=False, repr=False)

    @property
    def path(self) -> str:
        """`module:name`, without the `vllm.` that all begin with."""
        return f"{self.module.removeprefix('vllm.')}:{self.name}"

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of it, those apart that only say how a name is used."""
        found, todo = [], [self.node]
        while todo:
            node = todo.pop()
            found.append(node)
            for value in vars(node).values():
                if isinstance(value, list):
                    todo += [item for item in value if isinstance(item, ast.AST)]
                elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                    todo.append(value)
        return tuple(found)

    @cached_property
    def names(self) -> frozenset[str]:
        """Every identifier in it: names, attributes and keywords."""
        found = (_NAMED[type(node)](node) for node in self.nodes if type(node) in _NAMED)
        return frozenset(name for name in found if name)

    @cached_property
    def strings(self) -> frozenset[str]:
        """Every text in it."""
        constants = (node.value for node in self.nodes if isinstance(node, ast.Constant))
        return frozenset(value for value in constants if isinstance(value, str))


_NAMED: dict[type[ast.AST], Callable[[Any], str | None]] = {
    ast.Name: attrgetter("id"),
    ast.Attribute: attrgetter("attr"),
    ast.keyword: attrgetter("arg"),
}


class _Module:
    """The top level of one file: what it defines, and what it imports from where."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.is_package = path.name == "__init__.py"
        self.definitions: dict[str, ast.AST] = {}
        # A package that chooses by platform imports one name from several places.
        self.imports: dict[str, list[tuple[str, str]]] = {}
        self._read(ast.parse(path.read_text(encoding="utf-8")).body)

    def _read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, _Function | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign):
                self.definitions.update({t.id: node for t in node.targets if isinstance(t, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.definitions[node.target.id] = node
            elif isinstance(node, ast.ImportFrom):
                self._note(node)
            elif isinstance(node, ast.If):
                self._read([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                self._read([*node.body, *node.orelse, *(s for h in node.handlers for s in h.body)])

    def _note(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            up = self.name.split(".")[: len(self.name.split(".")) - node.level + self.is_package]
            source = ".".join([*up, source] if source else up)
        for alias in node.names:
            self.imports.setdefault(alias.asname or alias.name, []).append((source, alias.name))


class Sources:
    """The package `vllm` in a folder.

    Args:
        root: the folder that holds `vllm/`, such as `site-packages`, or where a wheel was unpacked.
        within: what the names of modules begin with that are read.
    """

    def __init__(self, root: Path, within: tuple[str, ...] = ("vllm",)) -> None:
        self.root, self._within = root, within
        self._module = lru_cache(maxsize=None)(self._load)
        # One object for each definition, so that what is found out about it is found out once.
        self.find = lru_cache(maxsize=None)(self._find)

    def _load(self, name: str) -> _Module | None:
        place = self.root.joinpath(*name.split("."))
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.exists():
                return _Module(name, path)
        return None

    def _find(self, module: str, name: str) -> list[Definition]:
        """What `module.name` is, followed through imports; several where that depends on the platform."""
        loaded = self._module(module)
        if loaded is None:
            return []
        if name in loaded.definitions:
            return [Definition(module, name, loaded.definitions[name])]
        places = [place for place in loaded.imports.get(name, ()) if place[0].startswith(self._within)]
        return [found for place, original in places for found in self.find(place, original)]

    def function(self, module: str, dotted: str) -> _Function | None:
        """The function of that dotted name, in its class or in what that inherits from."""
        *owner, name = dotted.split(".")
        if not owner:
            found = [d.node for d in self.find(module, name)]
        else:
            found = [
                member
                for cls in self.ancestry(module, owner[0])
                for member in cls.body
                if isinstance(member, _Function) and member.name == name
            ]
        return next((node for node in found if isinstance(node, _Function)), None)

    def ancestry(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        """A class and those of vLLM's that it inherits from."""
        for found in self.find(module, name):
            if isinstance(found.node, ast.ClassDef):
                yield found.node
                for base in found.node.bases:
                    inner = base.value if isinstance(base, ast.Subscript) else base
                    if isinstance(inner, ast.Name):
                        yield from self.ancestry(found.module, inner.id)

    def members(self, module: str, name: str) -> set[str]:
        """Methods, properties and fields of a class, and what its methods set on `self`."""
        return {member for cls in self.ancestry(module, name) for member in _members(cls)}

    def exports(self, module: str) -> set[str]:
        """Every name at the top level of a module, whether it is defined there or imported."""
        loaded = self._module(module)
        return set() if loaded is None else loaded.definitions.keys() | loaded.imports.keys()

    def edges(self, start: Iterable[Definition]) -> dict[Definition, set[Definition]]:
        """What each definition names, of these and of all that they lead to."""
        todo, found = list(start), dict[Definition, set[Definition]]()
        while todo:
            current = todo.pop()
            if current not in found:
                found[current] = {d for name in current.names for d in self.find(current.module, name)}
                todo += found[current]
        return found

    def mapping(self, module: str, name: str) -> Mapping[str, tuple[str, str]]:
        """A table of the model registry: architecture → (module, class)."""
        (found,) = self.find(module, name)
        assert isinstance(found.node, ast.Assign)
        table: dict[str, tuple[str, str]] = ast.literal_eval(found.node.value)
        return table


def _members(cls: ast.ClassDef) -> Iterator[str]:
    for node in cls.body:
        if isinstance(node, _Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
    for node in ast.walk(cls):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
            for part in ast.walk(target) if target is not None else ():
                if (
                    isinstance(part, ast.Attribute)
                    and isinstance(part.value, ast.Name)
                    and part.value.id == "self"
                ):
                    yield part.attr
