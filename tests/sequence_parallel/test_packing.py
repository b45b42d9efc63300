import pytest
import torch

from verl.sequence_parallel.packing import Group, pack, without_sharing


def text_group(n_prompt, *response_lens, start=0):
    prompt = torch.arange(start, start + n_prompt)
    responses = tuple(torch.full((n,), 100 + i) for i, n in enumerate(response_lens))
    return Group(prompt, torch.arange(n_prompt).expand(3, n_prompt), responses)


def test_every_response_restarts_after_the_prompt_and_is_predicted_from_it():
    row = pack([text_group(3, 2, 1)])
    assert row.ids_S.tolist() == [0, 1, 2, 100, 100, 101]
    assert row.positions_3S[0].tolist() == [0, 1, 2, 3, 4, 3]
    assert row.predict_T.tolist() == [2, 3, 2]
    assert row.labels_T.tolist() == [100, 100, 101]
    assert row.sequence_T.tolist() == [0, 0, 1]


def test_targets_never_cross_from_one_group_to_the_next():
    row = pack([text_group(2, 1), text_group(3, 2, start=50)])
    assert row.predict_T.tolist() == [1, 5, 6]
    assert row.sequence_T.tolist() == [0, 1, 1]


def test_an_empty_response_has_no_target_but_counts_as_a_sequence():
    row = pack([text_group(2, 0, 2)])
    assert row.n_sequences == 2
    assert row.sequence_T.tolist() == [1, 1]


def test_positions_of_responses_follow_the_largest_prompt_position():
    prompt = torch.tensor([1, 2])
    group = Group(prompt, torch.tensor([[0, 9], [0, 1], [0, 2]]), (torch.tensor([5, 6]),))
    assert pack([group]).positions_3S[:, 2:].tolist() == [[10, 11]] * 3


def test_masked_prompt_tokens_are_targets_and_the_first_token_never_is():
    group = Group(
        torch.tensor([7, 8, 9]),
        torch.arange(3).expand(3, 3),
        prompt_loss_mask=torch.tensor([True, False, True]),
    )
    row = pack([group, group])
    assert row.predict_T.tolist() == [1, 4]
    assert row.labels_T.tolist() == [9, 9]
    assert row.sequence_T.tolist() == [0, 1]


def test_unsharing_repeats_the_prompt_for_every_response():
    alone = without_sharing([text_group(3, 2, 1)])
    assert [len(g.responses) for g in alone] == [1, 1]
    assert all(torch.equal(g.prompt_ids, torch.arange(3)) for g in alone)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        pack([text_group(0, 1)])
