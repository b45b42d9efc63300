import itertools
import threading
import time
from collections import Counter

import av
import numpy as np
import pytest

from verl.data.dataset import PromptDataset
from verl.data.loader import PromptLoader, decoded_bytes
from verl.data.media import MediaCache
from verl.data.sources import DataError

FRAME_BYTES = 3 * 2 * 2 * 4 * 14**2  # of a video of grid 1 2 4


@pytest.fixture
def open_loader(write_rows, make_config, tokenizer, fmt, fake_media):
    """A loader over `n` text rows, or over given rows; each call builds everything anew."""

    def open_rows(rows=10, batch_size=3, *, data=None, **settings):
        rows = [{}] * rows if isinstance(rows, int) else rows
        rows = [{"problem": f"q{i}", "answer": "A", **row} for i, row in enumerate(rows)]
        config = make_config(
            write_rows(rows), **{"on_bad_sample": "skip", "max_bad_fraction": 0.5, **(data or {})}
        )
        dataset = PromptDataset(config, tokenizer, fmt)
        settings = {"shuffle": True, "seed": 1, "num_workers": 0, **settings}
        return PromptLoader(dataset, batch_size, **settings)

    return open_rows


def questions(batches):
    return [[sample.question for sample in batch] for batch in batches]


@pytest.fixture
def videos(write_video):
    """Rows with one video each; numbers in `broken` decode to nothing, in `gone` are absent."""

    def make(n, broken=(), gone=()):
        names = [f"{'broken' if i in broken else 'v'}{i}.mp4" for i in range(n)]
        for i, name in enumerate(names):
            if i not in gone:
                write_video(name, "1 2 4")
        return [{"videos": name} for name in names]

    return make


def test_an_epoch_uses_each_row_at_most_once_in_batches_of_exactly_the_size(open_loader, caplog):
    caplog.set_level("INFO")
    batches = questions(open_loader())
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len({question for batch in batches for question in batch}) == 9
    assert "epoch 0: 1 rows fill no batch of 3" in caplog.text


def test_validation_covers_every_row_in_order(open_loader):
    loader = open_loader(shuffle=False, drop_last=False)
    assert questions(loader) == [
        ["q0", "q1", "q2"],
        ["q3", "q4", "q5"],
        ["q6", "q7", "q8"],
        ["q9"],
    ]
    assert [len(batch) for batch in open_loader(batch_size=-1, drop_last=False)] == [10]


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(open_loader):
    loader = open_loader()
    epochs = [questions(loader), questions(loader)]
    assert loader.epoch == 2
    assert epochs[0] != epochs[1]
    assert epochs == [questions(again) for again in [open_loader(num_workers=3)] * 2]
    assert epochs[0] != questions(open_loader(seed=2))
    assert open_loader(100, 1).order(0)[:5] == [87, 45, 63, 37, 30]  # Frozen: runs must resume.


@pytest.mark.parametrize("n_before", range(8))
@pytest.mark.parametrize("workers", [(0, 3), (2, 1)])
def test_a_resumed_run_continues_exactly_wherever_it_stopped(
    open_loader, videos, fake_cache, n_before, workers
):
    rows = videos(12, broken=(2, 7), gone=(4, 10))

    def run(num_workers):
        return open_loader(rows, num_workers=num_workers, media_cache=fake_cache())

    whole = run(0)
    expected = questions(whole.batches(4))
    assert len(expected) == 8
    before, after = run(workers[0]), run(workers[1])
    stream = before.batches(4)
    got = questions(next(stream) for _ in range(n_before))
    after.load_state_dict(before.state_dict())
    stream.close()
    assert got + questions(after.batches(4)) == expected
    assert after.state_dict() == whole.state_dict()


def test_stopping_at_the_end_of_an_epoch_resumes_with_the_next_one(open_loader):
    loader, resumed = open_loader(6), open_loader(6)
    batches = iter(loader)
    next(batches), next(batches)
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.epoch, resumed.cursor) == (1, 0)
    assert len(questions(resumed)) == 2


