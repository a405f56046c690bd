"""YAML text to a tree whose nodes remember their file and line.

Owns reading: safe tags only, no repeated key, limits on size, depth and aliases, and YAML 1.2's plain scalars
(`2e-4` is a number, `no` is a word). Knows no recipe key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from workers.types import BadInput

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_NODES = 10_000
"""Counted after aliases are expanded, so a small file cannot grow into a large tree."""

Scalar: TypeAlias = str | int | float | bool | None
Key: TypeAlias = str | int


@dataclass(frozen=True)
class Place:
    """Where something is written; prints as `file:line`."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value and its place. A mapping's value stands at the line of its key."""

    value: dict[str, Node] | list[Node] | Scalar
    place: Place

    def plain(self) -> object:
        """The value as plain Python, places dropped."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, path: Sequence[Key]) -> Node:
        """The node at `path`, or the deepest one on the way there."""
        node = self
        for key in path:
            if isinstance(node.value, dict) and key in node.value:
                node = node.value[str(key)]
            elif isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
        return node

    def mapping(self) -> dict[str, Node]:
        """The children of a mapping. Raises BadInput for anything else."""
        if not isinstance(self.value, dict):
            raise BadInput(f"{self.place}: keys and values are wanted here, found {self.plain()!r}")
        return self.value


def merge(under: Node, over: Node) -> Node:
    """`over` laid on `under`: mappings merge key by key, anything else is replaced."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(under.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.place)


def read_yaml(path: Path) -> Node:
    """The tree of one YAML file. Raises BadInput naming file and line."""
    text = _read_text(path)
    try:
        root = _Loader(text).get_single_node()
        if root is None:
            raise BadInput(f"{path}: the file is empty")
        return _Tree(path).convert(root, root.start_mark.line, 0)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: nested deeper than {MAX_DEPTH} levels") from error


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise BadInput(f"{path}: larger than {MAX_BYTES // 1024} KiB, which no recipe is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: not UTF-8 text") from error


_TAG = "tag:yaml.org,2002:"
_NUMBER = "-+.0123456789"
_PLAIN = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ("~", "n", "N", "")),
    ("bool", re.compile(r"(?:[tT]rue|[fF]alse)$"), tuple("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+$"), tuple(_NUMBER)),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"), tuple(_NUMBER)),
)
_SCALARS: dict[str, Callable[[str], Scalar]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "str": str,
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema in place of 1.1's."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(_TAG + name, pattern) for name, pattern, firsts in _PLAIN if first in firsts]
        for first in {first for *_, firsts in _PLAIN for first in firsts}
    }


class _Tree:
    """Turns PyYAML's nodes into ours, counting as it goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nodes = 0

    def convert(self, node: yaml.Node, line: int, depth: int) -> Node:
        place = Place(self.path, line + 1)
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise BadInput(f"{place}: nested deeper than {MAX_DEPTH} levels")
        if self.nodes > MAX_NODES:
            raise BadInput(f"{place}: more than {MAX_NODES} values once aliases are expanded")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Node(self.children(node, depth), place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [self.convert(item, item.start_mark.line, depth + 1) for item in node.value]
            return Node(items, place)
        return Node(self.scalar(node, place), place)

    def children(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            key = self.scalar(key_node, Place(self.path, line + 1))
            if not isinstance(key, str):
                raise BadInput(f"{self.path}:{line + 1}: a key must be a word, found {key!r}")
            if key in found:
                raise BadInput(
                    f"{self.path}:{line + 1}: key {key!r} is repeated; the first is {found[key].place}"
                )
            found[key] = self.convert(value_node, line, depth + 1)
        return found

    def scalar(self, node: yaml.Node, place: Place) -> Scalar:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            raise BadInput(f"{place}: the tag {node.tag!r} is not allowed in a recipe")
        try:
            return _SCALARS[node.tag](node.value)
        except ValueError as error:
            raise BadInput(f"{place}: {node.value!r} is not a {node.tag.removeprefix(_TAG)}") from error
