"""The tokens of a row whose last hidden state is wanted, and how attention leaves the others out.

The loss reads hidden states of predicting tokens alone. Of all other tokens the last layer must
compute keys and values, but neither queries nor what follows them: of a long prompt all but its
last token.
Letters: S packed tokens, R of them that are kept, T predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.packing import PackedRow
from verl.utils.torch_functional import to_device

MOST = 0.5
"""Share of the row from which on leaving out the rest is not worth its own cost."""


@dataclass(frozen=True)
class Tail:
    """Kept tokens of a row."""

    layout: Layout
    """Of the whole row, cut so that the segments that begin sequences are what is left out."""
    rows_R: Tensor
    """The kept tokens."""
    predict_T: Tensor
    """Place of each predicting token among them."""


def tail_of(row: PackedRow, device: torch.device) -> Tail | None:
    """What to keep of a row that is on the host; None where that would be most of it, or nothing.

    From the first predicting token of a sequence's first segment on, all is kept.
    """
    layout = _cut(row)
    starts = [i for i, parent in enumerate(layout.parents) if parent == ROOT]
    kept = torch.ones(layout.size, dtype=torch.bool)
    for i in starts:
        kept[slice(*layout.spans[i])] = False
    rows_R = torch.nonzero(kept).flatten()
    if not 0 < len(rows_R) <= MOST * layout.size:
        return None
    place_S = kept.cumsum(0) - 1
    return Tail(layout, to_device(rows_R, device), to_device(place_S[row.predict_T], device))


def _cut(row: PackedRow) -> Layout:
    """The layout with every root cut in two before its first predicting token."""
    predicts_S = torch.zeros(row.layout.size, dtype=torch.bool)
    predicts_S[row.predict_T] = True
    lengths: list[int] = []
    parents: list[int] = []
    place: list[int] = []
    for (start, end), parent in zip(row.layout.spans, row.layout.parents, strict=True):
        if parent == ROOT:
            first = torch.nonzero(predicts_S[start:end]).flatten()
            if len(first):
                lengths.append(int(first[0]))
                parents.append(ROOT)
                start += int(first[0])
                parent_now = len(lengths) - 1
            else:
                parent_now = ROOT
        else:
            parent_now = place[parent]
        place.append(len(lengths))
        lengths.append(end - start)
        parents.append(parent_now)
    return Layout(tuple(lengths), tuple(parents))
