"""What the last layer computes of a row: every predicting token, and little else."""

from __future__ import annotations

import pytest
import torch

from tests.sequence_parallel.oracle import dense_mask
from verl.sequence_parallel.layout import ROOT
from verl.sequence_parallel.packing import Group, PackedRow, pack
from verl.sequence_parallel.shard import pad_row
from verl.sequence_parallel.tail import tail_of

CPU = torch.device("cpu")


def group(n_prompt: int, *responses: int, targets: tuple[int, ...] = (), branches=()) -> Group:
    ids = torch.arange(n_prompt)
    mask = None
    if targets:
        mask = torch.zeros(n_prompt, dtype=torch.bool)
        mask[list(targets)] = True
    answers = tuple(torch.arange(n) for n in responses)
    return Group(ids, ids.expand(3, -1), answers, prompt_loss_mask=mask, branches=branches)


ROWS = {
    "a group": pack([group(40, 3, 1, 5)]),
    "two groups": pack([group(30, 3, 2), group(25, 4)]),
    "a response of no tokens": pack([group(40, 0, 2)]),
    "questions about a video": pack([group(60, branches=(group(4, 3, 2), group(5, 1)))]),
    "supervised": pack([group(50, targets=(41, 42, 49)), group(20, targets=(19,))]),
    "padded": pad_row(pack([group(40, 3, 2)]), 7, 0),
    "a prompt of one token": pack([group(1, 2), group(40, 3)]),
    "nothing to predict in one": pack([group(20), group(30, 2)]),
    "the first token predicts": pack([group(30, targets=(1, 2)), group(60, 2)]),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_kept_tokens_see_what_they_saw_and_predict_what_they_did(row: PackedRow):
    tail = tail_of(row, CPU)
    assert tail is not None and len(tail.rows_R) <= 0.5 * row.layout.size
    assert torch.equal(tail.rows_R[tail.predict_T], row.predict_T)
    assert torch.equal(dense_mask(tail.layout), dense_mask(row.layout))
    roots = [s for s, p in zip(tail.layout.spans, tail.layout.parents, strict=True) if p == ROOT]
    left_out = {i for span in roots for i in range(*span)}
    assert left_out == set(range(row.layout.size)) - set(tail.rows_R.tolist())


def test_of_a_prompt_the_last_token_is_kept():
    tail = tail_of(ROWS["a group"], CPU)
    assert tail is not None and tail.rows_R.tolist() == list(range(39, 49))


@pytest.mark.parametrize(
    "row", [pack([group(5, 3, 4)]), pack([group(9)])], ids=["mostly responses", "no targets"]
)
def test_nothing_is_left_out_where_it_would_not_pay(row: PackedRow):
    assert tail_of(row, CPU) is None
