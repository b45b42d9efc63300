"""The helper that other tests of collectives stand on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_gloo


def sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return rank, value


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("bad batch")
    dist.barrier()


def test_gloo_processes_return_their_results_by_rank():
    assert run_gloo(sum_of_ranks, 2, 10) == [(0, torch.tensor(21)), (1, torch.tensor(21))]


def test_the_first_exception_of_a_gloo_process_is_raised_while_others_wait():
    with pytest.raises(ValueError, match="bad batch") as caught:
        run_gloo(fail_on_rank_one, 2)
    assert "Raised by rank 1" in caught.value.__notes__[0]
