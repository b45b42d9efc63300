"""A forest of segments, laid out depth first."""

import pytest

from tests.sequence_parallel.oracle import LAYOUTS, dense_mask
from verl.sequence_parallel.layout import ROOT, Layout

VIDEO = Layout((7, 2, 3, 1, 4, 2), (ROOT, 0, 1, 1, 0, 4))
"""A video, a question with two responses, a question with one."""


def test_every_segment_knows_where_it_and_its_branches_lie():
    assert VIDEO.spans == [(0, 7), (7, 9), (9, 12), (12, 13), (13, 17), (17, 19)]
    assert VIDEO.branch_ends == [19, 13, 12, 13, 19, 19]
    assert VIDEO.depths == [0, 1, 2, 2, 1, 2]
    assert [VIDEO.ancestors(i) for i in range(6)] == [[], [0], [0, 1], [0, 1], [0], [0, 4]]
    assert VIDEO.size == 19


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_the_cost_of_attention_is_what_queries_see(layout):
    assert layout.n_pairs == int(dense_mask(layout).sum())


def test_groups_are_prompts_followed_by_their_responses():
    assert Layout.of_groups((3, 2), ((1, 4), ())) == Layout((3, 1, 4, 2), (ROOT, 0, 0, ROOT))


def test_a_tensor_holds_the_whole_layout():
    assert Layout.of_tensor(VIDEO.as_tensor) == VIDEO


@pytest.mark.parametrize(
    "parents", [(0, ROOT), (ROOT, 2, 0), (ROOT, 0, 1, ROOT, 1), (ROOT, ROOT, 0)]
)
def test_a_segment_that_does_not_follow_what_it_continues_is_refused(parents):
    with pytest.raises(ValueError, match="does not stand before it"):
        Layout((1,) * len(parents), parents)


@pytest.mark.parametrize(("lengths", "parents"), [((1, 2), (ROOT,)), ((1, -1), (ROOT, 0))])
def test_lengths_that_cannot_be_are_refused(lengths, parents):
    with pytest.raises(ValueError, match="a row of segments"):
        Layout(lengths, parents)
