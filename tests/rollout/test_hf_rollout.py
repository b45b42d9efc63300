import pytest
import torch

from tests.tiny import EOS_ID, VIDEO_ID, tiny_config
from verl.models.adapter import get_adapter
from verl.models.policy import PolicyModel
from verl.models.positions import VisualSpan, mrope_positions
from verl.rollout import RolloutRequest, SamplingParams, sample_seed
from verl.rollout import hf_rollout as hf_rollout_module
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, register_attention
from verl.sequence_parallel.packing import Group, pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    register_attention()
    config = tiny_config()
    adapter = get_adapter(config)
    torch.manual_seed(0)
    hf = adapter.model_class()(config)
    hf.set_attn_implementation({"text_config": ATTENTION})
    return hf.eval(), adapter


def request(n_text: int, n_samples: int, seed: int, *, video: bool = False) -> RolloutRequest:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 60, (n_text,), generator=g)
    if not video:
        return RolloutRequest(ids, torch.arange(n_text).expand(3, -1), None, seeds(seed, n_samples))
    ids = torch.cat([ids[:3], torch.full((12,), VIDEO_ID), ids[3:]])
    positions = mrope_positions(
        ids == VIDEO_ID, [VisualSpan((3, 4, 4), 1.0)], merge_size=2, tokens_per_second=2
    )
    features = torch.randn(12, 32, generator=g)
    return RolloutRequest(ids, positions, features, seeds(seed, n_samples))


def seeds(seed: int, n: int) -> tuple[int, ...]:
    return tuple(sample_seed(7, seed, "uid", k) for k in range(n))


def trainer_log_probs(model, req: RolloutRequest, response, temperature: float):
    hf, adapter = model
    row = pack([Group(req.prompt_ids, req.positions, (response,))])
    with torch.no_grad():
        return PolicyModel(hf, adapter)(
            row.ids_S,
            row.positions_3S,
            row.predict_T,
            row.labels_T,
            features_ME=req.features,
            vision=None,
            attention_context=PackedAttention(row.layout, CPU),
            temperature=temperature,
        )[0]


