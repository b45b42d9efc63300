"""Ranks that encode together make what one rank makes, once, and end together on an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_gloo
from tests.tiny import tiny_config
from tests.workers.tiny_runs import CLIP, FILM, PHOTO, PLAN, NoFiles, media, stored_at
from verl.data.media import Frames, MediaRef
from verl.models.adapter import get_adapter
from verl.models.fingerprint import tower_fingerprint
from verl.utils.exits import UserError
from verl.workers import encoder as encoder_module
from verl.workers import parallel_encode
from verl.workers.encoder import BLOCK_PATCHES, MediaEncoder, WholeModel
from verl.workers.parallel_encode import chunks_for

LONG = media("long", (7, 4, 6))
ALL = (CLIP, FILM, PHOTO, PLAN, LONG)
SHOWN = [(CLIP, PHOTO, FILM), (), (LONG, CLIP, PLAN), (PHOTO, LONG)]
"""What each of four ranks needs: several pieces, none, and some of others."""
CPU = torch.device("cpu")


class OddFiles(NoFiles):
    """Videos have an odd number of frames; one named in `bad` cannot be read."""

    bad = ""

    def get(self, ref: MediaRef) -> Frames:
        if ref.key == self.bad:
            raise UserError(f"{ref.path}: cannot be read")
        frames = super().get(ref)
        n = len(frames.frames_u8)
        return Frames(frames.frames_u8[: n - (n > 1)], frames.frame_times, 1.0)


def encoder_at(folder: str | None, chunks: int = -1, limit: int = 2**24, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    adapter = get_adapter(tiny_config())
    hf = adapter.model_class()(tiny_config()).eval()
    stored = None if folder is None else stored_at(folder, limit, num_chunk_seq=chunks)
    engine = WholeModel(hf, adapter, CPU)
    return MediaEncoder(engine, OddFiles(*ALL), stored, **kwargs)  # type: ignore[arg-type]


def encode_shares(rank: int, world: int, folder: str, chunks: int, limit: int) -> Any:
    encoder_module.BLOCK_PATCHES = 24  # several calls a rank
    parallel_encode._ROUND = 2  # and several rounds
    encoder = encoder_at(folder, chunks, limit)
    own = [item for row in SHOWN[rank::world] for item in row]
    made = [encoder.prepare(own), encoder.prepare(own)]
    each = encoder.features_each([[i] for i in own])
    features = dict(zip([i.ref.key for i in own], each, strict=True))
    return made, encoder.encoded.total(), features


def largest_part(rank: int, world: int, folder: str, chunks: int) -> Any:
    """Bytes of the largest part that this rank received, and the features of a long video."""
    received, recv = [0], dist.recv
    dist.recv = lambda part, source: (received.append(part.nbytes), recv(part, source))
    encoder_module.BLOCK_PATCHES = 24
    encoder = encoder_at(folder, chunks)
    encoder.prepare([LONG] if rank == 0 else [])
    return max(received), encoder.features([LONG])


def encode_on_two_machines(rank: int, world: int, folder: str) -> Any:
    """Ranks 0 and 1 on one machine, 2 and 3 on another, each with a store of its own."""
    machine = rank // 2
    parallel_encode._machine = lambda: f"machine {machine}"
    encoder_module.BLOCK_PATCHES = 24
    encoder = encoder_at(f"{folder}/{machine}")
    if machine == 0:  # What only one machine lacks is made again, and sent to it alone.
        encoder.features([LONG])
        encoder.encoded.clear()
    dist.barrier()
    own = [item for row in SHOWN[rank::world] for item in row]
    made = encoder.prepare(own)
    found = {item.ref.key for item in ALL if encoder._stored.has(item)}
    again = encoder.prepare(own)
    return made, again, found, {item.ref.key: encoder.features([item]) for item in own}


def fail_on_one(rank: int, world: int, folder: str) -> str:
    encoder = encoder_at(folder)
    encoder._cache.bad = "long"
    try:
        encoder.prepare(SHOWN[2] if rank == 1 else ())
    except UserError as error:
        dist.barrier()  # nobody hangs, and the group still works
        return str(error)
    return ""


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """Features of every piece encoded whole, in a call of its own."""
    encoder = encoder_at(None)
    assert all(i.grid_thw[0] * i.grid_thw[1] * i.grid_thw[2] <= BLOCK_PATCHES for i in ALL)
    return {item.ref.key: encoder.features([item]) for item in ALL}


@pytest.mark.parametrize("world, chunks", [(1, -1), (2, 8), (3, -1), (4, 3)])
def test_ranks_make_together_what_one_makes_alone(world, chunks, alone, tmp_path):
    ranks = run_gloo(encode_shares, world, str(tmp_path), chunks, 2**24)
    assert sum(encoded for _, encoded, _ in ranks) == len(ALL)
    if world > 1:
        assert [made for made, _, _ in ranks] == [[len(ALL), 0]] * world
    for _, _, features in ranks:
        for key, value in features.items():
            torch.testing.assert_close(value, alone[key], atol=1e-5, rtol=0)


def test_any_number_of_ranks_makes_the_same_bits(tmp_path):
    made = [
        {k: v for _, _, features in ranks for k, v in features.items()}
        for ranks in (
            run_gloo(encode_shares, world, str(tmp_path / str(world)), -1, 2**24)
            for world in (1, 3)
        )
    ]
    for key, value in made[1].items():
        assert torch.equal(value, made[0][key])


def test_each_machine_is_given_what_its_own_ranks_need_once(alone, tmp_path):
    ranks = run_gloo(encode_on_two_machines, 4, str(tmp_path))
    # The first machine's ranks show clip, photo and film, and one has nothing to show.
    assert [found for _, _, found, _ in ranks[:2]] == [{"clip", "photo", "film", "long"}] * 2
    assert [found for _, _, found, _ in ranks[2:]] == [{"long", "clip", "plan", "photo"}] * 2
    assert [(made, again) for made, again, _, _ in ranks] == [(len(ALL), 0)] * 4
    for _, _, _, features in ranks:
        for key, value in features.items():
            torch.testing.assert_close(value, alone[key], atol=1e-5, rtol=0)


def test_more_parts_of_a_gather_take_less_memory_and_change_nothing(tmp_path):
    found = {n: run_gloo(largest_part, 2, str(tmp_path / str(n)), n) for n in (1, 8, 16)}
    whole = max(size for size, _ in found[1])
    assert whole >= 3 * 6 * 32 * 4  # three of seven steps are the other rank's, 6 tokens each
    assert max(size for size, _ in found[8]) <= -(-whole // 8) + 32 * 4
    assert max(size for size, _ in found[16]) <= -(-whole // 16) + 32 * 4
    for ranks in found.values():
        for _, features in ranks:
            assert torch.equal(features, found[1][0][1])


def test_what_the_store_has_no_room_for_is_made_where_it_is_used(alone, tmp_path):
    for _, _, features in run_gloo(encode_shares, 2, str(tmp_path), -1, 0):
        for key, value in features.items():
            torch.testing.assert_close(value, alone[key], atol=1e-5, rtol=0)


def crowded(rank: int, world: int, folder: str) -> Any:
    """Two phases with a store that has room for small pieces only; patches encoded in each."""
    room = PLAN.n_tokens * 32 * 4 + 2048
    encoder = encoder_at(folder, limit=room)
    counts = []
    for _ in range(2):
        made = encoder.prepare([LONG])
        encoder.features([LONG])
        counts.append((made, encoder.encoded["video"]))
    return counts


def test_what_was_refused_once_is_not_encoded_together_again(tmp_path):
    first, second = run_gloo(crowded, 2, str(tmp_path))
    assert [made for made, _ in first] == [made for made, _ in second] == [1, 0]
    # Together once (counted on rank 0), and where it is used, by both, in each phase.
    assert ([n for _, n in first], [n for _, n in second]) == ([2, 3], [1, 2])


def test_without_a_tower_the_features_in_use_are_held_against_neighbours(tmp_path):
    encoder_at(str(tmp_path)).features([LONG])
    reader = encoder_at(str(tmp_path))
    reader._engine.has_tower = False
    reader.prepare([LONG])
    room = reader._stored.store.size_bytes()
    encoder_at(str(tmp_path), limit=room).features([FILM])
    assert reader.features([LONG]) is not None


def test_a_video_that_one_rank_cannot_read_ends_all_ranks_with_the_reason(tmp_path):
    for message in run_gloo(fail_on_one, 3, str(tmp_path)):
        assert "/long: cannot be read" in message


def test_a_later_run_encodes_nothing_and_reads_the_same_bits(tmp_path):
    first, again = encoder_at(str(tmp_path)), encoder_at(str(tmp_path))
    live = encoder_at(str(tmp_path / "none"), limit=0).features(ALL)
    assert torch.equal(first.features(ALL), live)
    assert torch.equal(again.features(ALL), live)
    assert (first.encoded.total(), again.encoded.total()) == (len(ALL), 0)
    assert first.encoded == {"video": 3, "image": 2}


def test_features_of_a_tower_that_is_trained_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(WholeModel, "tower_is_frozen", False)
    with pytest.raises(ValueError, match="a tower that is trained"):
        encoder_at(str(tmp_path))
    assert encoder_at(None).prepare([CLIP]) == 0


def test_what_a_step_uses_is_not_evicted_until_the_next_call(tmp_path):
    encoder = encoder_at(str(tmp_path))
    encoder.prepare([LONG])
    encoder.features([LONG])
    room = encoder._stored.store.size_bytes()
    encoder_at(str(tmp_path), limit=room).features([FILM])
    assert encoder._stored.has(LONG)
    encoder.prepare([])
    encoder_at(str(tmp_path), limit=room).features([FILM])
    assert not encoder._stored.has(LONG)


def test_weights_that_change_miss_what_is_stored(tmp_path):
    first = encoder_at(str(tmp_path))
    before = first.features([CLIP])
    tower = first._engine.adapter.vision_tower(first._engine._hf)
    name = tower_fingerprint(tower)
    with torch.no_grad():
        next(tower.parameters())[0, 0] += 1e-3
    assert tower_fingerprint(tower) != name
    stored = stored_at(str(tmp_path), weights=tower_fingerprint(tower))
    after = MediaEncoder(first._engine, OddFiles(*ALL), stored)  # type: ignore[arg-type]
    assert not torch.equal(after.features([CLIP]), before)
    assert after.encoded.total() == 1


def test_the_gather_has_as_many_parts_as_free_memory_asks_for():
    assert chunks_for(1000, 8000) == 1
    assert chunks_for(1001, 8000) == 8
    assert chunks_for(8001, 8000) == 16
    assert chunks_for(10**9, 8) == 128
