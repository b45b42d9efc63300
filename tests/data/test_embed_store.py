"""Stored embeddings: exact, sliced without reading the rest, made once, never half a file."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from verl.data import embed_file
from verl.data.embed_store import BY_NAME, DamagedEmbeds, EmbedKey, Embeds, EmbedStore
from verl.data.media import FrameSampling, make_media_item
from verl.data.preprocess import ResizeRule, VisionSpec
from verl.data.synthetic import write_video

FORK = multiprocessing.get_context("fork")
KEY = EmbedKey(media="ab" * 16, family="qwen2_5_vl", weights="cd" * 16, dtype=torch.float32)
KEYS = [replace(KEY, media=f"{i:032x}") for i in range(4)]
ROOT = Path(__file__).parents[2]


def embeds(value: float = 0.0, rows: int = 12, width: int = 8, dtype=torch.float32) -> Embeds:
    """Row r holds value + r."""
    features = (value + torch.arange(rows, dtype=torch.float32))[:, None].repeat(1, width)
    return Embeds(
        features.to(dtype),
        grid_thw=(rows, 2, 2),
        seconds_per_grid=0.5,
        frame_times=[i / 4 for i in range(2 * rows)],
        path="/films/a day.mp4",
    )


@pytest.fixture
def store(tmp_path):
    return EmbedStore(tmp_path / "store", 10**9)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four rows of 32 bytes."""
    monkeypatch.setattr(embed_file, "BLOCK_BYTES", 128)


def again(store: EmbedStore) -> EmbedStore:
    """The store as another process sees it."""
    return EmbedStore(store.root, store.limit_bytes)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def start_process(target, *args):
    def run() -> None:
        torch.set_num_threads(1)  # Threads of the parent do not exist here.
        target(*args)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_comes_back_bit_equal_with_all_that_belongs_to_it(store, dtype):
    key, kept = replace(KEY, dtype=dtype), embeds(0.1, dtype=dtype)
    assert store.put(key, kept)
    found = again(store).get(key)
    assert found is not None and found.features.dtype == dtype
    assert torch.equal(found.features, kept.features)
    for name in ("grid_thw", "seconds_per_grid", "frame_times", "n_tokens", "path"):
        assert getattr(found, name) == getattr(kept, name)
    assert found.record is not None
    assert (found.record.family, found.record.weights) == (KEY.family, KEY.weights)
    assert "torch" in found.record.made_by and time.time() - found.record.made_at < 60


def test_another_dtype_than_the_keys_is_refused(store):
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        store.put(replace(KEY, dtype=torch.bfloat16), embeds())


@pytest.mark.parametrize(
    "change",
    [
        {"media": "ef" * 16},
        {"family": "qwen3_vl"},
        {"weights": "ef" * 16},
        {"dtype": torch.bfloat16},
        {"pixels": VisionSpec()},
        {"pixels": VisionSpec(mean=(0.5, 0.5, 0.5))},
    ],
)
def test_whatever_changes_the_numbers_changes_the_key(store, change):
    store.put(replace(KEY, pixels=VisionSpec(std=(1.0, 1.0, 1.0))), embeds())
    store.put(KEY, embeds())
    assert store.get(replace(KEY, **change)) is None


def test_a_video_replaced_by_another_of_the_same_name_has_another_key(tmp_path):
    path = tmp_path / "film.mp4"

    def key_of() -> EmbedKey:
        rule = ResizeRule(min_pixels=784, max_pixels=784 * 16)
        item = make_media_item(str(path), "video", FrameSampling(num_frames=4), rule)
        return replace(KEY, media=item.ref.key)

    frames = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    write_video(path, frames)
    first, moment = key_of(), path.stat().st_mtime_ns
    assert key_of() == first
    write_video(path, frames[::-1].copy())
    os.utime(path, ns=(moment, moment))
    assert key_of().digest() != first.digest()


