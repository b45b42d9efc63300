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

    At most `samples` of them; with `tokens`, instead as many as make a row of so many tokens, a
    prompt counted once for neighbours that share it. A sample that is longer alone has its own row.
    """
    if tokens is None:
        sizes = [min(samples, len(batch) - i) for i in range(0, len(batch), samples)]
        return batch.chunk_by(sizes)
    sizes, filled, last_uid = [], 0, None
    for uid, prompt, response in zip(
        batch["uid"], batch["prompt_ids"], batch["response_ids"], strict=True
    ):
        alone = len(prompt) + len(response)
        added = len(response) if shared_prefix and uid == last_uid else alone
        if not sizes or filled + added > tokens:
            sizes.append(0)
            filled, added = 0, alone
        sizes[-1] += 1
        filled, last_uid = filled + added, uid
    return batch.chunk_by(sizes)