def test_a_video_that_does_not_decode_gives_its_place_to_the_next_row(
    open_loader, videos, fake_cache
):
    loader = open_loader(
        videos(7, broken=(1,), gone=(3,)), media_cache=fake_cache(), shuffle=False, num_workers=2
    )
    assert questions(loader) == [["q0", "q2", "q4"]]
    assert [entry.reason for entry in loader.dataset.quarantine] == ["decode_error", "missing"]
    assert loader.dataset.quarantine[0].path.endswith("broken1.mp4")


def test_rows_left_out_once_are_not_tried_again(open_loader, videos, fake_cache):
    cache = fake_cache()
    loader = open_loader(videos(5, broken=(1,)), 2, media_cache=cache)
    list(loader.batches(3))
    assert Counter(cache.asked)["broken1.mp4"] == 1
    assert len(loader) == 2


def test_a_bad_sample_is_an_error_unless_it_may_be_skipped(open_loader, videos, fake_cache):
    loader = open_loader(
        videos(4, broken=(2,)), 2, data={"on_bad_sample": "error"}, media_cache=fake_cache(),
        shuffle=False, num_workers=2,
    )  # fmt: skip
    batches = iter(loader)
    assert questions([next(batches)]) == [["q0", "q1"]]
    with pytest.raises(DataError, match=r"rows.jsonl:3: decode_error: .*broken2.mp4"):
        next(batches)


def test_an_epoch_without_a_batch_is_an_error_and_not_an_endless_loop(open_loader):
    loader = open_loader(4, data={"max_prompt_length": 10})
    with pytest.raises(DataError, match=r"0 of 4 rows can be used.*4 prompt_too_long"):
        list(loader.batches(2))


def test_more_rows_a_batch_than_there_are_is_an_error(open_loader):
    with pytest.raises(DataError, match=r"data.rollout_batch_size .* at most 10"):
        open_loader(batch_size=11)
    with pytest.raises(DataError, match="batch size 0"):
        open_loader(batch_size=0)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"seed": 2}, "data.seed"),
        ({"shuffle": False}, "data.shuffle"),
        ({"rows": 9}, "data.train_files"),
        ({"rows": [{"problem": "edited"}] + [{}] * 9}, "data.train_files"),
    ],
)
def test_a_resume_with_another_order_is_refused(open_loader, change, setting):
    state = open_loader().state_dict()
    with pytest.raises(DataError, match=f"{setting} changed since the checkpoint"):
        open_loader(**change).load_state_dict(state)