def test_the_file_is_plain_safetensors_with_a_name_for_people(store):
    store.put(KEY, embeds(5))
    (link,) = (store.root / BY_NAME).iterdir()
    assert link.name.startswith("a_day.24f.") and link.resolve() == store.path_of(KEY).resolve()
    with safe_open(link, framework="pt") as file:
        part = file.get_slice("features")
        assert part.get_shape() == [12, 8]
        assert torch.equal(part[3:5], embeds(5).features[3:5])


def test_a_hostile_video_name_stays_inside_the_folder(store):
    kept = embeds()
    kept.path = "/x/..\n/../..%s\x1b[2J.mp4"
    store.put(KEY, kept)
    (link,) = (store.root / BY_NAME).iterdir()
    assert link.parent == store.root / BY_NAME and link.name.isprintable()


def test_a_slice_checks_its_own_blocks_and_no_others(store, small_blocks, monkeypatch):
    store.put(KEY, embeds())
    read = []
    real = embed_file.EmbedFile.check
    monkeypatch.setattr(
        embed_file.EmbedFile,
        "check",
        lambda self, blocks: read.extend(blocks) or real(self, blocks),
    )
    found = again(store).get(KEY, rows=(4, 8))
    assert found is not None and read == [1]
    assert torch.equal(found.slice(4, 8), embeds().features[4:8]) and read == [1]
    assert torch.equal(found.slice(7, 9), embeds().features[7:9]) and read == [1, 2]
    assert torch.equal(found.features, embeds().features) and sorted(read) == [0, 1, 2]
    assert found.slice(3, 3).shape == (0, 8)
    with pytest.raises(IndexError, match=r"0:13 of /films/a day.mp4"):
        found.slice(0, 13)


