"""A call of any size holds the features of one wave; several ranks are in `test_engine`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import EOS_ID, tiny_config
from tests.workers.tiny_runs import CLIP, FILM, PHOTO, PLAN, prompt_ids, tiny_encoder
from verl.models.adapter import get_adapter
from verl.protocol import DataProto
from verl.rollout import SamplingParams, sample_seed
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, register_attention
from verl.workers.encoder import MediaEncoder, WholeModel
from verl.workers.generation import generate

CPU = torch.device("cpu")
SHOWN = [(CLIP,), (FILM,), (), (PHOTO, CLIP), (PLAN,), (CLIP,), (FILM, PLAN), ()]


@pytest.fixture(scope="module")
def model():
    register_attention()
    adapter = get_adapter(tiny_config())
    torch.manual_seed(0)
    hf = adapter.model_class()(tiny_config())
    hf.set_attn_implementation({"text_config": ATTENTION})
    return hf.eval(), adapter


class Watched:
    """An encoder that keeps nothing and remembers how many features lived at each call."""

    def __init__(self, encoder: MediaEncoder) -> None:
        self._encoder = encoder
        self._given: list[weakref.ref[Tensor]] = []
        self.rows: list[int] = []
        self.alive: list[int] = []

    def prepare(self, items: Sequence[Any]) -> int:
        self.prepared = len(items)
        return self._encoder.prepare(items)

    def features_each(self, rows: Sequence[Any]) -> list[Tensor | None]:
        self.alive.append(sum(ref() is not None for ref in self._given))
        self.rows.append(len(rows))
        features = self._encoder.features_each(rows)
        self._given += [weakref.ref(f) for f in features if f is not None]
        return features

    def turns(self, n_calls: int) -> int:
        return self._encoder.turns(n_calls)

    def name_of(self, item: Any) -> str:
        return self._encoder.name_of(item)


def prompts_of(adapter: Any, n: int = 2) -> DataProto:
    ids = [prompt_ids(adapter, media, [13, 14, 20 + i]) for i, media in enumerate(SHOWN)]
    seeds = [tuple(sample_seed(0, 1, f"p{i}", k) for k in range(n)) for i in range(len(SHOWN))]
    uids = [f"p{i}" for i in range(len(SHOWN))]
    columns = {"uid": uids, "prompt_ids": ids, "media": SHOWN, "seeds": seeds}
    return DataProto(columns, {"sampling": SamplingParams(6, stop_ids=(EOS_ID,))})


def run(model: Any, budget: int, n: int = 2) -> tuple[DataProto, Watched]:
    hf, adapter = model
    encoder = Watched(tiny_encoder(WholeModel(hf, adapter, CPU)))
    rollout = HFRollout(hf, adapter, CPU, budget)
    return generate(prompts_of(adapter, n), adapter, encoder, rollout), encoder  # type: ignore[arg-type]


def test_only_the_features_of_the_running_wave_live(model):
    _, encoder = run(model, 70)
    assert encoder.prepared == sum(len(media) for media in SHOWN)
    assert sum(encoder.rows) == len(SHOWN)
    assert max(encoder.rows) <= 3
    assert encoder.alive == [0] * len(encoder.rows)


@pytest.mark.parametrize("budget", [1, 40, 70])
def test_samples_do_not_depend_on_the_waves(model, budget):
    whole, encoder = run(model, 10_000)
    assert encoder.rows == [len(SHOWN)]
    parts, encoder = run(model, budget)
    assert len(encoder.rows) > 2
    assert len(parts) == 2 * len(SHOWN)
    assert parts["finish_reason"] == whole["finish_reason"]
    for column in ("response_ids", "rollout_logp"):
        for a, b in zip(parts[column], whole[column], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_media_of_a_group_that_runs_in_parts_are_encoded_once(model):
    _, encoder = run(model, 40, n=7)
    assert encoder.rows == [1] * len(SHOWN)
    assert encoder._encoder.encoded.total() == sum(len(media) for media in SHOWN)
