"""How heads are spread over the ranks of a sequence."""

import pytest

from verl.sequence_parallel.topology import kv_copies


@pytest.mark.parametrize(
    ("heads", "kv_heads", "copies"),
    [
        (16, 2, {1: 1, 2: 1, 4: 2, 8: 4, 16: 8}),  # Qwen2.5-VL-3B
        (28, 4, {1: 1, 2: 1, 4: 1, 7: 7, 14: 7, 28: 7}),  # Qwen2.5-VL-7B
        (8, 8, {1: 1, 2: 1, 4: 1, 8: 1}),
        (6, 1, {2: 2, 3: 3, 6: 6}),
    ],
)
def test_key_value_heads_are_repeated_as_little_as_leaves_whole_groups(heads, kv_heads, copies):
    for size, expected in copies.items():
        e = kv_copies(heads, kv_heads, size)
        assert e == expected
        # Each rank's query heads belong to its key-value heads, equally many to each.
        assert kv_heads * e % size == 0 and heads // size % (kv_heads * e // size) == 0


def test_a_size_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="8 ranks cannot share 28 attention heads"):
        kv_copies(28, 4, 8)
