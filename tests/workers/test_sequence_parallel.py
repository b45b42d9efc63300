"""A row that several ranks share gives the log-probs and gradients of sequences on their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.conftest import run_gloo
from tests.sequence_parallel.oracle import dense_attention, dense_mask
from tests.tiny import tiny_config
from tests.workers.tiny_runs import (
    CLIP,
    FILM,
    MODEL,
    PHOTO,
    PLAN,
    TEMPERATURE,
    added,
    keep_gradients,
    largest_gap,
    lone_rank,
    own_share,
    prompt_ids,
    rl_batch,
    tiny_actor,
    tiny_engine,
    totals_of,
    write_model,
)
from verl.config import FSDPConfig
from verl.config.worker import OffloadConfig
from verl.models.adapter import get_adapter
from verl.models.loader import build_model
from verl.models.policy import PolicyModel
from verl.sequence_parallel.attention import (
    ATTENTION,
    PackedAttention,
    TreeAttention,
    register_attention,
)
from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.packing import Group, PackedRow, pack, without_sharing
from verl.sequence_parallel.shard import gather_targets, pad_row, shard_of
from verl.sequence_parallel.topology import SequenceGroup
from verl.sequence_parallel.ulysses import UlyssesAttention

CPU = torch.device("cpu")
ROUNDING = {torch.float64: 1e-9, torch.float32: 3e-5}
# transformers' norms and rotation are float32 in either, so that gradients are summed up rounded.
GRADIENT_ROUNDING = {torch.float64: 1e-6, torch.float32: 3e-5}


# The forward pass of a model, without FSDP, in float64 and float32.


class DenseAttention:
    """The whole row by an explicit mask."""

    def __init__(self, layout: Layout) -> None:
        self._mask = dense_mask(layout)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return dense_attention(q, k, v, self._mask, scale)


def rows() -> dict[str, list[Group]]:
    """Groups of many kinds; each list is one row."""
    adapter = get_adapter(tiny_config())
    g = torch.Generator().manual_seed(5)

    def group(items: tuple[Any, ...], words: list[int], *lengths: int) -> Group:
        ids = prompt_ids(adapter, items, words)
        responses = tuple(torch.randint(8, 60, (n,), generator=g) for n in lengths)
        return Group(ids, adapter.positions(ids, items), responses, items)

    video = group((CLIP,), [13, 14])
    questions = tuple(
        Group(
            torch.tensor(words),
            video.prompt_positions[:, -1:] + torch.arange(1, len(words) + 1),
            tuple(torch.randint(8, 60, (n,), generator=g) for n in lengths),
        )
        for words, lengths in (([20, 21], (3, 1)), ([22], (4,)))
    )
    return {
        "ragged responses to a video": [group((CLIP,), [13, 14, 15], 3, 7, 1, 0, 5)],
        "one response": [group((FILM, PHOTO), [16], 6)],
        "a response of one token": [group((PHOTO,), [16, 17], 1)],
        "text": [group((), [9, 21, 22], 2, 9)],
        "several prompts": [
            group((PLAN, CLIP), [20], 2, 4), group((), [30, 31], 5), group((FILM,), [8], 1, 1, 6),
        ],
        "questions about a video": [replace(video, branches=questions)],
        "longer prompts than answers": [group((FILM, CLIP, PHOTO), list(range(8, 60)), 1, 2)],
    }  # fmt: skip


def model(folder: str, dtype: torch.dtype) -> PolicyModel:
    register_attention()
    settings = replace(MODEL, model_path=folder)
    hf: Any = build_model(settings, dtype=dtype, attention=ATTENTION, materialize=True)
    return PolicyModel(hf, get_adapter(hf.config)).train()


def features(row: PackedRow, width: int, dtype: torch.dtype) -> Tensor | None:
    """Of each piece of media, from its name."""
    found = []
    for item in row.media:
        g = torch.Generator().manual_seed(len(item.ref.key) + item.n_tokens)
        found.append(torch.randn(item.n_tokens, width, generator=g, dtype=torch.float64))
    return torch.cat(found).to(dtype) if found else None


def forward(policy: PolicyModel, row: PackedRow, context: Any, **piece: Any) -> list[Tensor]:
    weight = policy.adapter.head(policy.hf).weight
    targets = {"predict_T": row.predict_T, "labels_T": row.labels_T} | piece
    return list(
        policy(
            row.ids_S, row.positions_3S, targets["predict_T"], targets["labels_T"],
            features_ME=features(row, weight.shape[1], weight.dtype), vision=None,
            attention_context=context, temperature=TEMPERATURE, tokens=piece.get("tokens"),
        )
    )  # fmt: skip


def gradients(policy: PolicyModel, logp_T: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    (logp_T * torch.arange(1, len(logp_T) + 1, device=logp_T.device).cos()).sum().backward()
    named = policy.hf.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


def collect(rank: int, world_size: int, folder: str) -> dict[Any, tuple[Tensor, dict[str, Tensor]]]:
    sequence = SequenceGroup.of_neighbours(world_size, "cpu")
    found = {}
    for dtype in (torch.float64, torch.float32):
        policy = model(folder, dtype)
        for name, groups in rows().items():
            row = pad_row(pack(groups), world_size, 0)
            shard = shard_of(row, sequence, CPU)
            context = UlyssesAttention(TreeAttention(row.layout), sequence)
            own = forward(
                policy, row, context, predict_T=shard.predict_local,
                labels_T=row.labels_T[shard.own_T], tokens=shard.tokens,
            )  # fmt: skip
            logp_T, _ = gather_targets(own, shard)
            grads = gradients(policy, logp_T)
            for grad in grads.values():
                dist.all_reduce(grad)
            found[name, dtype] = logp_T.detach(), grads
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest, folder: str) -> list[Any]:
    return run_gloo(collect, request.param, folder)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_log_probs_and_gradients_are_those_of_sequences_on_their_own(ranks, folder, dtype):
    policy = model(folder, torch.float64)
    for name, groups in rows().items():
        alone = [pack([g]) for g in without_sharing(groups)]
        whole = [forward(policy, r, DenseAttention(r.layout))[0] for r in alone]
        total = gradients(policy, torch.cat(whole))
        logp_T = torch.cat(whole).detach()
        for found in ranks:
            logp, grads = found[name, dtype]
            torch.testing.assert_close(
                logp.double(), logp_T, rtol=ROUNDING[dtype], atol=ROUNDING[dtype], msg=name
            )
            assert grads.keys() == total.keys()
            gap = largest_gap({n: t.double() for n, t in grads.items()}, total)
            assert gap < GRADIENT_ROUNDING[dtype], name


# The whole update, with FSDP.


@dataclass(frozen=True)
class Case:
    frozen: bool = True
    checkpointed: bool = False
    attention: str = "sdpa"
    packed: bool = True
    micro: int = 4
    joined: bool = False
    """Pointwise operations are compiled, and what backward needs is handed out."""
    uneven: bool = False
    """All samples are one group's; the others join it with empty rows."""


