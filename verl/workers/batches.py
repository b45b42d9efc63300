"""From samples to packed rows. Letters: P prompt tokens, R response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.adapter import Adapter
from verl.protocol import DataProto
from verl.sequence_parallel.packing import Group, PackedRow, pack, without_sharing


def response_rows(
    batch: DataProto, adapter: Adapter, *, shared_prefix: bool, packed: bool
) -> list[PackedRow]:
    """Rows whose targets are the responses of `batch`, in the order of its samples.

    Neighbouring samples of one prompt share it, and neighbouring prompts about the same media share
    what they begin with. With `packed=False` every sequence is a row of its
    own: the oracle for packing.
    """
    groups: list[Group] = []
    last_uid = None
    for uid, prompt_ids, media, response in zip(
        batch["uid"], batch["prompt_ids"], batch["media"], batch["response_ids"], strict=True
    ):
        if uid == last_uid:
            old = groups[-1]
            responses = (*old.responses, response)
            groups[-1] = Group(old.prompt_ids, old.prompt_positions, responses, old.media)
        else:
            positions = adapter.positions(prompt_ids, media)
            groups.append(Group(prompt_ids, positions, (response,), tuple(media)))
        last_uid = uid
    if not packed:
        return [pack([g]) for g in without_sharing(groups)]
    if not shared_prefix:
        return [pack(without_sharing(groups))]
    return [pack(join_by_media(groups, adapter.forbidden_ids))]


def join_by_media(groups: Sequence[Group], visual_ids: Sequence[int]) -> list[Group]:
    """Neighbours that show the same media become branches of what their prompts begin with.

    Only where that beginning holds all of the media, as it does with the question behind the video.
    Order of responses and all results stay as they are.
    """
    joined: list[Group] = []
    for _, neighbours in groupby(groups, lambda g: tuple(m.ref.key for m in g.media)):
        run = list(neighbours)
        shared = _shared_tokens([g.prompt_ids for g in run])
        visual = torch.tensor(visual_ids)
        in_rest = any(bool(torch.isin(g.prompt_ids[shared:], visual).any()) for g in run)
        if len(run) == 1 or not run[0].media or in_rest:
            joined += run
            continue
        first = run[0]
        branches = tuple(
            replace(
                g,
                prompt_ids=g.prompt_ids[shared:],
                prompt_positions=g.prompt_positions[:, shared:],
                media=(),
            )
            for g in run
        )
        joined.append(
            Group(
                first.prompt_ids[:shared],
                first.prompt_positions[:, :shared],
                media=first.media,
                branches=branches,
            )
        )
    return joined


def _shared_tokens(prompts: Sequence[Tensor]) -> int:
    """How many tokens all prompts begin with; of the shortest, one is left for itself."""
    n = min(map(len, prompts)) - 1
    same = torch.ones(n, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt[:n] == prompts[0][:n]
    return int(same.cumprod(0).sum())


def target_rows(
    batch: DataProto, adapter: Adapter, bins: Sequence[Sequence[int]]
) -> list[PackedRow]:
    """Rows for supervised fine-tuning: whole sequences, targets where `loss_mask` is true."""
    rows = []
    for indices in bins:
        groups = []
        for i in indices:
            ids, media = batch["input_ids"][i], batch["media"][i]
            positions = adapter.positions(ids, media)
            groups.append(
                Group(ids, positions, (), tuple(media), prompt_loss_mask=batch["loss_mask"][i])
            )
        rows.append(pack(groups))
    return rows


def dummy_row() -> PackedRow:
    """A row without targets: a rank that has run out of work joins the others' collectives."""
    token = torch.zeros(1, dtype=torch.long)
    return pack([Group(token, torch.zeros(3, 1, dtype=torch.long))])


def equal_count(rows: list[PackedRow], device: torch.device) -> list[PackedRow]:
    """Fills up with dummy rows to the largest number of rows of any rank."""
    return rows + [dummy_row() for _ in range(most_of_ranks(len(rows), device) - len(rows))]


def most_of_ranks(count: int, device: torch.device) -> int:
    """The largest count of any rank. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def micro_batches(
    batch: DataProto, *, samples: int, tokens: int | None, shared_prefix: bool
) -> list[DataProto]:
    """Neighbours that go through the model in one row, in order.

    At most `samples` of them; with `tokens`, instead as many as make a row of so many tokens, what
    neighbours share counted once. Where prompts are shared, a group, or groups about the same
    media, is not begun in a row that has no room for all of it; one that is larger than a row is
    cut. A sample that is longer alone has its own row.
    """
    most = samples if tokens is None else tokens
    weigh = _Weights(batch, shared_prefix=shared_prefix, in_tokens=tokens is not None)
    sizes: list[int] = []
    filled = 0
    for i in range(len(batch)):
        added = weigh.behind(i)
        ends = weigh.whole(i) or [i + 1]
        end = next((e for e in ends if weigh.run(i, e, alone=True) <= most), ends[-1])
        needed = added + weigh.run(i + 1, end)
        if not sizes or filled + needed > most:
            sizes.append(0)
            filled, added = 0, weigh.alone(i)
        sizes[-1] += 1
        filled += added
    return batch.chunk_by(sizes)


class _Weights:
    """What samples take of a row: each 1, or its tokens."""

    def __init__(self, batch: DataProto, *, shared_prefix: bool, in_tokens: bool) -> None:
        self._batch, self._shared, self._in_tokens = batch, shared_prefix, in_tokens

    def alone(self, i: int) -> int:
        """Of a sample that shares nothing."""
        if not self._in_tokens:
            return 1
        return len(self._batch["prompt_ids"][i]) + len(self._batch["response_ids"][i])

    def behind(self, i: int) -> int:
        """Of a sample in the row of the one before it."""
        if not (self._in_tokens and self._shared and i):
            return self.alone(i)
        if self._same(i, "uid"):
            return len(self._batch["response_ids"][i])
        if self._same_media(i):
            return self.alone(i) - sum(item.n_tokens for item in self._batch["media"][i])
        return self.alone(i)

    def run(self, start: int, end: int, *, alone: bool = False) -> int:
        """Of neighbours; with `alone`, the first shares nothing."""
        total = sum(self.behind(i) for i in range(start, end))
        return total + (self.alone(start) - self.behind(start) if alone else 0)

    def whole(self, i: int) -> list[int]:
        """Where what begins with sample i ends: groups about the same media, and the group.

        Empty in the midst of a group, and where nothing is shared.
        """
        if not self._shared or (i and self._same(i, "uid")):
            return []
        media, group = i + 1, i + 1
        while group < len(self._batch) and self._same(group, "uid"):
            group += 1
        if i and self._same_media(i):
            return [group]
        while media < len(self._batch) and (self._same(media, "uid") or self._same_media(media)):
            media += 1
        return [media, group]

    def _same(self, i: int, column: str) -> bool:
        return bool(self._batch[column][i] == self._batch[column][i - 1])

    def _same_media(self, i: int) -> bool:
        now, before = ([item.ref.key for item in self._batch["media"][j]] for j in (i, i - 1))
        return bool(now) and now == before
