"""What the ranks of a sequence find of its targets, put together on each of them."""

from __future__ import annotations

import warnings

import torch

from tests.conftest import run_gloo
from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.packing import PackedRow
from verl.sequence_parallel.shard import gather_targets, shard_of
from verl.sequence_parallel.topology import SequenceGroup

PREDICT = torch.tensor([1, 4, 2, 5, 0])


def gathered(rank: int, world_size: int) -> tuple[list[torch.Tensor], list[str]]:
    """Every target's place and its square, as a rank has them, and what torch warned of."""
    row = PackedRow(
        ids_S=torch.zeros(6, dtype=torch.long),
        positions_3S=torch.zeros(3, 6, dtype=torch.long),
        predict_T=PREDICT,
        labels_T=torch.zeros(5, dtype=torch.long),
        sequence_T=torch.zeros(5, dtype=torch.long),
        n_sequences=1,
        layout=Layout((6,), (ROOT,)),
    )
    shard = shard_of(row, SequenceGroup.of_neighbours(world_size, "cpu"), torch.device("cpu"))
    own = PREDICT[shard.own_T].float()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = gather_targets([own, own**2], shard)
    return found, [str(w.message) for w in seen if w.category is FutureWarning]


def test_every_rank_gets_the_values_of_all_targets_in_order_and_no_warning():
    for found, warned in run_gloo(gathered, 2):
        torch.testing.assert_close(found, [PREDICT.float(), PREDICT.float() ** 2])
        assert warned == []
