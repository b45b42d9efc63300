"""Which settings a root has: key, type, default and docstring, read from the dataclasses."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from verl.config.base import Range

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One leaf of a configuration."""

    key: str
    type: Any
    """Its annotation, `Annotated` extras included."""
    default: Any
    doc: str


@cache
def settings(root: type) -> Mapping[str, Setting]:
    """Every setting of `root` by dotted key, in the order of the source; unused ones left out."""
    unused = getattr(root, "UNUSED", {})
    found = {setting.key: setting for setting in _walk(root, root(), "")}
    missing = set(unused) - set(found)
    if missing:
        raise TypeError(f"{root.__name__}.UNUSED names keys that do not exist: {sorted(missing)}")
    return {key: setting for key, setting in found.items() if key not in unused}


@cache
def sections(root: type) -> Mapping[str, str]:
    """Every section of `root` by dotted key, with the first line of its class's docstring."""
    found: dict[str, str] = {}
    for cls, prefix in _section_classes(root, ""):
        found[prefix] = inspect.getdoc(cls) or ""
    return found


def _section_classes(cls: type, prefix: str) -> list[tuple[type, str]]:
    hints = get_type_hints(cls)
    found: list[tuple[type, str]] = []
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            key = f"{prefix}{field.name}"
            found.append((hints[field.name], key))
            found.extend(_section_classes(hints[field.name], f"{key}."))
    return found


def _walk(cls: type, default: Any, prefix: str) -> list[Setting]:
    hints, docs = get_type_hints(cls, include_extras=True), field_docs(cls)
    found: list[Setting] = []
    for field in fields(cls):
        key, value = f"{prefix}{field.name}", getattr(default, field.name)
        if is_dataclass(hints[field.name]):
            found.extend(_walk(hints[field.name], value, f"{key}."))
        else:
            found.append(Setting(key, hints[field.name], value, docs.get(field.name, "")))
    return found


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The string under each field of a dataclass, inherited ones included, on one line each."""
    docs: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if is_dataclass(part):
            docs |= _own_field_docs(part)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[before.target.id] = " ".join(str(after.value.value).split())
    return docs


def with_values(default: T, values: Mapping[str, Any]) -> T:
    """A copy of a configuration with the settings of `values` (dotted keys) replaced."""
    own = {key: value for key, value in values.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        head, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
    changed = {head: with_values(getattr(default, head), rest) for head, rest in inner.items()}
    return replace(default, **own, **changed)  # type: ignore[type-var]


def value_of(cfg: Any, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def describe(annotation: Any) -> str:
    """A type in words a user can act on, such as `int >= 1` or `token | seq`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [str(extra) for extra in args[1:] if isinstance(extra, Range)]
        return " ".join([describe(args[0]), *ranges])
    if origin is Literal:
        return " | ".join(str(choice) for choice in args)
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is NoneType else describe(arg) for arg in args)
    if origin is list:
        inner = describe(args[0])
        return f"list of {inner}" if " " not in inner else f"list of ({inner})"
    if origin is tuple:
        return "[" + ", ".join(describe(arg) for arg in args) + "]"
    if origin is dict:
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))
