"""Media are encoded once, in blocks; several ranks are in `test_parallel_encode`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config
from tests.workers.tiny_runs import CLIP, FILM, PHOTO, PLAN, NoFiles, media, tiny_encoder
from verl.models.adapter import get_adapter
from verl.utils.exits import UserError
from verl.workers import encoder as encoder_module
from verl.workers.encoder import MediaEncoder, WholeModel

WIDTH = 32


class Counting(WholeModel):
    """A whole model that remembers the grids of every call of its tower."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[list[tuple[int, int, int]]] = []
        self.brightest = 0.0

    def encode(self, pixels: Tensor, grids: Any) -> Tensor:
        self.calls.append(list(grids))
        self.brightest = max(self.brightest, float(pixels.abs().max()))
        return super().encode(pixels, grids)


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(0)
    return get_adapter(tiny_config()).model_class()(tiny_config()).eval()


@pytest.fixture
def tower(hf) -> Counting:
    return Counting(hf, get_adapter(tiny_config()), torch.device("cpu"))


def test_each_piece_of_media_is_encoded_once_however_often_it_is_used(tower, tmp_path):
    encoder = tiny_encoder(tower, tmp_path)
    rows = [(CLIP, PHOTO), (), (PHOTO,), (FILM, CLIP, CLIP)]
    first = encoder.features_each(rows)
    again = encoder.features_each(rows)
    assert tower.calls == [[CLIP.grid_thw], [PHOTO.grid_thw], [FILM.grid_thw]]
    assert encoder.encoded == {"video": 2, "image": 1}
    assert [None if f is None else f.shape for f in first] == [(10, 32), None, (2, 32), (22, 32)]
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_without_a_store_media_are_encoded_once_a_call(tower):
    encoder = tiny_encoder(tower)
    for _ in range(2):
        encoder.features_each([(CLIP, PHOTO), (CLIP,)])
    assert tower.calls == [[CLIP.grid_thw], [PHOTO.grid_thw]] * 2


@pytest.mark.parametrize("block", [1, 17, 4096])
def test_features_do_not_depend_on_what_else_is_encoded(tower, monkeypatch, block):
    monkeypatch.setattr(encoder_module, "BLOCK_PATCHES", block)
    both = tiny_encoder(tower).features((FILM, CLIP))
    for part, item in zip(both.split([FILM.n_tokens, CLIP.n_tokens]), (FILM, CLIP), strict=True):
        assert torch.equal(part, tiny_encoder(tower).features((item,)))


def test_a_call_of_the_tower_is_a_block_of_one_piece_of_media(tower, monkeypatch):
    monkeypatch.setattr(encoder_module, "BLOCK_PATCHES", 17)
    tiny_encoder(tower).features((CLIP, FILM, PLAN))
    # Steps of 16 patches one by one, of 8 patches by twos, and one of 24 that is larger.
    assert tower.calls == [[(1, 4, 4)], [(1, 4, 4)], [(2, 2, 4)], [(1, 2, 4)], [(1, 6, 4)]]


def test_blocks_are_grouped_up_to_a_budget_where_the_device_wants_large_calls(tower, monkeypatch):
    expected = tiny_encoder(tower).features((CLIP, PHOTO, FILM, PLAN))
    tower.calls.clear()
    monkeypatch.setattr(encoder_module, "_patches_at_once", lambda device: 40)
    made = tiny_encoder(tower).features((CLIP, PHOTO, FILM, PLAN))
    # 32 + 8 patches, then 24, and then 24 again, which would be 48 together.
    assert [len(call) for call in tower.calls] == [2, 1, 1]
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_stored_features_are_not_changed_through_what_was_handed_out(tower, tmp_path):
    encoder = tiny_encoder(tower, tmp_path)
    for items in ((CLIP,), (CLIP, PHOTO)):
        features = encoder.features(items)
        expected = features.clone()
        features.zero_()
        assert torch.equal(encoder.features(items), expected)


def test_frames_of_a_piece_of_media_are_asked_for_once_a_call(tower, monkeypatch):
    monkeypatch.setattr(encoder_module, "BLOCK_PATCHES", 1)
    cache = NoFiles()
    MediaEncoder(tower, cache).features((CLIP, FILM))  # type: ignore[arg-type]
    assert len(tower.calls) == 5 and cache.gets == ["clip", "film"]


def test_blind_features_are_stored_once_a_size_and_never_served_to_who_sees(tower, tmp_path):
    blind, seeing = tiny_encoder(tower, tmp_path, blank=True), tiny_encoder(tower, tmp_path)
    other = media("another film", CLIP.grid_thw)
    dark = blind.features_each([(CLIP,), (other,)])
    assert len(tower.calls) == 1 and not blind.encoded
    assert torch.equal(dark[0], dark[1])
    assert not torch.equal(seeing.features((CLIP,)), dark[0])


def test_without_a_tower_stored_features_are_read_and_others_are_named(tower, tmp_path):
    expected = tiny_encoder(tower, tmp_path).features((CLIP,))
    tower.has_tower = False
    encoder = tiny_encoder(tower, tmp_path)
    assert torch.equal(encoder.features((CLIP,)), expected)
    with pytest.raises(UserError, match=r"/film: cached_embeds_dir=.* has no embeddings"):
        encoder.features((CLIP, FILM))


def test_a_blind_encoder_sees_the_mean_colour_and_opens_no_file(tower):
    cache = NoFiles()
    encoder = MediaEncoder(tower, cache, blank=True)  # type: ignore[arg-type]
    blind = encoder.features((CLIP,))
    assert cache.gets == []
    assert tower.brightest == 0.0
    assert blind.shape == (CLIP.n_tokens, WIDTH)
    other = media("another film", CLIP.grid_thw)
    assert torch.equal(blind, encoder.features((other,)))


def test_media_that_decode_to_another_size_are_refused(tower):
    changed = media("clip", (2, 4, 6))
    with pytest.raises(
        ValueError, match=r"/clip: decoded to grid \(2, 4, 4\), expected \(2, 4, 6\)"
    ):
        tiny_encoder(tower).features((changed,))
