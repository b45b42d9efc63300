"""What a setting may be: ranges and aliases that ride on the type of a dataclass field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Bounds of a number. `also` names values outside of them that mean something, such as -1."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    also: tuple[int, ...] = ()

    def holds(self, value: float) -> bool:
        """True when `value` is inside the bounds or is one of the special values."""
        if value in self.also:
            return True
        above = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        return above and (self.le is None or value <= self.le)

    def __str__(self) -> str:
        parts = []
        if self.ge is not None:
            parts.append(f">= {self.ge:g}")
        if self.gt is not None:
            parts.append(f"> {self.gt:g}")
        if self.le is not None:
            parts.append(f"<= {self.le:g}")
        words = " and ".join(parts)
        return words + "".join(f", or {value}" for value in self.also)


@dataclass(frozen=True)
class Alias:
    """Other spellings of a choice, as pairs (spelling, canonical value)."""

    pairs: tuple[tuple[str, str], ...]


Count = Annotated[int, Range(ge=1)]
CountOrOff = Annotated[int, Range(ge=1, also=(-1,))]
NonNegativeInt = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
