"""Worker processes: what they get, what they give back, and how a group ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from tests.single_controller.toys import BadClip, NotAnException, ToyWorker
from verl.protocol import DataProto
from verl.single_controller.failures import WorkerDied
from verl.single_controller.placement import ResourcesMissing
from verl.single_controller.worker_group import WorkerGroup

pytestmark = pytest.mark.usefixtures("ray_cluster")


def batch(n: int) -> DataProto:
    x = [torch.arange(i) for i in range(n)]
    return DataProto({"uid": [f"u{i}" for i in range(n)], "x": x}, {"step": 7})


@pytest.fixture(scope="module")
def pairs(ray_cluster: None) -> Iterator[WorkerGroup]:
    """Four ranks of which neighbours share their sequences."""
    with WorkerGroup(
        ToyWorker, 4, init_kwargs={"offset": 1}, sequence_group_size=2,
        num_cpus_per_worker=0.5,
        env_vars={"TOY_VARIABLE": "here", "OMP_NUM_THREADS": "2"},
    ) as group:  # fmt: skip
        yield group


def test_workers_know_their_place_and_share_a_process_group(pairs: WorkerGroup):
    about = pairs.about()
    assert [a["dp_rank"] for a in about] == [0, 0, 1, 1]
    assert {a["dp_size"] for a in about} == {2}
    assert {a["group"] for a in about} == {4}
    assert pairs.sum_of_ranks(offset=1) == [14, 14, 14, 14]


def test_workers_get_their_environment_and_device(pairs: WorkerGroup):
    for about in pairs.about():
        assert about["extra"] == "here" and about["threads"] == 2 and about["device"] == "cpu"


def test_ranks_of_a_sequence_group_get_the_same_part_and_results_keep_their_order(
    pairs: WorkerGroup,
):
    result = pairs.label(batch(5), "a:", suffix="!")
    assert result["name"] == ["a:u0@0!", "a:u1@0!", "a:u2@0!", "a:u3@2!", "a:u4@2!"]
    assert [len(t) for t in result["x"]] == [0, 1, 2, 3, 4]
    assert result.meta == {"step": 7}
    assert pairs.count(batch(5)) == [3, 2]
    assert pairs.count([batch(1), batch(4)]) == [1, 4]


def test_dispatch_to_all_gives_everyone_the_whole_batch(pairs: WorkerGroup):
    assert pairs.samples_of(batch(2)) == [["u0", "u1"]] * 4


def test_calls_can_be_started_first_and_awaited_later(pairs: WorkerGroup):
    first, second = pairs.count.remote(batch(4)), pairs.call_async("sum_of_ranks")
    assert second.result() == [10] * 4
    assert first.done() and first.result() == [2, 2]


def test_methods_without_a_mark_and_unknown_ones_cannot_be_called(pairs: WorkerGroup):
    with pytest.raises(AttributeError, match="not_marked"):
        pairs.not_marked()
    with pytest.raises(AttributeError, match=r"no dispatched method 'typo'; it has \['about'"):
        pairs.call_async("typo")


def test_sequence_groups_must_divide_the_workers():
    with pytest.raises(ValueError, match="3 workers cannot form groups of 2"):
        WorkerGroup(ToyWorker, 3, sequence_group_size=2)


def test_a_cluster_that_is_too_small_is_told_apart_from_a_slow_one():
    with pytest.raises(ResourcesMissing, match="9 workers need 9 CPU; the Ray cluster has 4 CPU"):
        WorkerGroup(ToyWorker, 9)
    with pytest.raises(ResourcesMissing, match=r"has 4 CPU and 0 GPU; use trainer.device=cpu\."):
        WorkerGroup(ToyWorker, 2, device="cuda")
    with pytest.raises(ResourcesMissing, match="use at most 4 workers"):
        WorkerGroup(ToyWorker, 5)


@pytest.fixture
def duo(pairs: WorkerGroup) -> Iterator[WorkerGroup]:
    """Two ranks, to be destroyed."""
    with WorkerGroup(ToyWorker, 2) as group:
        yield group


def test_a_killed_worker_is_named_while_its_peer_hangs_in_a_collective(duo: WorkerGroup):
    pids = duo.ping()
    future = duo.wait_for_others.remote(absent=1, how="hang")
    start = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=rf"rank 1 died in wait_for_others\(\): process {pids[1]}"):
        future.result()
    assert time.monotonic() - start < 10
    assert_gone(pids)
    with pytest.raises(RuntimeError, match=r"workers are gone \(rank 1 failed in wait_for"):
        duo.ping()


def test_a_worker_that_exits_is_named_with_its_exit_code(duo: WorkerGroup):
    with pytest.raises(WorkerDied, match=r"rank 0 died.*exit code 3") as caught:
        duo.wait_for_others(absent=0, how="exit")
    assert caught.value.user_message.startswith("Worker rank 0 died in wait_for_others()")


def test_an_exception_keeps_its_type_and_message_and_ends_the_others(duo: WorkerGroup):
    pids = duo.ping()
    with pytest.raises(ValueError) as caught:
        duo.wait_for_others(absent=1, how="value")
    assert str(caught.value) == "reward is nan"
    assert caught.value.__notes__[0] == "Raised by worker rank 1 in wait_for_others()."
    assert "toys.py" in caught.value.__notes__[1]
    assert_gone(pids)


def test_a_death_between_calls_shows_at_the_next_check(duo: WorkerGroup):
    os.kill(duo.ping()[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="rank 0 died"):
        for _ in range(50):
            duo.check()
            time.sleep(0.1)


def test_exceptions_of_any_kind_cross_processes():
    for how, expected, message in (
        ("clip", WorkerDied, "BadClip: a.mp4: no frames"),
        ("base", NotAnException, "shard 3 is damaged"),
    ):
        group = WorkerGroup(ToyWorker, 1)
        with pytest.raises(expected, match=message):
            group.wait_for_others(absent=0, how=how)
    assert issubclass(BadClip, Exception)


def test_a_worker_that_cannot_be_built_says_why():
    with pytest.raises(ValueError, match="no such model") as caught:
        WorkerGroup(ToyWorker, 2, init_kwargs={"fail_on": 1})
    assert caught.value.__notes__[0] == "Raised by worker rank 1 in __init__()."


def assert_gone(pids: list[int]) -> None:
    """All processes end within a few seconds."""
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
