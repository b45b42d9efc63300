"""Prompts about the same media share their beginning, and no result depends on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

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
from verl.config import ActorConfig, PPOConfig, RolloutConfig, TrainerConfig, WorkerConfig
from verl.models.adapter import get_adapter
from verl.protocol import DataProto
from verl.sequence_parallel.layout import ROOT
from verl.workers.batches import micro_batches, response_rows
from verl.workers.memory_plan import longest_row

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
    empty = [[torch.zeros(n, dtype=torch.long) for n in lens] for lens in (prompts, responses)]
    columns = {"uid": uids, "prompt_ids": empty[0], "response_ids": empty[1]}
    return DataProto(columns | {"media": [()] * len(rows)})


GROUPS = lengths_batch(
    [("a", 10, 5), ("a", 10, 6), ("a", 10, 7), ("b", 20, 1), ("b", 20, 30), ("c", 3, 0)]
)


@pytest.mark.parametrize(
    ("tokens", "shared", "sizes"),
    [
        (28, True, [3, 1, 1, 1]),
        (27, True, [2, 1, 1, 1, 1]),
        (51, True, [3, 2, 1]),  # the second group is not begun where it does not fit
        (54, True, [3, 3]),
        (79, True, [5, 1]),
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
    assert [micro["uid"] for micro in micros] == [["a", "a", "a"], ["b", "b", "c"]]
    alone = micro_batches(GROUPS, samples=4, tokens=None, shared_prefix=False)
    assert [micro["uid"] for micro in alone] == [["a", "a", "a", "b"], ["b", "c"]]


def film_batch(questions: int, n: int, prompt: int = 1000, video: int = 900) -> DataProto:
    """Groups of `n` about one film, then one about another."""
    rows = [(f"q{i}", prompt, 10) for i in range(questions + 1) for _ in range(n)]
    shown = [
        (SimpleNamespace(ref=SimpleNamespace(key=name), n_tokens=video),)
        for name in ["a"] * questions + ["b"]
        for _ in range(n)
    ]
    return lengths_batch(rows).with_columns(media=shown)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        ({"tokens": 1320}, [12, 4]),  # the film and three questions of 100 with 4 * 10
        ({"tokens": 1319}, [8, 4, 4]),  # two questions, then one with its film
        ({"tokens": 1041}, [4, 4, 4, 4]),
        ({"tokens": None, "samples": 12}, [12, 4]),
        ({"tokens": None, "samples": 15}, [12, 4]),
        ({"tokens": None, "samples": 9}, [8, 8]),  # no film fits whole, so question by question
        ({"tokens": None, "samples": 3}, [3, 1, 3, 1, 3, 1, 3, 1]),
    ],
)
def test_questions_about_a_film_share_a_pass_where_they_fit(limit, sizes):
    settings = {"samples": 1, "shared_prefix": True} | limit
    micros = micro_batches(film_batch(3, 4), **settings)
    assert [len(micro) for micro in micros] == sizes


@pytest.mark.parametrize("tokens", [None, 2300])
@pytest.mark.parametrize(("n", "samples"), [(5, 4), (8, 6), (5, 8), (5, 10), (4, 9), (2, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_no_row_is_longer_than_was_planned(n, samples, tokens, shared):
    actor = ActorConfig(
        micro_batch_size_per_device_for_update=samples, max_tokens_per_device=tokens,
        shared_prefix=shared,
    )  # fmt: skip
    batch = lengths_batch([(f"q{i // n}", 1000, 50) for i in range(40)])
    adapter = SimpleNamespace(positions=lambda ids, media: ids.expand(3, -1), forbidden_ids=())
    micros = micro_batches(batch, samples=samples, tokens=tokens, shared_prefix=shared)
    longest = max(
        response_rows(m, adapter, shared_prefix=shared, packed=True)[0].layout.size  # type: ignore[arg-type]
        for m in micros
    )
    assert longest <= longest_row(actor, n, 1000, 50)
    if tokens is None:
        assert longest == longest_row(actor, n, 1000, 50)


@pytest.mark.parametrize("samples", [1, 3, 4, 6, 10, 40])
@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_as_many_passes_are_made_as_the_configuration_tells(samples, n, devices, shared):
    actor = ActorConfig(
        global_batch_size=8, micro_batch_size_per_device_for_update=samples, shared_prefix=shared
    )
    config = PPOConfig(
        worker=WorkerConfig(actor=actor, rollout=RolloutConfig(n=n)),
        trainer=TrainerConfig(n_gpus_per_node=devices),
    )
    batch = lengths_batch([(f"q{i // n}", 1000, 50) for i in range(8 * n // devices)])
    micros = micro_batches(batch, samples=samples, tokens=None, shared_prefix=shared)
    assert len(micros) == config.derived().micro_batches_per_device