def test_a_mapped_tensor_reads_only_the_pages_of_its_slice(store):
    store.put(KEY, embeds(rows=4096, width=4096))  # 64 MiB in blocks of 4 MiB
    path = store.path_of(KEY)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    code = f"""
import resource
from verl.data.embed_store import EmbedKey, EmbedStore
import torch
key = EmbedKey(media={KEY.media!r}, family={KEY.family!r}, weights={KEY.weights!r},
               dtype=torch.float32)
store = EmbedStore({str(store.root)!r}, 10**9)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
part = store.get(key, rows=(0, 256)).slice(0, 256)
total = float(part.double().sum())
print(resident() - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) < 40


@pytest.mark.parametrize("rows", [None, (0, 4)])
def test_a_flipped_byte_is_found_where_it_is_read(store, small_blocks, caplog, rows):
    store.put(KEY, embeds(1))
    path = store.path_of(KEY)
    flip(path, path.stat().st_size - 12 * 32 + 5)
    reader = again(store)
    with caplog.at_level(logging.ERROR):
        assert reader.get(KEY, rows) is None
    assert str(path) in caplog.text and "rows 0 to 3" in caplog.text
    assert reader.counts.damaged == 1 and not path.exists()
    assert torch.equal(reader.get_or_make(KEY, lambda: embeds(1)).features, embeds(1).features)


def test_damage_outside_of_the_checked_rows_is_found_when_they_are_sliced(store, small_blocks):
    store.put(KEY, embeds(1))
    flip(store.path_of(KEY), -1)
    reader = again(store)
    found = reader.get(KEY, rows=(0, 8))
    assert found is not None and torch.equal(found.slice(0, 8), embeds(1).features[:8])
    with pytest.raises(DamagedEmbeds, match=r"rows 8 to 11"):
        found.slice(8, 9)
    assert reader.get(KEY, rows=(0, 0)) is None


def test_every_byte_of_the_header_that_has_a_meaning_is_guarded(store, tmp_path):
    store.put(KEY, embeds(1, rows=2))
    path = store.path_of(KEY)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = again(store).get(KEY)
        assert found is None or (
            torch.equal(found.features, embeds(1, rows=2).features)
            and found.frame_times == embeds(1, rows=2).frame_times
        ), f"byte {place}"


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:-1], lambda c: c[:9], lambda c: bytes(len(c))]
)
def test_a_cut_or_emptied_file_is_made_again(store, damage):
    store.put(KEY, embeds(1))
    path = store.path_of(KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(store.get_or_make(KEY, lambda: embeds(2)).features, embeds(2).features)
    assert torch.equal(again(store).get(KEY).features, embeds(2).features)


def test_a_file_under_the_name_of_another_key_is_not_served(store):
    store.put(KEYS[0], embeds(1))
    shutil.copy(store.path_of(KEYS[0]), store.path_of(KEYS[1]))
    assert store.get(KEYS[1]) is None and store.get(KEYS[0]) is not None


def test_an_entry_that_vanishes_while_mapped_stays_readable_and_is_made_again(store):
    store.put(KEY, embeds(1))
    found = store.get(KEY, rows=(0, 0))
    store.path_of(KEY).unlink()
    assert found is not None and torch.equal(found.features, embeds(1).features)
    assert store.get(KEY) is None
    assert torch.equal(store.get_or_make(KEY, lambda: embeds(1)).features, embeds(1).features)


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(store):
    store.put(KEY, embeds(1))
    found = store.get(KEY)
    assert found is not None
    found.features.zero_()
    assert torch.equal(again(store).get(KEY).features, embeds(1).features)


def test_mapped_entries_keep_no_file_open(store):
    for key in KEYS:
        store.put(key, embeds(1))
    before = len(os.listdir("/proc/self/fd"))
    found = [store.get(key) for key in KEYS]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(one is not None and torch.equal(one.features, embeds(1).features) for one in found)


def make_slowly(root, results, value: int) -> None:
    def make() -> Embeds:
        time.sleep(0.3)
        results.put(("made", value))
        return embeds(value)

    found = EmbedStore(root, 10**9).get_or_make(KEY, make)
    results.put(("saw", float(found.features[0, 0])))


def test_of_several_processes_one_makes_an_entry_and_all_see_it_whole(store):
    results = FORK.Queue()
    processes = [start_process(make_slowly, store.root, results, value) for value in (1, 2, 3)]
    seen = [results.get(timeout=20) for _ in range(4)]
    for process in processes:
        process.join()
    (made,) = [value for what, value in seen if what == "made"]
    assert [value for what, value in seen if what == "saw"] == [made] * 3


def test_of_several_threads_one_makes_an_entry(store):
    made = []

    def make() -> Embeds:
        made.append(1)
        time.sleep(0.05)
        return embeds(4)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: store.get_or_make(KEY, make).features[0, 0], range(16)))
    assert len(made) == 1 and set(map(float, found)) == {4.0}


def test_two_makers_of_different_keys_do_not_wait_for_each_other(store):
    def make() -> Embeds:
        with ThreadPoolExecutor(1) as pool:  # Another thread, while this key is being made.
            inner = pool.submit(store.get_or_make, KEYS[1], lambda: embeds(1))
            assert inner.result(timeout=10).n_tokens == 12
        return embeds(0)

    assert store.get_or_make(KEYS[0], make).n_tokens == 12


def test_a_batch_is_made_in_one_go_and_overlapping_batches_do_not_lock_up(store):
    store.put(KEYS[1], embeds(1))
    asked = []

    def make(keys):
        asked.append(list(keys))
        for key in keys:
            time.sleep(0.02)
            yield embeds(KEYS.index(key))

    orders = [KEYS, KEYS[::-1], [*KEYS, *KEYS]]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda keys: store.get_or_make_all(keys, make), orders))
    for keys, found in zip(orders, results, strict=True):
        assert [float(one.features[0, 0]) for one in found] == [KEYS.index(key) for key in keys]
    made = [key for keys in asked for key in keys]
    assert len(made) == 3 and set(made) == {KEYS[0], KEYS[2], KEYS[3]}
    assert store.missing([*KEYS, KEY, KEY]) == [KEY]


def test_a_failure_to_make_passes_through_and_the_next_one_tries(store):
    def fail() -> Embeds:
        raise RuntimeError("cannot")

    with pytest.raises(RuntimeError, match="cannot"):
        store.get_or_make(KEY, fail)
    assert store.get_or_make(KEY, lambda: embeds(1)).n_tokens == 12


def die_while_making(root) -> None:
    def make() -> Embeds:
        os.kill(os.getpid(), signal.SIGKILL)
        return embeds(1)

    EmbedStore(root, 10**9).get_or_make(KEY, make)


def test_a_maker_that_was_killed_keeps_nobody_waiting(store):
    process = start_process(die_while_making, store.root)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert store.get_or_make(KEY, lambda: embeds(2)).n_tokens == 12


def write_for_ever(root, ready) -> None:
    store = EmbedStore(root, 10**9)
    real = os.fsync

    def stop(descriptor: int) -> None:
        real(descriptor)
        ready.set()
        time.sleep(60)

    os.fsync = stop
    store.put(KEY, embeds(1, rows=1000))


def test_a_writer_killed_in_the_middle_leaves_no_entry_and_its_rest_goes_at_the_next_write(store):
    store.put(KEYS[0], embeds(7))
    ready = FORK.Event()
    process = start_process(write_for_ever, store.root, ready)
    assert ready.wait(20)
    assert len(list(store.root.glob(".part-*"))) == 1
    store.put(KEYS[1], embeds(1))
    assert len(list(store.root.glob(".part-*"))) == 1, "a living writer's file was taken away"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.get(KEY) is None
    store.put(KEYS[2], embeds(2))
    assert not list(store.root.glob(".part-*"))
    assert torch.equal(again(store).get(KEYS[0]).features, embeds(7).features)
    assert store.get_or_make(KEY, lambda: embeds(3)).n_tokens == 12


def put_with_a_file_limit(root, results) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = EmbedStore(root, 10**9)
    small, large = store.put(KEYS[1], embeds(1)), store.put(KEY, embeds(1, rows=10_000))
    results.put((small, large, float(store.get_or_make(KEY, lambda: embeds(9)).features[0, 0])))


def test_a_disk_that_takes_only_part_of_a_file_stores_nothing_of_it(store):
    store.put(KEYS[0], embeds(7))
    results = FORK.Queue()
    process = start_process(put_with_a_file_limit, store.root, results)
    assert results.get(timeout=20) == (True, False, 9.0)
    process.join()
    assert not list(store.root.glob(".part-*"))
    assert torch.equal(again(store).get(KEYS[0]).features, embeds(7).features)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


def test_a_full_disk_is_named_loses_nothing_and_costs_only_the_cache(tiny_disk, caplog):
    store = EmbedStore(tiny_disk / "store", 10**9)
    assert store.put(KEYS[0], embeds(1, rows=10_000))
    with caplog.at_level(logging.WARNING):
        found = store.get_or_make(KEYS[1], lambda: embeds(2, rows=100_000))
    assert float(found.features[0, 0]) == 2.0
    assert os.strerror(errno.ENOSPC) in caplog.text and str(store.path_of(KEYS[1])) in caplog.text
    assert not list(store.root.glob(".part-*")) and store.counts.not_stored == 1
    assert torch.equal(again(store).get(KEYS[0]).features, embeds(1, rows=10_000).features)


def test_a_folder_that_may_only_be_read_serves_what_is_in_it(tiny_disk, caplog):
    store = EmbedStore(tiny_disk / "store", 10**9)
    for key in KEYS[:2]:
        store.put(key, embeds(1))
    flip(store.path_of(KEYS[1]), -1)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    reader = again(store)
    with reader.hold(KEYS):
        found = reader.get(KEYS[0])
        assert found is not None and torch.equal(found.features, embeds(1).features)
        assert reader.get(KEYS[1]) is None
        assert reader.get_or_make(KEYS[2], lambda: embeds(5)).n_tokens == 12
    assert "Read-only file system" in caplog.text


def test_the_least_recently_used_go_first_but_never_what_is_held(store):
    store.put(KEYS[0], embeds(0))
    size = store.size_bytes()
    small = EmbedStore(store.root, 2 * size + size // 2)
    small.put(KEYS[1], embeds(1))
    for i in (0, 1):
        os.utime(small.path_of(KEYS[i]), (1000 + i, 1000 + i))
    with EmbedStore(store.root, 10**9).hold([KEYS[0]]):
        assert small.put(KEYS[2], embeds(2))
        assert small.missing(KEYS) == [KEYS[1], KEYS[3]]
        with small.hold([KEYS[2]]):
            assert not small.put(KEYS[3], embeds(3))
    assert small.size_bytes() <= small.limit_bytes and small.counts.evicted == 1
    assert len(list((store.root / BY_NAME).iterdir())) == 2, "the evicted entry's name is left"


def test_an_entry_over_the_limit_is_returned_but_nothing_is_evicted_for_it(store):
    store.put(KEYS[0], embeds(0))
    small = EmbedStore(store.root, 2 * store.size_bytes())
    assert small.get_or_make(KEYS[1], lambda: embeds(1, rows=1000)).n_tokens == 1000
    assert small.missing(KEYS[:2]) == [KEYS[1]] and small.counts.not_stored == 1


def read_and_evict(root, limit: int, wrong) -> None:
    store, turn = EmbedStore(root, limit), os.getpid()
    while True:
        turn = (turn * 5 + 3) % 64
        chosen = [turn % 4, turn // 4 % 4, turn // 16]
        keys = [KEYS[i] for i in chosen]
        with store.hold(keys[:1]):
            found = store.get_or_make_all(keys, lambda ks: (embeds(KEYS.index(k)) for k in ks))
        for i, one in zip(chosen, found, strict=True):
            if not torch.equal(one.slice(2, 12), embeds(i).features[2:]):
                wrong.put(i)


def test_nothing_wrong_is_served_while_processes_evict_and_are_killed(store):
    store.put(KEYS[0], embeds(0))
    limit = int(2.5 * store.size_bytes())
    wrong = FORK.Queue()
    processes = [start_process(read_and_evict, store.root, limit, wrong) for _ in range(3)]
    for _ in range(8):
        time.sleep(0.2)
        os.kill(processes[0].pid, signal.SIGKILL)
        processes.pop(0).join()
        processes.append(start_process(read_and_evict, store.root, limit, wrong))
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert wrong.empty()
    after = EmbedStore(store.root, limit)
    assert after.get_or_make(KEYS[3], lambda: embeds(3)).n_tokens == 12
    assert 0 < after.size_bytes() <= limit
    assert after.put(KEYS[2], embeds(2)) and not list(store.root.glob(".part-*"))


def test_the_folder_is_closed_to_other_users(store):
    store.put(KEY, embeds())
    assert store.root.stat().st_mode & 0o077 == 0
    assert store.path_of(KEY).stat().st_mode & 0o077 == 0


def test_a_folder_that_may_only_be_read_serves_and_warns_of_nothing(tmp_path, monkeypatch, caplog):
    writable = EmbedStore(tmp_path, 10**6)
    writable.put(KEY, embeds())
    assert not (tmp_path / ".holds").exists()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", lambda self, **_: None if self == tmp_path else refuse())
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "utime", refuse)
    store = EmbedStore(tmp_path, 10**6)
    with store.hold([KEY]):
        found = store.get(KEY)
    assert found is not None and torch.equal(found.features, embeds().features)
    assert not caplog.records
