"""Media are encoded once and kept within a bound; several ranks are in `test_engine`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config
from tests.workers.tiny_runs import CLIP, FILM, PHOTO, PLAN, NoFiles, media, tiny_encoder
from verl.models.adapter import get_adapter
from verl.workers import encoder as encoder_module
from verl.workers.encoder import MediaEncoder, WholeModel

WIDTH = 32
BYTES = {m.ref.key: m.n_tokens * WIDTH * 4 for m in (CLIP, FILM, PHOTO, PLAN)}


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


def test_each_piece_of_media_is_encoded_once_however_often_it_is_used(tower):
    encoder = tiny_encoder(tower)
    rows = [(CLIP, PHOTO), (), (PHOTO,), (FILM, CLIP, CLIP)]
    first = encoder.features_each(rows)
    again = encoder.features_each(rows)
    assert tower.calls == [[CLIP.grid_thw, PHOTO.grid_thw, FILM.grid_thw]]
    assert encoder.encoded == 3
    assert [None if f is None else f.shape for f in first] == [(10, 32), None, (2, 32), (22, 32)]
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_features_stand_in_the_order_of_the_items_and_equal_a_call_for_each(tower):
    both = tiny_encoder(tower).features((FILM, CLIP))
    for part, item in zip(both.split([FILM.n_tokens, CLIP.n_tokens]), (FILM, CLIP), strict=True):
        alone = tiny_encoder(tower).features((item,))
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)


def test_a_call_of_the_tower_holds_as_many_patches_as_the_budget_allows(tower, monkeypatch):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_CALL", 40)
    tiny_encoder(tower).features((CLIP, PHOTO, FILM, PLAN))
    # 32 + 8 patches, then 24, and then 24 again, which would be 48 together.
    assert [len(call) for call in tower.calls] == [2, 1, 1]


def test_media_larger_than_the_budget_are_encoded_alone(tower, monkeypatch):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_CALL", 1)
    assert tiny_encoder(tower).features((CLIP, PHOTO)).shape == (10, 32)
    assert [len(call) for call in tower.calls] == [1, 1]


def test_the_least_recently_used_features_go_first(tower):
    encoder = tiny_encoder(tower, BYTES["clip"] + BYTES["film"])
    encoder.features((CLIP,))
    encoder.features((FILM,))
    encoder.features((CLIP,))
    encoder.features((PHOTO,))  # no room: the film goes, since the clip was used after it
    assert encoder.encoded == 3
    encoder.features((CLIP, PHOTO))
    assert encoder.encoded == 3
    encoder.features((FILM,))
    assert encoder.encoded == 4


def test_kept_features_never_exceed_the_bound(tower):
    limit = BYTES["clip"] + BYTES["photo"]
    encoder = tiny_encoder(tower, limit)
    for item in (CLIP, FILM, PHOTO, PLAN, FILM, CLIP):
        encoder.features((item,))
        kept = sum(t.untyped_storage().nbytes() for t in encoder._kept.values())
        assert kept == encoder._kept_bytes <= limit


def test_features_larger_than_the_bound_are_used_but_not_kept(tower):
    encoder = tiny_encoder(tower, BYTES["clip"] - 1)
    encoder.features((PHOTO,))
    assert encoder.features((CLIP,)).shape == (8, 32)
    encoder.features((CLIP, PHOTO))
    assert [len(c) for c in tower.calls] == [1, 1, 1]
    assert tower.calls[-1] == [CLIP.grid_thw]


@pytest.mark.parametrize("items", [(CLIP,), (CLIP, PHOTO)], ids=["one", "two"])
def test_kept_features_are_not_changed_through_what_was_handed_out(tower, items):
    encoder = tiny_encoder(tower)
    features = encoder.features(items)
    expected = features.clone()
    features.zero_()
    assert torch.equal(encoder.features(items), expected)


def test_a_blind_encoder_sees_the_mean_colour_and_opens_no_file(tower):
    cache = NoFiles()
    encoder = MediaEncoder(tower, cache, 2**20, blank=True)  # type: ignore[arg-type]
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
