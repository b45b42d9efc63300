"""Packs sequences of any length into one row without padding, what they share once.

A row is a chain of groups `[prompt | r1 | ... | rG]`. Responses see their prompt and themselves,
not each other; their positions all restart after the prompt, so the row equals G separate
sequences. An ordinary sequence is a group without responses. A prompt may have branches, which are
prompts that go on from it: `[video | question 1 | r11 | r12 | question 2 | r21 | r22]`.
Letters: S packed tokens, T predicted tokens, P prompt tokens, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from verl.sequence_parallel.layout import ROOT, Layout


@dataclass(frozen=True)
class Group:
    """A prompt and the responses that share it."""

    prompt_ids: Tensor
    """(P,) token ids."""
    prompt_positions: Tensor
    """(3, P) rotary positions; plain text repeats one row three times."""
    responses: tuple[Tensor, ...] = ()
    """Token ids of each response, (R,) each."""
    media: tuple[Any, ...] = ()
    """The prompt's pieces of media in order; opaque here."""
    prompt_loss_mask: Tensor | None = None
    """(P,) bool: prompt tokens that are targets themselves (supervised fine-tuning)."""
    branches: tuple[Group, ...] = ()
    """Prompts that go on where this one ends, each with responses (and media) of its own."""


@dataclass(frozen=True)
class PackedRow:
    """One packed row and what to predict in it."""

    ids_S: Tensor
    positions_3S: Tensor
    predict_T: Tensor
    """Index of the token whose hidden state predicts target t."""
    labels_T: Tensor
    sequence_T: Tensor
    """Which sequence target t belongs to: responses are numbered through, in order; without
    responses, groups are."""
    n_sequences: int
    layout: Layout
    media: tuple[Any, ...] = field(default=())

    def to(self, device: torch.device) -> PackedRow:
        """The same row with its tensors on `device`."""
        names = ("ids_S", "positions_3S", "predict_T", "labels_T", "sequence_T")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return PackedRow(
            **moved, n_sequences=self.n_sequences, layout=self.layout, media=self.media
        )


def pack(groups: Sequence[Group]) -> PackedRow:
    """Lays groups out in one row; the last prompt token predicts each response's first."""
    row = _RowBuilder()
    for group in groups:
        row.add(group)
    return row.build()


class _RowBuilder:
    """Collects segments, targets and media in the order of the row."""

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._predict: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._sequence: list[Tensor] = []
        self._parents: list[int] = []
        self._media: list[Any] = []
        self._size = self._n_sequences = 0

    def add(self, group: Group, parent: int = ROOT) -> None:
        """A prompt, its responses, and then the branches that go on from it."""
        n_prompt = len(group.prompt_ids)
        if n_prompt == 0:
            raise ValueError("a prompt must hold at least one token")
        start, prompt = self._segment(group.prompt_ids, group.prompt_positions, parent)
        self._media.extend(group.media)
        if group.prompt_loss_mask is not None:
            targets = torch.nonzero(group.prompt_loss_mask[1:]).flatten() + 1
            self._targets(start + targets - 1, group.prompt_ids[targets])
        first_position = int(group.prompt_positions.max()) + 1
        for response in group.responses:
            n = len(response)
            positions = torch.arange(first_position, first_position + n).expand(3, n)
            begin, _ = self._segment(response, positions, prompt)
            predict = torch.arange(begin - 1, begin + n - 1)
            if n:
                predict[0] = start + n_prompt - 1
            self._targets(predict, response)
        for branch in group.branches:
            self.add(branch, prompt)

    def _segment(self, ids: Tensor, positions: Tensor, parent: int) -> tuple[int, int]:
        """Where the segment starts in the row, and its number."""
        start = self._size
        self._ids.append(ids)
        self._positions.append(positions)
        self._parents.append(parent)
        self._size += len(ids)
        return start, len(self._parents) - 1

    def _targets(self, predict: Tensor, labels: Tensor) -> None:
        self._predict.append(predict)
        self._labels.append(labels)
        self._sequence.append(torch.full_like(labels, self._n_sequences))
        self._n_sequences += 1

    def build(self) -> PackedRow:
        empty = [torch.zeros(0, dtype=torch.long)]
        return PackedRow(
            ids_S=torch.cat(self._ids),
            positions_3S=torch.cat(self._positions, dim=1),
            predict_T=torch.cat(self._predict or empty),
            labels_T=torch.cat(self._labels or empty),
            sequence_T=torch.cat(self._sequence or empty),
            n_sequences=self._n_sequences,
            layout=Layout(tuple(len(ids) for ids in self._ids), tuple(self._parents)),
            media=tuple(self._media),
        )


def without_sharing(groups: Sequence[Group]) -> list[Group]:
    """The same sequences, each with a prompt of its own: the oracle for shared prompts."""
    alone = []
    for group in groups:
        alone += [replace(group, responses=(r,), branches=()) for r in group.responses]
        for branch in group.branches:
            whole = replace(
                branch,
                prompt_ids=torch.cat([group.prompt_ids, branch.prompt_ids]),
                prompt_positions=torch.cat(
                    [group.prompt_positions, branch.prompt_positions], dim=1
                ),
                media=(*group.media, *branch.media),
            )
            alone += without_sharing([whole])
    return alone
