"""The batch that crosses Ray: ragged, exact when taken apart and put together, loud when wrong."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
import torch

from verl.data.media import MediaItem, MediaRef
from verl.data.preprocess import VisionSpec
from verl.data.video import FrameSampling
from verl.protocol import DataProto


@dataclass(frozen=True)
class Reference:
    key: str


def ragged(n: int = 5, **meta: object) -> DataProto:
    ids = [torch.arange(10 * i, 11 * i) for i in range(n)]  # sample i has i tokens
    return DataProto({"uid": [f"u{i}" for i in range(n)], "ids": ids}, meta)


def same(a: DataProto, b: DataProto) -> bool:
    return len(a) == len(b) and a.keys() == b.keys() and len(a.union(b)) == len(a)


def test_a_batch_gives_its_columns_as_lists():
    batch = ragged(3)
    assert len(batch) == 3
    assert batch.keys() == ["uid", "ids"]
    assert "ids" in batch and "reward" not in batch
    assert batch["uid"] == ["u0", "u1", "u2"]
    assert [len(t) for t in batch["ids"]] == [0, 1, 2]


def test_a_missing_column_is_named_with_those_that_exist():
    with pytest.raises(KeyError, match=r"no column 'reward'; it has \['ids', 'uid'\]"):
        ragged()["reward"]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"equal lengths, got \{'a': 2, 'b': 1\}"):
        DataProto({"a": [1, 2], "b": [1]})


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(2, 2)])
def test_tensors_that_are_not_one_dimensional_are_refused(value):
    with pytest.raises(ValueError, match=r"Column 'x', sample 1: shape \(.*1-D"):
        DataProto({"x": [torch.zeros(3), value]})


@pytest.mark.parametrize("values", [[torch.zeros(1), 2.0], [torch.zeros(1), torch.zeros(1).int()]])
def test_a_column_of_mixed_kinds_is_refused(values):
    with pytest.raises(ValueError, match="Column 'x' mixes"):
        DataProto({"x": values})


def test_iterating_a_batch_says_what_to_iterate():
    with pytest.raises(TypeError, match=r"batch\.keys\(\)"):
        list(ragged())


def test_split_is_contiguous_and_even_and_concat_undoes_it():
    batch = ragged(7, temperature=0.5)
    parts = batch.split(3)
    assert [len(p) for p in parts] == [3, 2, 2]
    assert parts[1]["uid"] == ["u3", "u4"]
    assert parts[2].meta == {"temperature": 0.5}
    assert same(DataProto.concat(parts), batch)


def test_split_into_more_parts_than_samples_gives_empty_parts():
    parts = ragged(2).split(4)
    assert [len(p) for p in parts] == [1, 1, 0, 0]
    assert parts[3].keys() == ["uid", "ids"]
    assert same(DataProto.concat(parts), ragged(2))


def test_a_part_does_not_keep_the_storage_of_the_whole():
    storage = torch.zeros(1000)
    part = DataProto({"x": list(storage.split(10))}).split(100)[0]
    assert part["x"][0].untyped_storage().nbytes() == 40


def test_chunk_sizes_must_add_up():
    assert [p["uid"] for p in ragged(3).chunk_by([0, 2, 1])] == [[], ["u0", "u1"], ["u2"]]
    with pytest.raises(ValueError, match=r"\[1, 1\] add up to 2; the batch has 3 samples"):
        ragged(3).chunk_by([1, 1])
    with pytest.raises(ValueError, match="add up"):
        ragged(3).chunk_by([-1, 4])


def test_take_follows_the_given_order_and_refuses_wrong_indices():
    assert ragged(4).take(torch.tensor([3, 0, 0]))["uid"] == ["u3", "u0", "u0"]
    with pytest.raises(IndexError, match="Index 4 is outside of a batch of 4 samples"):
        ragged(4).take([4])
    with pytest.raises(IndexError):
        ragged(4).take([-1])


def test_repeat_interleaves_or_appends():
    batch = ragged(2)
    assert batch.repeat(2)["uid"] == ["u0", "u0", "u1", "u1"]
    assert batch.repeat(2, interleave=False)["uid"] == ["u0", "u1", "u0", "u1"]


def test_concat_names_the_columns_and_meta_that_differ():
    with pytest.raises(ValueError, match=r"batch 1 lacks \['ids'\] and has \['x'\] in addition"):
        DataProto.concat([ragged(1), DataProto({"uid": ["a"], "x": [1]})])
    with pytest.raises(ValueError, match="differs in 'step': 1 and 2"):
        DataProto.concat([ragged(1, step=1), ragged(1, step=2)])
    with pytest.raises(ValueError, match=r"the second lacks \['step'\]"):
        DataProto.concat([ragged(1, step=1), ragged(1)])
    with pytest.raises(ValueError, match="zero batches"):
        DataProto.concat([])


def test_union_adds_columns_and_meta():
    batch = ragged(2, step=1).union(DataProto({"reward": [0.0, 1.0]}, {"kl": 2}))
    assert batch.keys() == ["uid", "ids", "reward"]
    assert batch.meta == {"step": 1, "kl": 2}


def test_union_accepts_equal_columns_and_refuses_different_ones():
    assert same(ragged(2).union(ragged(2)), ragged(2))
    with pytest.raises(ValueError, match="column 'ids' is in both batches with different values"):
        ragged(2).union(DataProto({"ids": [torch.tensor([0]), torch.tensor([1])]}))
    with pytest.raises(ValueError, match="2 samples with one of 3"):
        ragged(2).union(ragged(3))
    with pytest.raises(ValueError, match="differs in 'step'"):
        ragged(1, step=1).union(ragged(1, step=2))


def test_changes_give_a_new_batch_and_leave_the_old_one_alone():
    batch = ragged(2, step=1)
    changed = batch.with_columns(uid=["a", "b"], reward=[1.0, 0.0]).with_meta(step=2)
    assert changed["uid"] == ["a", "b"] and changed.meta == {"step": 2}
    assert batch["uid"] == ["u0", "u1"] and batch.meta == {"step": 1}
    assert changed.select(["reward"]).keys() == ["reward"]
    with pytest.raises(ValueError, match="equal lengths"):
        batch.with_columns(reward=[1.0])


def test_flat_gives_values_and_lengths():
    values, lengths = ragged(3).flat("ids")
    assert values.tolist() == [10, 20, 21]
    assert lengths.tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="Column 'uid' holds str"):
        ragged(3).flat("uid")
    assert ragged(0).flat("ids")[0].tolist() == []


def test_bytes_are_counted_by_sample():
    batch = DataProto({"x": [torch.zeros(3), torch.zeros(5)]})
    assert batch.nbytes_per_sample() == [12, 20]
    small, large = DataProto({"x": ["a", "a" * 1000]}).nbytes_per_sample()
    assert large - small >= 990


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0, 1]])
def test_pickling_keeps_values_dtypes_objects_and_meta(dtype, lengths):
    tensors = [torch.arange(n).to(dtype) for n in lengths]
    objects = [(Reference("k"), {"a": n}) for n in lengths]
    batch = DataProto({"x": tensors, "o": objects}, {"step": 3, "t": torch.ones(1)})
    copy = pickle.loads(pickle.dumps(batch))
    assert same(copy, batch)
    assert copy.meta["step"] == 3
    assert all(t.dtype == dtype for t in copy["x"])


def test_pickled_tensors_are_writable_and_apart():
    copy = pickle.loads(pickle.dumps(DataProto({"x": list(torch.zeros(4).split(2))})))
    copy["x"][0].add_(1)
    assert copy["x"][1].tolist() == [0, 0]


def test_pickling_views_ships_only_what_they_show():
    storage = torch.zeros(1_000_000)
    assert len(pickle.dumps(DataProto({"x": [storage[:10], storage[50:60]]}))) < 2000


def test_the_representation_tells_size_and_kinds():
    assert repr(ragged(2, step=1)) == (
        "DataProto(2 samples; uid: str, ids: torch.int64; meta=['step'])"
    )


def test_what_a_group_shares_crosses_once_and_comes_back_shared():
    prompt = torch.arange(1000)
    batch = DataProto({"prompt": [prompt] * 8, "own": list(torch.arange(8).split(1))})
    data = pickle.dumps(batch)
    assert len(data) < 2 * prompt.nbytes
    copy = pickle.loads(data)
    assert all(torch.equal(p, prompt) for p in copy["prompt"]) and len(copy) == 8
    assert copy.take([3, 5])["own"][1].item() == 5


def test_parts_of_a_batch_cross_with_what_their_samples_share_once():
    prompt = torch.arange(1000)
    parts = DataProto({"prompt": [prompt] * 8}).split(2)
    assert all(len(pickle.dumps(part)) < 2 * prompt.nbytes for part in parts)
    parts[0]["prompt"][0][0] = 7
    assert prompt[0] == 0 and parts[1]["prompt"][0][0] == 0


def test_an_hour_of_video_crosses_as_a_name_and_never_as_pixels_or_embeddings():
    """3,600 frames in 126,000 tokens, 8 responses: what a step hands to a worker."""
    rule = VisionSpec().resize_rule("video")
    sampling = FrameSampling(num_frames=3600)
    ref = MediaRef("video", "/films/hour.mp4", sampling, rule, "0" * 32, source_shape=(1, 2, 3))
    times = tuple(i * 1.000278 for i in range(3600))
    film = MediaItem(ref, (1800, 16, 18), 2.0, 129_600, times)
    prompt = torch.full((130_000,), 7)
    rows = {"uid": ["q"], "prompt_ids": [prompt], "media": [(film,)]}
    responses = list(torch.ones(8 * 4096, dtype=torch.long).split(4096))
    batch = DataProto(rows).repeat(8).with_columns(response_ids=responses)
    a_sample = len(pickle.dumps(batch)) / len(batch)
    names_and_times = 64 * 1024
    assert a_sample < prompt.nbytes / 8 + 4096 * 8 + names_and_times / 8
    assert a_sample < 180_000  # its embeddings take 531 million bytes, its pixels 1.6 billion
