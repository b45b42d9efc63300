"""What is wrong with a configuration, said so that the reader knows what to type instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True)
class Problem:
    """One mistake. `keys` are the settings it is about, the one to change first."""

    keys: tuple[str, ...]
    text: str
    """A sentence that names setting and value, what is wrong, and what to type instead."""
    where: str = ""
    """File and line, or the argument; empty when it is about defaults or the whole run."""

    def __str__(self) -> str:
        return f"{self.text} [{self.where}]" if self.where else self.text


class ConfigError(ValueError):
    """A configuration that cannot run; `problems` holds every mistake that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(report(problems))


def report(problems: Sequence[Problem]) -> str:
    """All problems as numbered lines."""
    return "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, start=1))


def without_consequences(found: Sequence[Problem], key: str) -> list[Problem]:
    """The problems without those that only follow from a wrong value of `key`."""
    if not any(problem.keys[:1] == (key,) for problem in found):
        return list(found)
    return [problem for problem in found if key not in problem.keys[1:]]


def nearest(key: str, legal: Iterable[str], limit: int = 3) -> list[str]:
    """The legal keys most like `key`, best first; a right name in a wrong section counts too."""
    last = key.rpartition(".")[2]
    scored = []
    for candidate in legal:
        whole = SequenceMatcher(None, key.lower(), candidate.lower()).ratio()
        name = SequenceMatcher(None, last.lower(), candidate.rpartition(".")[2].lower()).ratio()
        scored.append((max(whole * 0.95, name * 0.9) + whole * 0.1, candidate))
    good = [pair for pair in sorted(scored, key=lambda pair: (-pair[0], pair[1])) if pair[0] > 0.7]
    best = good[0][0] if good else 0.0
    return [candidate for score, candidate in good[:limit] if score > best - 0.2]


def did_you_mean(key: str, legal: Iterable[str]) -> str:
    """A sentence with the nearest legal keys, or where to find all of them."""
    near = nearest(key, legal)
    if not near:
        return "nothing similar exists; --help lists every key"
    return "did you mean " + " or ".join(near) + "?"