def test_media_are_decoded_while_a_batch_is_in_use(open_loader, videos, fake_cache):
    cache = fake_cache()
    loader = open_loader(videos(6), 2, media_cache=cache, num_workers=2)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 5
    while len(cache.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(cache.asked) >= 4
    batches.close()


def test_decoding_ahead_is_bounded_in_bytes(open_loader, videos, fake_cache):
    cache = fake_cache()
    loader = open_loader(
        videos(12), 2, media_cache=cache, num_workers=4, prefetch_bytes=2 * FRAME_BYTES
    )
    batches = iter(loader)
    for n_used in (2, 4, 6):
        next(batches)
        time.sleep(0.05)
        assert len(cache.asked) <= n_used + 2
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_media_of_a_batch_are_held_until_the_next_one_is_asked_for(
    open_loader, videos, fake_cache, num_workers
):
    cache = fake_cache()
    settings = {"shuffle": False, "media_cache": cache, "num_workers": num_workers}
    held = []
    for _ in open_loader(videos(5), 2, drop_last=False, **settings):
        held.append(cache.held)
    assert held == [["v0.mp4", "v1.mp4"], ["v2.mp4", "v3.mp4"], ["v4.mp4"]]
    assert cache.held == []


def test_leaving_a_loop_early_lets_its_media_go(open_loader, videos, fake_cache):
    cache = fake_cache()
    batches = open_loader(videos(4), 2, media_cache=cache).batches(3)
    next(batches)
    assert len(cache.held) == 2
    batches.close()
    assert cache.held == []


def test_a_running_step_finds_its_video_however_full_the_cache_gets(
    write_rows, make_config, tokenizer, fmt, tmp_path
):
    names = [f"{i}.mp4" for i in range(4)]
    for name in names:
        write_film(tmp_path / name)
    rows = [{"problem": n, "answer": "A", "videos": n} for n in names]
    config = make_config(write_rows(rows), num_video_frames=4, video_min_pixels=1)
    dataset = PromptDataset(config, tokenizer, fmt)
    refs = [dataset.sample(i).media[0].ref for i in range(4)]
    MediaCache(tmp_path / "one", 1 << 24).get(refs[0])
    (one,) = (tmp_path / "one").glob("*.safetensors")
    cache = MediaCache(tmp_path / "cache", one.stat().st_size * 5 // 2)
    stored = [cache.root / f"{ref.key}.safetensors" for ref in refs]
    loader = PromptLoader(dataset, 1, shuffle=False, seed=1, media_cache=cache, num_workers=0)
    batches = iter(loader)
    next(batches)
    for ref in refs[1:]:
        cache.get(ref)
    assert [path.exists() for path in stored] == [True, False, False, True]
    next(batches)
    cache.get(refs[2])
    assert [path.exists() for path in stored] == [False, True, True, False]
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_a_video_larger_than_the_bound_still_goes_through(
    open_loader, videos, fake_cache, num_workers
):
    loader = open_loader(
        videos(6), 2, media_cache=fake_cache(), num_workers=num_workers, prefetch_bytes=1
    )
    assert len(questions(loader)) == 3


def test_slow_decodes_do_not_change_the_order(open_loader, videos, fake_cache):
    def delay(path):
        time.sleep(0.02 if path.endswith(("0.mp4", "3.mp4")) else 0)

    rows = videos(9)
    slow = open_loader(rows, media_cache=fake_cache(delay), num_workers=4)
    assert questions(slow) == questions(open_loader(rows))


def test_leaving_a_loop_early_leaves_no_thread(open_loader, videos, fake_cache):
    n_threads = threading.active_count()
    loader = open_loader(
        videos(9), media_cache=fake_cache(), num_workers=3, prefetch_bytes=FRAME_BYTES
    )
    for _ in loader:
        break
    assert threading.active_count() == n_threads


def test_real_videos_are_decoded_ahead_to_the_size_that_metadata_promised(
    write_rows, make_config, tokenizer, fmt, tmp_path
):
    for name in ("a.mp4", "b.mp4", "cut.mp4"):
        write_film(tmp_path / name)
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    names = ["a.mp4", "cut.mp4", "b.mp4"]
    file = write_rows([{"problem": n, "answer": "A", "videos": n} for n in names])
    config = make_config(
        file, num_video_frames=4, on_bad_sample="skip", max_bad_fraction=0.5, video_min_pixels=1
    )
    cache = MediaCache(tmp_path / "cache", 1 << 24)
    loader = PromptLoader(
        PromptDataset(config, tokenizer, fmt), 2, shuffle=False, seed=1, media_cache=cache
    )
    (batch,) = loader
    assert [sample.question for sample in batch] == ["a.mp4", "b.mp4"]
    assert loader.dataset.quarantine[0].reason == "truncated"
    n_decoded = cache.counts.misses
    for sample in batch:
        (item,) = sample.media
        frames = cache.get(item.ref).frames_u8
        assert frames.numel() == decoded_bytes(item)
        assert sample.prompt_ids.count(tokenizer.convert_tokens_to_ids("<|video_pad|>")) == 4
    assert cache.counts.misses == n_decoded


def write_film(path, n_frames=8):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "yuv420p"
        for i in range(n_frames):
            pixels = np.full((28, 56, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_bytes_of_a_video_are_known_from_its_grid(open_loader, videos):
    (batch,) = open_loader(videos(3))
    assert decoded_bytes(batch[0].media[0]) == FRAME_BYTES


def test_media_that_are_encoded_are_not_decoded_and_count_nothing(open_loader, videos, fake_cache):
    cache = fake_cache()
    loader = open_loader(videos(6), 2, media_cache=cache, shuffle=False, prefetch_bytes=1)
    loader.skip_encoded(lambda item: item.ref.path.endswith(("v0.mp4", "v3.mp4")), must_be=False)
    assert len(questions(loader)) == 3
    assert sorted(set(cache.asked)) == ["v1.mp4", "v2.mp4", "v4.mp4", "v5.mp4"]
    assert len(loader.shown) == 6


def test_where_media_must_be_encoded_others_are_rows_that_cannot_be_used(
    open_loader, videos, fake_cache
):
    cache = fake_cache()
    loader = open_loader(videos(6), 2, media_cache=cache, shuffle=False)
    loader.skip_encoded(lambda item: not item.ref.path.endswith("v1.mp4"), must_be=True)
    assert questions(loader) == [["q0", "q2"], ["q3", "q4"]]
    assert [entry.reason for entry in loader.dataset.quarantine] == ["not_encoded"]
    assert cache.asked == []
    assert loader.state_dict()["quarantine"] == []  # they may be encoded when a run resumes


@pytest.mark.parametrize("num_workers", [0, 3])
def test_nothing_is_read_that_no_batch_needs(open_loader, videos, fake_cache, num_workers):
    """Neither rows that fill no batch, nor rows behind the last batch that is asked for."""
    cache = fake_cache()
    rows = videos(7, broken=(0,))
    loader = open_loader(rows, 3, media_cache=cache, shuffle=False, num_workers=num_workers)
    assert questions(loader) == [["q1", "q2", "q3"], ["q4", "q5", "q6"]]
    cache.asked.clear()
    loader = open_loader(rows, 3, media_cache=cache, shuffle=False, num_workers=num_workers)
    assert len(list(loader.batches(5, most=1))) == 1
    assert sorted(cache.asked) == ["broken0.mp4", "v1.mp4", "v2.mp4", "v3.mp4"]
    assert loader.cursor == 4


def test_questions_about_one_video_follow_each_other_as_many_as_are_asked_for(open_loader, videos):
    rows = [row for row in videos(4) for _ in range(5)] + [{}] * 3
    loader = open_loader(rows, 1, group_by_video=3)
    order = loader.order(0)
    assert sorted(order) == list(range(23)) and order != loader.order(1)
    shown = [rows[i].get("videos") for i in order]
    runs = [(video, len(list(run))) for video, run in itertools.groupby(shown) if video]
    # Five are three and two, unless both follow each other.
    assert all(n in (2, 3, 5) for _, n in runs) and sum(n for _, n in runs) == 20
    first = {v: [i for i, s in enumerate(shown) if s == v][:3] for v in set(shown) - {None}}
    assert all(places == list(range(places[0], places[0] + 3)) for places in first.values())


def test_without_shuffling_rows_are_moved_to_the_first_about_their_video(open_loader, videos):
    a, b = videos(2)
    loader = open_loader([a, b, {}, a, {}, b, a], 1, shuffle=False, group_by_video=2)
    assert loader.order(0) == [0, 3, 1, 5, 2, 4, 6]


def test_another_grouping_cannot_be_resumed(open_loader):
    state = open_loader().state_dict()
    with pytest.raises(DataError, match=r"data\.group_by_video changed"):
        open_loader(group_by_video=2).load_state_dict(state)
    del state["group_by_video"]
    open_loader().load_state_dict(state)
