"""YAML 1.2 from untrusted hands: plain data, where each key stands, and all that is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    NodeEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from seprune.errors import first_line
from seprune.runtime.reading import read_bytes

LARGEST = 16 * 1024
"""Bytes. The parser is pure Python: this bounds the time that a hostile file takes."""
DEEPEST = 12
"""Levels; ruamel needs quadratic time for thousands of them."""

COMMAND_LINE = "command line"

_SCALARS = YAML(typ="safe", pure=True).constructor

Key = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a key stands; sorts like the file reads, the command line last."""

    order: tuple[int, int]
    label: str


class Problem(NamedTuple):
    """One thing that is wrong: `file:line:col key: message`."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.place.label, self.key and f"{self.key}:", self.message)))


@dataclass
class Document:
    """A YAML file on its way in. `data` is None where it could not be parsed at all."""

    name: str
    data: Any = None
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, line: int, column: int) -> Place:
        """The place at a line and a column, both counted from 0."""
        return Place((line, column), f"{self.name}:{line + 1}:{column + 1}")

    def place_of(self, key: Key) -> Place:
        """Where `key` stands, or the innermost section around it that does."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.place(0, 0))

    def override(self, override: str) -> None:
        """Put `key=value` into the data, creating the sections on its way."""
        name, equals, text = override.partition("=")
        key, section = tuple(name.split(".")), self.data
        place = Place((2**31, len(self.places)), COMMAND_LINE)
        try:
            if not equals or not all(key):
                raise ValueError("must be key=value, such as plan.macs=0.5")
            value = parse_value(text)
            for length, part in enumerate(key[:-1], start=1):
                self.places.setdefault(key[:length], place)
                section[part] = {} if section.get(part) is None else section[part]
                section = section[part]
                if not isinstance(section, dict):
                    raise ValueError(f"{part} has no keys of its own (got {short(section)})")
            self.places[key] = place
            section[key[-1]] = value
        except ValueError as error:
            self.problems.append(Problem(place, name, str(error)))


def read_yaml(path: Path, name: str) -> Document:
    """Read one mapping from a file; faults are in `problems`, under the name that the user gave."""
    document = Document(name)
    place, message = document.place(0, 0), ""
    try:
        document.data = _parse(path, document)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})"
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = document.place(mark.line, mark.column) if mark else place
        message = _explain(str(error.problem))
    except (YAMLError, ValueError) as error:
        message = first_line(error)
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
    if message:
        document.problems.append(Problem(place, "", message))
    return document


def parse_value(text: str) -> Any:
    """One YAML value from the command line.

    Raises:
        ValueError: not a YAML value, in words.
    """
    document, value = Document(""), None
    try:
        value = _plain(_compose(text or "null"), (), document)
    except YAMLError as error:
        reason = error.problem if isinstance(error, MarkedYAMLError) else error
        document.problems.append(Problem(document.place(0, 0), "", _explain(str(reason))))
    if document.problems:
        message = document.problems[0].message.splitlines()[0]
        raise ValueError(f"not a YAML value: {message} (got {short(text)})")
    return value


def dump_yaml(data: dict[str, Any]) -> str:
    """Nested dicts as YAML, one line per key: lists are written `[1, 2]`."""
    yaml, stream = YAML(), StringIO()
    yaml.width = 2**20
    yaml.representer.add_representer(
        type(None), lambda out, _: out.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml.dump(_styled(data), stream)
    return stream.getvalue()


def dotted(key: Key) -> str:
    """`plan.macs`, as people write it."""
    return ".".join(map(str, key))


def short(value: Any) -> str:
    """A value for a message: JSON of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _parse(path: Path, document: Document) -> dict[str, Any]:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"is larger than {LARGEST // 1024} KB")
    node = _compose(read_bytes(path, limit=LARGEST).decode("utf-8-sig"))
    if node is None:
        raise ValueError("is empty")
    if not isinstance(node, MappingNode):
        raise ValueError("must be a mapping of keys, such as `name: my run`")
    plain: dict[str, Any] = _plain(node, (), document)
    return plain


def _compose(text: str) -> Node | None:
    """The node tree, after a look at the bare events: nothing that grows, nothing with a tag."""
    yaml = YAML(typ="safe", pure=True)
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            problem = "anchors and aliases (& and *) are not allowed"
        elif getattr(event, "tag", None):
            problem = f"tags are not allowed (got {event.tag})"
        elif isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            problem = "directives (%) are not allowed"
        elif depth > DEEPEST:
            problem = f"nested more than {DEEPEST} levels deep"
        else:
            continue
        raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def _plain(node: Node | None, key: Key, document: Document) -> Any:
    """A node as plain data; notes where its keys stand and which are given twice."""
    if node is None:
        return None
    document.places.setdefault(key, document.place(node.start_mark.line, node.start_mark.column))
    if isinstance(node, SequenceNode):
        return [_plain(item, (*key, i), document) for i, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        return _mapping(node, key, document)
    return _scalar(node, key, document)


def _mapping(node: MappingNode, key: Key, document: Document) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name_node, value_node in node.value:
        place = document.place(name_node.start_mark.line, name_node.start_mark.column)
        name = name_node.value if isinstance(name_node, ScalarNode) else "?"
        path = (*key, name)
        if name in plain:
            first = document.places[path].label
            document.problems.append(
                Problem(place, dotted(path), f"given twice (first at {first})")
            )
            continue
        document.places[path] = place
        plain[name] = _plain(value_node, path, document)
    return plain


def _scalar(node: Node, key: Key, document: Document) -> Any:
    """Numbers, booleans and null by YAML 1.2's rules; all else, dates too, is the text it is."""
    if str(node.tag).rpartition(":")[2] not in ("int", "float", "bool", "null"):
        return node.value
    try:
        return _SCALARS.construct_object(node)
    except ValueError as error:
        message = str(error).split(";")[0]
        document.problems.append(Problem(document.place_of(key), dotted(key), message))
        return None


def _styled(value: Any) -> Any:
    if isinstance(value, dict):
        section = CommentedMap({k: _styled(v) for k, v in value.items()})
        if not value:
            section.fa.set_flow_style()
        return section
    if isinstance(value, (list, tuple)):
        row = CommentedSeq(value)
        row.fa.set_flow_style()
        return row
    return value


def _explain(problem: str) -> str:
    """ruamel's words, or plainer ones for the mistakes that people make."""
    if "\\t" in problem:
        return "a tab where YAML wants spaces: indent with spaces"
    if "expected a single document" in problem or "another document" in problem:
        return "a second document starts here (---): a recipe is one document"
    return problem
