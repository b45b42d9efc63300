"""YAML files with line numbers: duplicate keys, tags, anchors and tabs are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl.config.coerce import Scalar
from verl.config.problems import Problem

_CORE_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
)


@dataclass(frozen=True)
class Entry:
    """A key of a mapping with the line it stands on, and its value: Scalar, list or entries."""

    name: str
    line: int
    value: Any


class Refused(yaml.MarkedYAMLError):
    """Something legal in YAML that a configuration may not use."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed, so no tag can run anything."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise Refused(
                problem=f"the alias *{event.anchor} is not supported; refer to another setting "
                "as ${section.key}",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> tuple[list[Entry], list[Problem]]:
    """Entries of a YAML file, and what is wrong with it. Never raises for a bad file."""
    where = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        absolute = Path(path).absolute()
        return [], [Problem(("config",), f"config={path}: there is no file {absolute}")]
    except UnicodeDecodeError:
        return [], [Problem(("config",), f"config={path}: not UTF-8 text; save it as UTF-8")]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return [], [Problem(("config",), f"config={path}: cannot be read ({reason})")]
    try:
        entries, refused = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        return [], [_syntax_problem(error, where)]
    except yaml.YAMLError as error:
        return [], [Problem(("config",), f"not valid YAML: {error}".replace("\n", " "), where)]
    problems = [_syntax_problem(error, where) for error in refused]
    if entries is None:
        return [], [Problem(("config",), f"config={path}: the file is empty")]
    if isinstance(entries, list):
        return entries, problems
    found = "a list" if isinstance(entries, tuple) else "text"
    text = f"config={path}: expected sections such as `data:`, got {found}"
    return [], [*problems, Problem(("config",), text)]


def parse_yaml(text: str) -> tuple[Any, list[Refused]]:
    """A YAML document (Entry lists, tuples for sequences, Scalars; None when empty), and refusals.

    Raises yaml.YAMLError when the text is not YAML at all.
    """
    refused: list[Refused] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        return (None if node is None else _convert(node, refused)), refused
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def plain(value: Any) -> Any:
    """The same structure as dicts and lists, without line numbers."""
    if isinstance(value, list):
        return {entry.name: plain(entry.value) for entry in value}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def _convert(node: yaml.Node, refused: list[Refused]) -> Any:
    if node.tag not in _CORE_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        text = f"the tag {tag} is refused: a configuration holds plain values only"
        refused.append(Refused(problem=text, problem_mark=node.start_mark))
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_convert(item, refused) for item in node.value)
    assert isinstance(node, yaml.MappingNode)
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        text, name = "", ""
        if isinstance(key_node, yaml.ScalarNode):
            name = key_node.value
        else:
            text = "a key must be a name"
        if name == "<<":
            text = "merge keys (<<) are not supported; refer to a setting as ${section.key}"
        if name in entries:
            text = f"the key {name} stands twice, in lines {entries[name].line} and {line}"
            text += "; keep one"
        if text:
            refused.append(Refused(problem=text, problem_mark=key_node.start_mark))
        else:
            entries[name] = Entry(name, line, _convert(value_node, refused))
    return list(entries.values())


def _syntax_problem(error: yaml.MarkedYAMLError, where: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = f"{where}, line {mark.line + 1}" if mark else where
    text = error.problem or "not valid YAML"
    if "'\\t'" in text:
        text = "a tab; YAML indents with spaces only"
    if isinstance(error, Refused):
        return Problem(("config",), text, place)
    context = f" {error.context}" if error.context else ""
    return Problem(("config",), f"not valid YAML: {text}{context}", place)
