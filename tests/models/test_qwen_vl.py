import pytest
import torch

from tests.tiny import IMAGE_ID, VIDEO_ID, tiny_config
from verl.data.media import MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.models.adapter import ModelError, get_adapter
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, register_attention
from verl.sequence_parallel.packing import Layout

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter():
    return get_adapter(tiny_config())


@pytest.fixture(scope="module")
def models(adapter):
    """The same weights twice: as transformers runs them, and with our attention."""
    register_attention()
    torch.manual_seed(0)
    theirs = adapter.model_class()(tiny_config()).eval()
    ours = adapter.model_class()(tiny_config()).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation({"text_config": ATTENTION})
    return theirs, ours


def item(kind: str, grid: tuple[int, int, int], seconds_per_grid: float = 0.0) -> MediaItem:
    n_tokens = grid[0] * grid[1] * grid[2] // 4
    rule = ResizeRule(
        min_pixels=56 * 56, max_pixels=56 * 56, patch_size=14, merge_size=2, temporal_patch_size=2
    )
    ref = MediaRef(kind=kind, path="x", sampling=None, resize=rule, key=f"{kind}{grid}")
    return MediaItem(ref, grid, seconds_per_grid, n_tokens, ())


def our_logits(adapter, model, ids, media, pixels):
    positions = adapter.positions(ids, media)
    features = None
    if media:
        features = adapter.encode(model, pixels, [m.grid_thw for m in media])
    embeds = adapter.embed(model, ids, features)
    attention = PackedAttention(Layout((len(ids),), (-1,)), CPU)
    return model.lm_head(adapter.hidden(model, embeds, positions, attention))


def prompt(adapter, media):
    pads = {"image": IMAGE_ID, "video": VIDEO_ID}
    ids = [10, 11]
    for m in media:
        ids += [3, pads[m.ref.kind], 4, 12]
    return torch.tensor(adapter.expand(ids + [13, 14], media))


@torch.no_grad()
def test_text_logits_equal_transformers(adapter, models):
    theirs, ours = models
    ids = torch.randint(8, 60, (23,))
    expected = theirs(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(
        our_logits(adapter, ours, ids, [], None), expected, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_image_logits_equal_transformers_pixel_path(adapter, models):
    theirs, ours = models
    media = [item("image", (1, 4, 6)), item("image", (1, 8, 4))]
    ids = prompt(adapter, media)
    pixels = torch.randn(sum(m.n_tokens * 4 for m in media), 3 * 2 * 14 * 14)
    expected = theirs(
        input_ids=ids[None],
        pixel_values=pixels,
        image_grid_thw=torch.tensor([m.grid_thw for m in media]),
        mm_token_type_ids=(ids == IMAGE_ID).long()[None],
    ).logits[0]
    got = our_logits(adapter, ours, ids, media, pixels)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_video_logits_equal_transformers_given_the_right_positions(adapter, models):
    theirs, ours = models
    media = [item("video", (6, 4, 4), 0.75)]
    ids = prompt(adapter, media)
    pixels = torch.randn(96, 3 * 2 * 14 * 14)
    expected = theirs(
        input_ids=ids[None],
        pixel_values_videos=pixels,
        video_grid_thw=torch.tensor([[6, 4, 4]]),
        position_ids=adapter.positions(ids, media)[:, None],
    ).logits[0]
    got = our_logits(adapter, ours, ids, media, pixels)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_expansion_repeats_each_placeholder_for_its_own_media(adapter):
    media = [item("image", (1, 4, 4)), item("video", (2, 4, 4), 1.0)]
    ids = adapter.expand([9, IMAGE_ID, 9, VIDEO_ID], media)
    assert ids == [9] + [IMAGE_ID] * 4 + [9] + [VIDEO_ID] * 8


@pytest.mark.parametrize(
    ("ids", "media"),
    [
        ([9, VIDEO_ID], [item("image", (1, 4, 4))]),
        ([9, IMAGE_ID, IMAGE_ID], [item("image", (1, 4, 4))]),
        ([9], [item("image", (1, 4, 4))]),
    ],
)
def test_placeholders_that_do_not_match_the_media_are_refused(adapter, ids, media):
    with pytest.raises(ValueError, match="placeholder"):
        adapter.expand(ids, media)


def test_sampled_visual_tokens_are_caught_when_features_are_placed(adapter, models):
    with pytest.raises(ValueError, match="5 visual tokens in the row but 4"):
        adapter.embed(models[1], torch.tensor([9] + [VIDEO_ID] * 5), torch.zeros(4, 32))


def test_an_unknown_family_is_named_with_the_known_ones():
    config = tiny_config()
    config.model_type = "other_vl"
    with pytest.raises(ValueError, match=r"'other_vl' has no adapter.*qwen2_5_vl"):
        get_adapter(config)


def test_a_sliding_window_that_attention_would_ignore_is_refused():
    text = {"use_sliding_window": True, "max_window_layers": 1, "max_position_embeddings": 4096}
    config = tiny_config()
    entries = config.text_config.to_dict() | text
    for window, layers in ((4096, None), (64, ["full_attention"] * 2)):
        config.text_config = type(config.text_config)(
            **entries | {"sliding_window": window, "layer_types": layers}
        )
        get_adapter(config)
    config.text_config = type(config.text_config)(
        **entries | {"sliding_window": 64, "layer_types": None}
    )
    with pytest.raises(ModelError, match=r"use_sliding_window=true with sliding_window=64"):
        get_adapter(config)


def test_the_towers_weights_are_counted_within_a_few_percent(adapter, models):
    tower = models[0].model.visual
    assert adapter.tower_parameters == pytest.approx(
        sum(p.numel() for p in tower.parameters()), rel=0.05
    )
