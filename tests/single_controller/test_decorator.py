"""How arguments spread over data-parallel groups, and how results come together."""

from __future__ import annotations

import pytest

from verl.protocol import DataProto
from verl.single_controller.decorator import (
    Dispatch,
    dispatch,
    dispatched_methods,
    merge_results,
    split_arguments,
)


def batch(n: int) -> DataProto:
    return DataProto({"uid": list(range(n))})


class Base:
    @dispatch(Dispatch.DP)
    def update(self, batch: DataProto) -> None: ...

    def helper(self) -> None: ...


class Child(Base):
    def update(self, batch: DataProto) -> None: ...

    @dispatch(Dispatch.ALL)
    def save(self) -> None: ...


def test_only_marked_methods_are_dispatched_and_overrides_keep_their_mode():
    assert dispatched_methods(Child) == {"update": Dispatch.DP, "save": Dispatch.ALL}


def test_every_batch_is_split_and_other_arguments_go_to_all():
    calls = split_arguments([batch(5), "x", batch(2)], dp_size=2, method="update")
    assert [(a["uid"], x, b["uid"]) for a, x, b in calls] == [
        ([0, 1, 2], "x", [0]),
        ([3, 4], "x", [1]),
    ]


def test_a_list_of_batches_counts_as_already_split():
    calls = split_arguments([[batch(1), batch(3)]], dp_size=2, method="update")
    assert [len(a) for (a,) in calls] == [1, 3]
    with pytest.raises(ValueError, match="list of 2 batches for 3 data-parallel groups"):
        split_arguments([[batch(1), batch(3)]], dp_size=3, method="update")


def test_a_call_without_a_batch_to_split_is_refused():
    with pytest.raises(TypeError, match=r"update\(\) splits its data .* got no DataProto"):
        split_arguments([1, "x", []], dp_size=2, method="update")


def test_batches_are_concatenated_and_other_results_listed():
    assert merge_results([batch(2), batch(1)])["uid"] == [0, 1, 0]
    assert merge_results([1, 2]) == [1, 2]
    assert merge_results([batch(1), None])[1] is None
