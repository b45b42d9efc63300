import torch

from verl.rollout import sample_seed
from verl.rollout.sampling import draw, uniform


def test_uniform_numbers_fill_the_unit_interval_evenly():
    seeds = torch.tensor([sample_seed(1, 0, "x", i) for i in range(4000)])
    u = uniform(seeds, 3)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), bins=10, min=0, max=1)
    assert (counts - 400).abs().max() < 100  # five standard deviations


def test_a_draw_depends_on_its_seed_and_step_alone():
    seeds = torch.tensor([sample_seed(1, 0, "x", i) for i in range(6)])
    assert torch.equal(uniform(seeds, 2)[[4, 1]], uniform(seeds[[4, 1]], 2))
    assert not torch.equal(uniform(seeds, 2), uniform(seeds, 3))


def test_splitmix_matches_the_published_first_value():
    # SplitMix64 with seed 0 starts with 0xE220A8397B1DCDAF.
    expected = (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    assert uniform(torch.tensor([0]), 0).item() == expected


def test_words_are_drawn_with_the_probabilities_of_the_softmax():
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    u = (torch.arange(1000) + 0.5).double() / 1000
    words = draw(probs.log().expand(1000, 4), u, temperature=1.0, top_p=1.0, top_k=-1)
    assert torch.bincount(words).tolist() == [100, 200, 300, 400]


def test_top_k_and_top_p_keep_the_likeliest_words():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(100, 4)
    u = (torch.arange(100) + 0.5).double() / 100
    assert set(draw(logits, u, temperature=1.0, top_p=1.0, top_k=2).tolist()) == {1, 3}
    assert set(draw(logits, u, temperature=1.0, top_p=0.41, top_k=-1).tolist()) == {1, 3}
    assert set(draw(logits, u, temperature=1.0, top_p=0.39, top_k=-1).tolist()) == {1}


def test_forbidden_words_are_never_drawn_even_at_the_edges():
    logits = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf")]).expand(2, 4)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, u, temperature=1.0, top_p=1.0, top_k=-1).tolist() == [1, 2]


def test_temperature_zero_takes_the_likeliest_word():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert draw(logits, torch.tensor([0.99]), temperature=0, top_p=1.0, top_k=-1).tolist() == [1]
