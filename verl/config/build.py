"""Assignments to a configuration: every key known, every value of its declared type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_origin

import yaml

from verl.config.arguments import Assignment
from verl.config.coerce import NULLS, Mismatch, Scalar, coerce, shown
from verl.config.interpolate import has_interpolation, resolve
from verl.config.legacy import legacy_hint
from verl.config.problems import ConfigError, Problem, did_you_mean
from verl.config.schema import Setting, sections, settings, with_values
from verl.config.yaml_file import Entry, parse_yaml, plain

T = TypeVar("T")


@dataclass
class Built(Generic[T]):
    """A configuration with what was wrong on the way; settings that are wrong keep defaults."""

    config: T
    origins: dict[str, str]
    """Where each setting that is not a default was given."""
    problems: list[Problem] = field(default_factory=list)
    bad_keys: set[str] = field(default_factory=set)


def file_assignments(
    root: type, entries: Iterable[Entry], path: str, prefix: str = ""
) -> tuple[list[Assignment], list[Problem]]:
    """Flatten the entries of a file along the sections of `root`; unknown keys are problems."""
    found: list[Assignment] = []
    problems: list[Problem] = []
    for entry in entries:
        key, where = f"{prefix}{entry.name}", f"{path}, line {entry.line}"
        if key in settings(root):
            found.append(Assignment(key, plain(entry.value), where))
        elif key not in sections(root):
            problems.append(_unknown(root, key, where))
        elif isinstance(entry.value, list):
            more, wrong = file_assignments(root, entry.value, path, f"{key}.")
            found.extend(more)
            problems.extend(wrong)
        elif not (isinstance(entry.value, Scalar) and entry.value.text in NULLS):
            problems.append(_not_a_value(root, key, plain(entry.value), where))
    return found, problems


def argument_assignments(
    root: type, arguments: Iterable[tuple[str, str, str]]
) -> tuple[list[Assignment], list[Problem]]:
    """Arguments as assignments; `a.b.c=1` may reach into a setting `a.b` that is a mapping."""
    found: list[Assignment] = []
    problems: list[Problem] = []
    for key, text, where in arguments:
        if key in sections(root):
            problems.append(_not_a_value(root, key, Scalar(text), where))
            continue
        owner = key if key in settings(root) else _mapping_above(root, key)
        if owner is None:
            problems.append(_unknown(root, key, where))
            continue
        try:
            value = _argument_value(settings(root)[owner], text, inside=owner != key)
        except Mismatch as error:
            problems.append(Problem((owner,), f"{key}: {error}", where))
            continue
        found.append(Assignment(key, value, where))
    return found, problems


def build(root: type[T], assignments: Iterable[Assignment]) -> Built[T]:
    """Apply assignments, later ones over earlier ones, to the defaults of `root`."""
    default, known = root(), settings(root)
    raw: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for given in assignments:
        owner = given.key if given.key in known else _mapping_above(root, given.key)
        assert owner is not None, "unknown keys were reported before"
        if owner == given.key:
            raw[owner] = given.value
        else:
            base = raw.get(owner, known[owner].default)
            raw[owner] = _with_inner(base, given.key[len(owner) + 1 :].split("."), given.value)
        origins[owner] = given.where
    built = Built(default, origins)
    _fill_interpolations(built, raw, known)
    good: dict[str, Any] = {}
    for key, value in raw.items():
        if key in built.bad_keys:
            continue
        try:
            good[key] = coerce(value, known[key].type)
        except Mismatch as error:
            _reject(built, key, f"{key}: {error}{_word_hint(root, key, value)}")
    built.config = with_values(default, good)
    return built


def from_dict(root: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from a nested mapping (as `to_dict` gives); raises ConfigError.

    Checks keys and types only; whether the combination can run is `problems()`'s to say.
    """
    assignments: list[Assignment] = []
    problems: list[Problem] = []
    _flatten(root, values, "", assignments, problems)
    built = build(root, assignments)
    if problems or built.problems:
        raise ConfigError([*problems, *built.problems])
    return built.config


def _flatten(
    root: type,
    values: Mapping[str, Any],
    prefix: str,
    found: list[Assignment],
    problems: list[Problem],
) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in settings(root):
            found.append(Assignment(key, value, ""))
        elif key in sections(root) and isinstance(value, Mapping):
            _flatten(root, value, f"{key}.", found, problems)
        else:
            problems.append(_unknown(root, key, ""))


def _fill_interpolations(built: Built, raw: dict[str, Any], known: Mapping[str, Setting]) -> None:
    with_references = [key for key, value in raw.items() if has_interpolation(value)]
    if not with_references:
        return
    values = {key: raw.get(key, setting.default) for key, setting in known.items()}
    resolved, errors = resolve(values, with_references)
    raw.update(resolved)
    for key, text in errors.items():
        _reject(built, key, f"{key}={shown(raw[key])}: {text}")


def _reject(built: Built, key: str, text: str) -> None:
    built.problems.append(Problem((key,), text, built.origins.get(key, "")))
    built.bad_keys.add(key)


def _word_hint(root: type, key: str, value: Any) -> str:
    """What a root says of a word that other roots take for the key."""
    word = value.text if isinstance(value, Scalar) else value
    hint = getattr(root, "WORDS", {}).get(f"{key}={word}")
    return f"; {hint}" if hint else ""


def _mapping_above(root: type, key: str) -> str | None:
    """The mapping setting that a longer dotted key reaches into."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in settings(root):
            return key if get_origin(settings(root)[key].type) is dict else None
    return None


def _argument_value(setting: Setting, text: str, inside: bool) -> Any:
    """Text of an argument; `[...]` and `{...}` are read as YAML where a structure is expected."""
    structured = inside or get_origin(setting.type) in (list, tuple, dict)
    if not (structured and text.lstrip()[:1] in ("[", "{")):
        return Scalar(text)
    try:
        value, refused = parse_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise Mismatch(f"{shown(Scalar(text))} cannot be read: {problem}") from None
    if refused:
        raise Mismatch(str(refused[0].problem))
    return plain(value)


def _with_inner(base: Any, path: list[str], value: Any) -> dict[str, Any]:
    base = dict(base) if isinstance(base, dict) else {}
    base[path[0]] = value if len(path) == 1 else _with_inner(base.get(path[0]), path[1:], value)
    return base


def _unknown(root: type, key: str, where: str) -> Problem:
    unused = getattr(root, "UNUSED", {})
    hint = unused.get(key) or legacy_hint(key)
    if hint is None:
        hint = did_you_mean(key, [*settings(root), *sections(root)])
    return Problem((key,), f"{key}: unknown key; {hint}", where)


def _not_a_value(root: type, key: str, value: Any, where: str) -> Problem:
    example = next(name for name in settings(root) if name.startswith(f"{key}."))
    text = f"{key} is a section, got {shown(value)}; set its keys, such as {example}"
    return Problem((key,), text, where)
