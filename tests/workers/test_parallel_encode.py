"""Ranks that encode together make what one rank makes, once, and end together on an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_gloo
from tests.tiny import tiny_config
from tests.workers.tiny_runs import CLIP, FILM, PHOTO, PLAN, NoFiles, media
from verl.data.embed_store import EmbedStore
from verl.data.media import Frames, MediaRef
from verl.models.adapter import get_adapter
from verl.utils.exits import UserError
from verl.workers import encoder as encoder_module
from verl.workers.encoder import MediaEncoder, StoredFeatures, WholeModel
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
    stored = None
    if folder is not None:
        stored = StoredFeatures(
            store=EmbedStore(folder, limit), family="qwen2_5_vl", weights="w",
            dtype=torch.float32, num_chunk_seq=chunks,
        )  # fmt: skip
    engine = WholeModel(hf, adapter, CPU)
    return MediaEncoder(engine, OddFiles(*ALL), 0, stored=stored, **kwargs)  # type: ignore[arg-type]


def encode_shares(rank: int, world: int, folder: str, chunks: int, limit: int) -> Any:
    encoder_module.PATCHES_PER_CALL = 40  # several calls a rank, and several rounds
    encoder = encoder_at(folder, chunks, limit)
    own = [item for row in SHOWN[rank::world] for item in row]
    made = [encoder.prepare(own), encoder.prepare(own)]
    each = encoder.features_each([[i] for i in own])
    features = dict(zip([i.ref.key for i in own], each, strict=True))
    return made, encoder.encoded, features


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


def test_what_the_store_has_no_room_for_is_made_where_it_is_used(alone, tmp_path):
    for _, _, features in run_gloo(encode_shares, 2, str(tmp_path), -1, 0):
        for key, value in features.items():
            torch.testing.assert_close(value, alone[key], atol=1e-5, rtol=0)


def test_a_video_that_one_rank_cannot_read_ends_all_ranks_with_the_reason(tmp_path):
    for message in run_gloo(fail_on_one, 3, str(tmp_path)):
        assert "/long: cannot be read" in message


def test_a_later_run_encodes_nothing_and_reads_the_same_bits(tmp_path):
    first, again = encoder_at(str(tmp_path)), encoder_at(str(tmp_path))
    live = encoder_at(str(tmp_path / "none"), limit=0).features(ALL)
    assert torch.equal(first.features(ALL), live)
    assert torch.equal(again.features(ALL), live)
    assert (first.encoded, again.encoded) == (len(ALL), 0)


def test_a_trained_tower_and_a_blind_encoder_store_nothing(tmp_path, monkeypatch):
    encoder_at(str(tmp_path), blank=True).features([CLIP])
    monkeypatch.setattr(WholeModel, "tower_is_frozen", False)
    trained = encoder_at(str(tmp_path))
    assert trained.prepare([CLIP]) == 0
    assert trained._stored is None
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_gather_has_as_many_parts_as_free_memory_asks_for():
    assert chunks_for(1000, 8000) == 1
    assert chunks_for(1001, 8000) == 8
    assert chunks_for(8001, 8000) == 16
    assert chunks_for(10**9, 8) == 128