REQUESTS = [request(5, 4, 0), request(17, 4, 1, video=True), request(9, 2, 2, video=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_log_probs_equal_the_trainers(model, temperature):
    params = SamplingParams(max_tokens=12, temperature=temperature, stop_ids=(EOS_ID,))
    outputs = HFRollout(*model, CPU, 64).generate(REQUESTS, params)
    assert [len(o) for o in outputs] == [4, 4, 2]
    for req, samples in zip(REQUESTS, outputs, strict=True):
        for sample in samples:
            expected = trainer_log_probs(model, req, sample.token_ids, temperature)
            torch.testing.assert_close(sample.log_probs, expected, atol=2e-5, rtol=0)


def test_samples_do_not_depend_on_how_the_work_was_spread(model):
    params = SamplingParams(max_tokens=10, stop_ids=(EOS_ID,))
    together = HFRollout(*model, CPU, 10_000).generate(REQUESTS, params)
    for budget, requests in ((8, REQUESTS), (10_000, REQUESTS[::-1])):
        apart = HFRollout(*model, CPU, budget).generate(requests, params)
        if requests is not REQUESTS:
            apart = apart[::-1]
        for a, b in zip(together, apart, strict=True):
            assert [x.token_ids.tolist() for x in a] == [x.token_ids.tolist() for x in b]


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Tokens whose keys and values the engine makes room for, of each batch of samples."""
    tokens: list[int] = []
    cache = hf_rollout_module._SharedPromptCache
    begin = cache.begin

    def measured(self, *args) -> None:
        begin(self, *args)
        prompt_k, own_k = self._prompt[0][0], self._own[0][0]
        tokens.append(sum(x.shape[0] * x.shape[2] for x in (prompt_k, own_k)))

    monkeypatch.setattr(cache, "begin", measured)
    return tokens


@pytest.fixture
def prefills(monkeypatch) -> list[int]:
    """Prompts of each prefill."""
    counts: list[int] = []
    prefill = HFRollout._prefill

    def counted(self, requests, *args):
        counts.append(len(requests))
        return prefill(self, requests, *args)

    monkeypatch.setattr(HFRollout, "_prefill", counted)
    return counts


def test_keys_and_values_of_prompts_and_responses_together_stay_within_the_bound(model, held):
    params = SamplingParams(max_tokens=10, stop_ids=(EOS_ID,), ignore_eos=True)
    requests = [request(5 + 4 * (i % 2), 2, i) for i in range(9)]
    for budget in (30, 64, 90, 10_000):
        HFRollout(*model, CPU, budget).generate(requests, params)
        assert max(held) <= budget
        held.clear()


def test_as_many_prompts_run_together_as_fit_with_their_responses(model, prefills):
    params = SamplingParams(max_tokens=10, stop_ids=(EOS_ID,))
    requests = [request(5, 2, i) for i in range(7)]
    HFRollout(*model, CPU, 3 * 25).generate(requests, params)
    assert prefills == [3, 3, 1]


def test_a_group_too_large_for_the_bound_runs_in_parts_after_one_prefill(model, held, prefills):
    params = SamplingParams(max_tokens=10, stop_ids=(EOS_ID,), temperature=1.5)
    requests = [request(5, 7, 3), request(17, 7, 1, video=True), request(8, 1, 2)]
    whole = HFRollout(*model, CPU, 10_000).generate(requests, params)
    held.clear(), prefills.clear()
    # The long prompt, 29 tokens, leaves room for 3 samples; the short one for 5, made 4 and 3.
    parts = HFRollout(*model, CPU, 60).generate(requests, params)
    assert prefills == [1, 1, 1]
    assert held == [8 + 10, 5 + 40, 5 + 30, 29 + 30, 29 + 30, 29 + 10]
    for a, b in zip(whole, parts, strict=True):
        assert [x.token_ids.tolist() for x in a] == [x.token_ids.tolist() for x in b]
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.log_probs, y.log_probs, atol=2e-5, rtol=0)


def test_a_prompt_larger_than_the_bound_runs_alone_one_sample_at_a_time(model, held):
    params = SamplingParams(max_tokens=10, stop_ids=(EOS_ID,))
    outputs = HFRollout(*model, CPU, 1).generate([request(5, 2, 0), request(6, 2, 1)], params)
    assert [len(samples) for samples in outputs] == [2, 2]
    assert held == [15, 15, 16, 16]


def test_a_wave_handed_over_alone_stays_one_wave(model, prefills):
    engine = HFRollout(*model, CPU, 60)
    params = SamplingParams(max_tokens=10, stop_ids=(EOS_ID,))
    requests = [request(5 + i % 3, 1 + i % 2, i) for i in range(12)]
    lens, counts = [len(r.prompt_ids) for r in requests], [len(r.seeds) for r in requests]
    waves = engine.waves(lens, counts, params.max_tokens)
    assert sorted(i for wave in waves for i in wave) == list(range(12))
    for wave in waves:
        engine.generate([requests[i] for i in wave], params)
    assert prefills == [len(wave) for wave in waves]


def test_samples_of_one_prompt_differ_and_reasons_tell_how_they_ended(model):
    params = SamplingParams(max_tokens=30, stop_ids=(EOS_ID,))
    samples = HFRollout(*model, CPU, 64).generate([request(5, 32, 3)], params)[0]
    assert len({tuple(s.token_ids.tolist()) for s in samples}) > 16
    for s in samples:
        ended = s.token_ids[-1].item() == EOS_ID
        assert s.finish_reason == ("stop" if ended else "length")
        assert EOS_ID not in s.token_ids[:-1]
        assert ended or len(s.token_ids) == 30
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def test_visual_tokens_are_never_sampled_and_ignore_eos_goes_on(model):
    params = SamplingParams(max_tokens=40, stop_ids=(EOS_ID,), ignore_eos=True, temperature=3.0)
    samples = HFRollout(*model, CPU, 64).generate([request(5, 32, 4)], params)[0]
    words = torch.stack([s.token_ids for s in samples])
    assert words.shape == (32, 40)
    assert not torch.isin(words, torch.tensor(model[1].forbidden_ids)).any()


def test_a_weight_that_sync_forgets_is_named(model):
    hf, adapter = model
    named = dict(hf.named_parameters(remove_duplicate=False))
    del named["model.language_model.norm.weight"]
    with pytest.raises(ValueError, match=r"left parameters behind.*norm\.weight"):
        HFRollout(hf, adapter, CPU, 64).load_weights(named.items())
