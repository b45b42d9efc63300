"""Command-line arguments to assignments: `config=FILE`, `a.b=c`, `--a.b=c` and `--a.b c`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.config.problems import Problem


@dataclass(frozen=True)
class Assignment:
    """A value that a file or an argument gives to a key, and where."""

    key: str
    value: Any
    where: str


@dataclass
class Arguments:
    """What a command line asks for."""

    config: str | None = None
    help: bool = False
    print_config: bool = False
    assignments: list[tuple[str, str, str]] = field(default_factory=list)
    """Triples (key, text, where), in the order given; a later one wins."""
    problems: list[Problem] = field(default_factory=list)


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Sort out a command line. Knows no keys; what it cannot read becomes a problem."""
    args = Arguments()
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in ("-h", "--help"):
            args.help = True
        elif word == "--print-config":
            args.print_config = True
        elif word.startswith("--") and len(word) > 2 and "=" not in word:
            following = argv[position] if position < len(argv) else None
            if following is None or _starts_a_setting(following):
                text = f"{word} needs a value; write {word}=VALUE, such as {word}=true"
                args.problems.append(_about(word, text))
            else:
                position += 1
                _assign(args, word[2:], following, f"{word} {following}")
        elif "=" in word.lstrip("-") and (word.startswith("--") or not word.startswith("-")):
            key, _, text = word.removeprefix("--").partition("=")
            _assign(args, key, text, word)
        else:
            text = f"{word!r} is not a setting; write key=value"
            if word.endswith((".yaml", ".yml")):
                text = f"{word!r} is not a setting; for a file write config={word}"
            args.problems.append(_about(word, text))
    return args


def _starts_a_setting(word: str) -> bool:
    """True for `--x`, `config=f` and `a.b=c`, which are not meant as the value of a flag."""
    head, equals, _ = word.partition("=")
    dotted = "." in head and all(part.isidentifier() for part in head.split("."))
    return word.startswith("--") or (bool(equals) and (dotted or head == "config"))


def _assign(args: Arguments, key: str, text: str, word: str) -> None:
    if key != "config":
        args.assignments.append((key.strip(), text, f"argument {word!r}"))
    elif args.config is not None:
        said = f"config= is given twice, {args.config} and {text}; give one file"
        args.problems.append(_about(word, said))
    else:
        args.config = text


def _about(word: str, text: str) -> Problem:
    return Problem((word,), text, f"argument {word!r}")
