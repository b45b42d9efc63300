"""Packs sequences of any length into one row without padding, a group's prompt once.

A row is a chain of groups `[prompt | r1 | ... | rG]`. Responses see their prompt and themselves,
not each other; their positions all restart after the prompt, so the row equals G separate
sequences. An ordinary sequence is a group without responses.
Letters: S packed tokens, T predicted tokens, P prompt tokens, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Layout:
    """Where groups lie in a row, which is all that attention needs to know."""

    prompt_lens: tuple[int, ...]
    response_lens: tuple[tuple[int, ...], ...]

    def spans(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
        """(start, end) of every prompt, and (start, end, group) of every response."""
        prompts, responses, start = [], [], 0
        for group, (n_prompt, lens) in enumerate(
            zip(self.prompt_lens, self.response_lens, strict=True)
        ):
            prompts.append((start, start + n_prompt))
            start += n_prompt
            for n in lens:
                responses.append((start, start + n, group))
                start += n
        return prompts, responses


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
    ids, positions, predict, labels, sequence = [], [], [], [], []
    start = n_sequences = 0
    for group in groups:
        n_prompt = len(group.prompt_ids)
        if n_prompt == 0:
            raise ValueError("a prompt must hold at least one token")
        ids.append(group.prompt_ids)
        positions.append(group.prompt_positions)
        if group.prompt_loss_mask is not None:
            targets = torch.nonzero(group.prompt_loss_mask[1:]).flatten() + 1
            predict.append(start + targets - 1)
            labels.append(group.prompt_ids[targets])
            sequence.append(torch.full_like(targets, n_sequences))
            n_sequences += 1
        last_prompt = start + n_prompt - 1
        start += n_prompt
        first_position = int(group.prompt_positions.max()) + 1
        for response in group.responses:
            n = len(response)
            ids.append(response)
            positions.append(torch.arange(first_position, first_position + n).expand(3, n))
            row = torch.arange(start - 1, start + n - 1)
            if n:
                row[0] = last_prompt
            predict.append(row)
            labels.append(response)
            sequence.append(torch.full((n,), n_sequences))
            n_sequences += 1
            start += n
    empty = [torch.zeros(0, dtype=torch.long)]
    return PackedRow(
        ids_S=torch.cat(ids),
        positions_3S=torch.cat(positions, dim=1),
        predict_T=torch.cat(predict or empty),
        labels_T=torch.cat(labels or empty),
        sequence_T=torch.cat(sequence or empty),
        n_sequences=n_sequences,
        layout=Layout(
            tuple(len(g.prompt_ids) for g in groups),
            tuple(tuple(len(r) for r in g.responses) for g in groups),
        ),
        media=tuple(m for g in groups for m in g.media),
    )


def without_sharing(groups: Sequence[Group]) -> list[Group]:
    """The same sequences, each with a prompt of its own: the oracle for shared prompts."""
    return [
        Group(g.prompt_ids, g.prompt_positions, (response,), g.media)
        for g in groups
        for response in g.responses
    ]