CASES = [
    Case(),
    Case(frozen=False),
    Case(checkpointed=True, attention="exact"),
    Case(packed=False),
    Case(packed=False, frozen=False),
    Case(micro=12, attention="exact"),
    Case(checkpointed=True, attention="exact", joined=True),
    Case(uneven=True),
    Case(uneven=True, frozen=False, packed=False),
]


def engine_of(folder: str, case: Case, **kwargs: Any) -> Any:
    settings = replace(
        MODEL, freeze_vision_tower=case.frozen, enable_gradient_checkpointing=case.checkpointed,
        mlp_tile_tokens=5, compile_pointwise="on" if case.joined else "off",
    )  # fmt: skip
    offload = OffloadConfig(offload_activations=case.joined)
    engine = tiny_engine(folder, settings, fsdp=FSDPConfig(), offload=offload, **kwargs)
    engine._attention = case.attention
    return engine


def updates(rank: int, world_size: int, folder: str, size: int) -> dict[Case, Any]:
    sequence = SequenceGroup.of_neighbours(size, "cpu")
    n_groups = world_size // size
    found = {}
    for case in CASES:
        engine = engine_of(folder, case, sequence=sequence)
        kept = keep_gradients(engine)
        batch = rl_batch(engine.adapter)
        share = own_share(batch, rank // size, n_groups)
        if case.uneven:
            share = batch.take(range(12) if rank < size else [])
        actor = tiny_actor(
            engine, micro_batch_size_per_device_for_update=case.micro, padding_free=case.packed
        )
        metrics, _ = actor.update(share, totals_of(batch), TEMPERATURE)
        found[case] = kept[0], metrics, actor.log_probs(share, TEMPERATURE)
    return found


def own_slice(samples: list[Tensor], rank: int, world_size: int) -> list[Tensor]:
    """A rank's share of whole lists, as `own_share` cuts them."""
    n = len(samples) // world_size
    return samples[rank * n : (rank + 1) * n]


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 2), (4, 4)])
def test_an_update_is_that_of_one_rank(folder, world_size, size):
    found = run_gloo(updates, world_size, folder, size)
    with lone_rank():
        expected = updates(0, 1, folder, 1)
    for case in CASES:
        # What packing, checkpointing and sharing must not change: sequences on their own.
        grads, metrics, logp = expected[Case(frozen=case.frozen, packed=False)]
        for i, rank in enumerate(found):
            assert largest_gap(rank[case][0], grads) < 2e-5, case
            # Every rank of a group has all log-probs of the group's samples.
            own = own_slice(logp, i // size, world_size // size)
            if case.uneven:
                own = logp if i < size else []
            for a, b in zip(rank[case][2], own, strict=True):
                torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5)
        # As the driver takes them: of the first rank of each group.
        shares = [rank[case][1] for rank in found[::size]]
        for name, values in metrics.items():
            assert added(shares, name) == pytest.approx(values, rel=1e-4, abs=1e-6), (case, name)


def test_a_row_is_padded_with_a_sequence_that_touches_nothing():
    (group,) = rows()["text"]
    row = pack([group])
    longer = pad_row(row, 8, 0)
    assert len(longer.ids_S) % 8 == 0 and longer.layout.size == len(longer.ids_S)
    assert torch.equal(longer.predict_T, row.predict_T)
    n = row.layout.size
    mask = dense_mask(longer.layout)
    assert not mask[n:, :n].any() and not mask[:n, n:].any()
    assert pad_row(longer, 8, 0) is longer
    PackedAttention(longer.layout, CPU)
