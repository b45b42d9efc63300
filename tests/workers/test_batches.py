"""Prompts about the same media share their beginning, and no result depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_config
from tests.workers.tiny_runs import (
    CLIP,
    FILM,
    MODEL,
    PHOTO,
    TEMPERATURE,
    keep_gradients,
    largest_gap,
    lone_rank,
    prompt_ids,
    tiny_actor,
    tiny_engine,
    totals_of,
    write_model,
)
from verl.models.adapter import get_adapter
from verl.protocol import DataProto
from verl.sequence_parallel.layout import ROOT
from verl.workers.batches import micro_batches, response_rows

QUESTIONS = [[13, 14, 15], [13, 20], [21, 22], [13, 14, 15, 16]]


def batch(adapter, media=(CLIP, PHOTO), questions=QUESTIONS) -> DataProto:
    """Two responses to each question about the same media, and one to a question about others."""
    g = torch.Generator().manual_seed(3)
    prompts = [prompt_ids(adapter, media, q) for q in questions for _ in range(2)]
    prompts.append(prompt_ids(adapter, (FILM,), [30]))
    n = len(prompts)
    lengths = [(5 * i) % 7 + 1 for i in range(n)]
    return DataProto(
        {
            "uid": [f"p{i // 2}" for i in range(n)],
            "prompt_ids": prompts,
            "media": [tuple(media)] * (n - 1) + [(FILM,)],
            "response_ids": [torch.randint(8, 60, (k,), generator=g) for k in lengths],
            "advantage": [float(a) for a in torch.randn(n, generator=g)],
            "old_logp": [-4 + torch.randn(k, generator=g) for k in lengths],
        },
        {"kl_coef": 0.0},
    )


def row_of(data: DataProto):
    adapter = get_adapter(tiny_config())
    (row,) = response_rows(data, adapter, shared_prefix=True, packed=True)
    return row


def test_questions_about_the_same_media_are_branches_of_what_their_prompts_begin_with():
    adapter = get_adapter(tiny_config())
    data = batch(adapter)
    row = row_of(data)
    shared = len(data["prompt_ids"][0]) - 3
    # Video and photo; a question and two responses, four times; then the film, alone.
    assert row.layout.parents == (ROOT, 0, 1, 1, 0, 4, 4, 0, 7, 7, 0, 10, 10, ROOT, 13)
    assert row.layout.lengths[:2] == (shared, 3)
    assert [m.ref.key for m in row.media] == [m.ref.key for m in (CLIP, PHOTO, FILM)]
    assert torch.equal(row.labels_T, torch.cat(data["response_ids"]))


def test_media_behind_the_question_are_not_shared():
    adapter = get_adapter(tiny_config())
    data = batch(adapter)
    data["prompt_ids"][:] = [
        torch.cat([ids[-2:], ids]) if i < 8 else ids for i, ids in enumerate(data["prompt_ids"])
    ]
    assert row_of(data).layout.parents.count(ROOT) == 5


def test_prompts_without_media_are_left_alone():
    adapter = get_adapter(tiny_config())
    assert row_of(batch(adapter, ())).layout.parents.count(ROOT) == 5


@pytest.mark.parametrize("attention", ["sdpa", "exact"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_is_that_of_sequences_on_their_own(tmp_path, attention, frozen):
    folder = write_model(tmp_path)
    with lone_rank():
        found = []
        for settings in ({"padding_free": False}, {}):
            engine = tiny_engine(folder, replace(MODEL, freeze_vision_tower=frozen))
            engine._attention = attention
            kept = keep_gradients(engine)
            data = batch(engine.adapter)
            actor = tiny_actor(engine, micro_batch_size_per_device_for_update=9, **settings)
            metrics, _ = actor.update(data, totals_of(data), TEMPERATURE)
            found.append((kept[0], metrics))
    assert largest_gap(found[0][0], found[1][0]) < 2e-5
    for name, values in found[0][1].items():
        assert values == pytest.approx(found[1][1][name], rel=1e-4, abs=1e-6), name


def lengths_batch(rows: list[tuple[str, int, int]]) -> DataProto:
    """Samples as (uid, prompt tokens, response tokens)."""
    uids, prompts, responses = zip(*rows, strict=True)
    empty = [torch.empty(n) for n in prompts], [torch.empty(n) for n in responses]
    return DataProto({"uid": uids, "prompt_ids": empty[0], "response_ids": empty[1]})


GROUPS = lengths_batch(
    [("a", 10, 5), ("a", 10, 6), ("a", 10, 7), ("b", 20, 1), ("b", 20, 30), ("c", 3, 0)]
)


@pytest.mark.parametrize(
    ("tokens", "shared", "sizes"),
    [
        (28, True, [3, 1, 1, 1]),
        (27, True, [2, 1, 1, 1, 1]),
        (51, True, [4, 1, 1]),
        (54, True, [4, 2]),
        (1, True, [1] * 6),
        (1000, True, [6]),
        (33, False, [2, 1, 1, 1, 1]),
        (38, False, [2, 2, 1, 1]),
    ],
)
def test_passes_are_filled_by_tokens_with_a_shared_prompt_counted_once(tokens, shared, sizes):
    micros = micro_batches(GROUPS, samples=99, tokens=tokens, shared_prefix=shared)
    assert [len(micro) for micro in micros] == sizes


def test_passes_are_filled_by_samples_otherwise():
    micros = micro_batches(GROUPS, samples=4, tokens=None, shared_prefix=True)
    assert [micro["uid"] for micro in micros] == [["a", "a", "a", "b"], ["b", "c"]]
