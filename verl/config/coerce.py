"""Raw values to declared types.

YAML 1.1 guesses types from spelling: `1e-6` is a string, `012` is ten, `1:30` is ninety and `no`
is false. So a scalar stays text until the type of its setting is known, and is read as that type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from verl.config.base import Alias, Range
from verl.config.schema import describe

NULLS = frozenset({"", "~", "null", "Null", "NULL", "none", "None"})
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHORT_INT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKmMgG])")


class Mismatch(ValueError):
    """A value that does not fit; the message says what was expected and what was given."""


@dataclass(frozen=True)
class Scalar:
    """A scalar as it was written. `quoted` text is never read as null, number or bool in YAML."""

    text: str
    quoted: bool = False


def coerce(value: Any, annotation: Any) -> Any:
    """`value` (scalars, lists, dicts, Python values) as `annotation`; raises Mismatch."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_extras(value, args[0], args[1:], annotation)
    if origin in (Union, UnionType):
        return (_optional if NoneType in args else _either)(value, annotation, args)
    if origin is Literal:
        return _choice(value, args)
    if origin is list:
        return [coerce(item, args[0]) for item in _items(value, annotation)]
    if origin is tuple:
        items = _items(value, annotation)
        if len(items) != len(args):
            raise Mismatch(
                f"expected {len(args)} values as {describe(annotation)}, got {len(items)}"
            )
        return tuple(coerce(item, arg) for item, arg in zip(items, args, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise Mismatch(f"expected a mapping such as {{name: value}}, got {shown(value)}")
        return {str(key): untyped(item) for key, item in value.items()}
    return _PLAIN[annotation](value)


def untyped(value: Any) -> Any:
    """A value in a free-form mapping, read by YAML 1.2's rules; ambiguous spellings are refused."""
    if isinstance(value, dict):
        return {str(key): untyped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [untyped(item) for item in value]
    if not isinstance(value, Scalar):
        return value
    text = value.text
    if value.quoted:
        return text
    if text in NULLS:
        return None
    if text.lower() in ("true", "false"):
        return BOOLS[text.lower()]
    if text.lower() in BOOLS:
        raise Mismatch(f'{text!r} can mean a word or true/false; write true, false or "{text}"')
    if _LEADING_ZERO.fullmatch(text):
        raise Mismatch(f'{text!r} can be octal; write "{text}" for text or drop the leading zero')
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def shown(value: Any) -> str:
    """A raw value the way its user wrote it, shortened."""
    if isinstance(value, Scalar):
        text = repr(value.text) if value.text or value.quoted else "nothing"
    elif isinstance(value, dict):
        text = "a mapping"
    elif isinstance(value, list | tuple):
        text = "a list"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _with_extras(value: Any, inner: Any, extras: tuple[Any, ...], annotation: Any) -> Any:
    for extra in extras:
        if isinstance(extra, Alias):
            text = value.text if isinstance(value, Scalar) else value
            value = dict(extra.pairs).get(text, value) if isinstance(text, str) else value
    result = _as_part(value, inner, annotation)
    for extra in extras:
        if isinstance(extra, Range) and not extra.holds(result):
            given = value.text if isinstance(value, Scalar) else result
            raise Mismatch(f"expected {describe(annotation)}, got {given}")
    return result


def _optional(value: Any, annotation: Any, args: tuple[Any, ...]) -> Any:
    is_null = isinstance(value, Scalar) and not value.quoted and value.text in NULLS
    if value is None or is_null:
        return None
    (inner,) = (arg for arg in args if arg is not NoneType)
    return _as_part(value, inner, annotation)


def _either(value: Any, annotation: Any, args: tuple[Any, ...]) -> Any:
    """As the first of several types that takes it."""
    for arg in args:
        try:
            return coerce(value, arg)
        except Mismatch:
            continue
    raise Mismatch(f"expected {describe(annotation)}, got {shown(value)}{_in_digits(value)}")


def _as_part(value: Any, inner: Any, annotation: Any) -> Any:
    """As `inner`; a message about it says all that `annotation` allows."""
    try:
        return coerce(value, inner)
    except Mismatch as error:
        wanted = f"expected {describe(inner)},", f"expected {describe(annotation)},"
        raise Mismatch(str(error).replace(*wanted, 1)) from None


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    text = value.text if isinstance(value, Scalar) else value
    if text not in choices:
        words = " | ".join(str(choice) for choice in choices)
        one = "only" if len(choices) == 1 else "one of"
        near = _like(str(text), [str(choice) for choice in choices])
        hint = f"; did you mean {near!r}?" if near else ""
        raise Mismatch(f"expected {one} {words}, got {shown(value)}{hint}")
    return text


def _like(word: str, choices: Sequence[str]) -> str:
    """The choice that begins like a word and is most like it, such as bf16 for bfloat16; or none.

    Words that begin otherwise mean something else: of cpu and cuda, gpu is not the first.
    """
    scored = [
        (SequenceMatcher(None, word.lower(), choice).ratio(), choice)
        for choice in choices
        if word[:1].lower() == choice[:1]
    ]
    ratio, best = max(scored, default=(0.0, ""))
    return best if ratio > 0.5 else ""


def _items(value: Any, annotation: Any) -> list[Any]:
    """List items; text is split at commas, so that `a,b` works on a command line."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        value = Scalar(value)
    if isinstance(value, Scalar):
        if not value.quoted and value.text in NULLS:
            return []
        return [Scalar(part.strip()) for part in value.text.split(",") if part.strip()]
    raise Mismatch(f"expected {describe(annotation)}, got {shown(value)}")


def _int(value: Any) -> int:
    if isinstance(value, Scalar):
        if _INT.fullmatch(value.text):
            return int(value.text)
        if _LEADING_ZERO.fullmatch(value.text):
            raise Mismatch(
                f"expected int, got {shown(value)}; YAML reads a leading zero as octal, "
                f"write {int(value.text)}"
            )
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise Mismatch(f"expected int, got {shown(value)}{_in_digits(value)}")


def _in_digits(value: Any) -> str:
    """What to type for a whole number in a short form, such as 4k; empty for anything else."""
    text = value.text if isinstance(value, Scalar) else str(value)
    if short := _SHORT_INT.fullmatch(text):
        power = "kmg".index(short[2].lower()) + 1
        values = [float(short[1]) * base**power for base in (1000, 1024)]
    elif _FLOAT.fullmatch(text):
        values = [float(text)]
    else:
        return ""
    if not all(v.is_integer() for v in values):
        return ""
    return f"; write it in digits: {' or '.join(f'{v:.0f}' for v in values)}"


def _float(value: Any) -> float:
    number = None
    if isinstance(value, Scalar) and _FLOAT.fullmatch(value.text):
        number = float(value.text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if number is None or not math.isfinite(number):
        raise Mismatch(f"expected float, got {shown(value)}")
    return number


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Scalar) and value.text.lower() in BOOLS:
        return BOOLS[value.text.lower()]
    raise Mismatch(f"expected bool, got {shown(value)}; write true or false")


def _str(value: Any) -> str:
    if isinstance(value, Scalar):
        if not value.quoted and value.text in ("~", "null", "Null", "NULL"):
            raise Mismatch(f'expected str, got {value.text}; for the word itself write "null"')
        return value.text
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise Mismatch(f"expected str, got {shown(value)}")


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    Any: untyped,
}
