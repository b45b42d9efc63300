"""Tensors on disk: shared by processes, bounded, and never half a file."""

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from verl.data import file_store
from verl.data.tensor_store import Entry, TensorStore

KEYS = [f"{i:032x}" for i in range(0x10, 0x90, 0x10)]
FORK = multiprocessing.get_context("fork")


def entry(value: int, n_bytes: int = 1000) -> Entry:
    return Entry({"frames": torch.full((n_bytes,), value, dtype=torch.uint8)}, {"note": str(value)})


def stored(store: TensorStore) -> list[str]:
    return [key for key in KEYS if store.path_of(key).exists()]


def size_of_one(store: TensorStore) -> int:
    store.put(KEYS[0], entry(0))
    return store.path_of(KEYS[0]).stat().st_size


@pytest.fixture
def store(tmp_path):
    return TensorStore(tmp_path / "store", 10**9)


def test_what_was_put_comes_back_bit_equal_and_so_does_its_note(store):
    kept = Entry({"a": torch.randn(3, 5), "b": torch.arange(4)}, {"note": "x"})
    assert store.put(KEYS[0], kept)
    found = store.get(KEYS[0])
    assert found is not None and found.metadata["note"] == "x"
    assert torch.equal(found.tensors["a"], kept.tensors["a"])
    assert torch.equal(found.tensors["b"], kept.tensors["b"])


def test_an_unknown_key_gives_nothing_and_is_made_once(store):
    assert store.get(KEYS[0]) is None
    made = []

    def make() -> Entry:
        made.append(1)
        return entry(7)

    for _ in range(3):
        assert store.get_or_make(KEYS[0], make).tensors["frames"][0] == 7
    assert len(made) == 1
    assert (store.counts.hits, store.counts.misses) == (2, 1)


def test_a_failure_to_make_passes_through_and_leaves_nothing(store):
    def fail() -> Entry:
        raise RuntimeError("cannot")

    with pytest.raises(RuntimeError, match="cannot"):
        store.get_or_make(KEYS[0], fail)
    assert store.get_or_make(KEYS[0], lambda: entry(1)).tensors["frames"][0] == 1


def flip_a_byte(content: bytes) -> bytes:
    return content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[: len(c) // 2], flip_a_byte, lambda c: bytes(len(c))]
)
def test_a_damaged_file_is_named_removed_and_made_again(tmp_path, store, caplog, damage):
    store.put(KEYS[0], entry(1))
    path = store.path_of(KEYS[0])
    path.write_bytes(damage(path.read_bytes()))
    other_process = TensorStore(store.root, 10**9)
    with caplog.at_level(logging.ERROR):
        found = other_process.get_or_make(KEYS[0], lambda: entry(2))
    assert found.tensors["frames"][0] == 2
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert other_process.counts.damaged == 1
    again = other_process.get(KEYS[0])
    assert again is not None and again.tensors["frames"][0] == 2


def test_a_file_damaged_after_it_was_read_once_is_found_out_too(store):
    store.put(KEYS[0], entry(1))
    assert store.get(KEYS[0]) is not None
    path = store.path_of(KEYS[0])
    path.write_bytes(flip_a_byte(path.read_bytes()))
    assert store.get(KEYS[0]) is None


def test_the_least_recently_used_entries_go_first(store, monkeypatch):
    small = TensorStore(store.root, 3 * size_of_one(store))
    # Times ahead of now, which no kernel touches by itself when a file is read.
    soon = time.time() + 1000
    for i in (0, 1, 2):
        small.put(KEYS[i], entry(i))
        os.utime(small.path_of(KEYS[i]), (soon + i, soon))
    monkeypatch.setattr(time, "time_ns", lambda: int((soon + 100) * 1e9))
    assert small.get(KEYS[0]) is not None
    small.put(KEYS[3], entry(3))
    assert stored(small) == [KEYS[0], KEYS[2], KEYS[3]]
    assert small.size_bytes() <= small.limit_bytes
    assert small.counts.evicted == 1


def test_an_entry_over_the_limit_is_returned_but_not_stored(store):
    small = TensorStore(store.root, 3 * size_of_one(store))
    found = small.get_or_make(KEYS[1], lambda: entry(1, 10**5))
    assert found.tensors["frames"].numel() == 10**5
    assert stored(small) == [KEYS[0]]
    assert small.counts.not_stored == 1


def test_storing_a_key_again_takes_no_more_room(store):
    small = TensorStore(store.root, size_of_one(store))
    assert small.put(KEYS[0], entry(5))
    found = small.get(KEYS[0])
    assert found is not None and found.tensors["frames"][0] == 5


def test_held_keys_are_not_evicted_and_the_limit_still_holds(store):
    small = TensorStore(store.root, 2 * size_of_one(store))
    other_process = TensorStore(store.root, small.limit_bytes)
    small.put(KEYS[1], entry(1))
    with small.hold([KEYS[0], KEYS[1]]):
        assert not other_process.put(KEYS[2], entry(2))
        assert stored(small) == KEYS[:2]
    assert other_process.put(KEYS[2], entry(2))
    assert stored(small) == [KEYS[1], KEYS[2]]


def test_a_full_disk_that_cannot_even_note_what_is_held_stops_nobody(store, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    small = TensorStore(store.root, size_of_one(store))
    with monkeypatch.context() as disk:
        disk.setattr(file_store, "open", full, raising=False)
        holding = small.hold([KEYS[0]])
        holding.__enter__()
    assert "may be evicted" in caplog.text and "No space left" in caplog.text
    assert small.put(KEYS[1], entry(1))
    holding.__exit__(None, None, None)
    assert stored(small) == [KEYS[1]]


def test_an_evicted_entry_stays_readable_for_who_has_it(store):
    small = TensorStore(store.root, size_of_one(store))
    found = small.get(KEYS[0])
    small.put(KEYS[1], entry(1))
    assert stored(small) == [KEYS[1]]
    assert found is not None and int(found.tensors["frames"].sum()) == 0


def start_process(target, *args):
    """A forked process, which must not wait for OpenMP threads that only its parent has."""

    def run() -> None:
        torch.set_num_threads(1)
        target(*args)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


def hold_for_ever(root, ready) -> None:
    with TensorStore(root, 10**9).hold([KEYS[0]]):
        ready.set()
        time.sleep(60)


def test_a_killed_process_holds_nothing_any_more(store):
    small = TensorStore(store.root, size_of_one(store))
    ready = FORK.Event()
    process = start_process(hold_for_ever, store.root, ready)
    assert ready.wait(10)
    assert not small.put(KEYS[1], entry(1))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert small.put(KEYS[1], entry(1))
    assert stored(small) == [KEYS[1]]


def make_slowly(root, results, value: int) -> None:
    def make() -> Entry:
        time.sleep(0.2)
        return entry(value, 10**6)

    found = TensorStore(root, 10**9).get_or_make(KEYS[0], make)
    results.put((value, found.tensors["frames"].unique().tolist()))


def test_of_several_processes_one_makes_an_entry_and_all_see_it_whole(store):
    results = FORK.Queue()
    processes = [start_process(make_slowly, store.root, results, value) for value in (1, 2, 3)]
    seen = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert len({tuple(levels) for _, levels in seen}) == 1
    assert seen[0][1][0] in (1, 2, 3)


def test_of_several_threads_one_makes_an_entry(store):
    made = []

    def make() -> Entry:
        made.append(1)
        time.sleep(0.05)
        return entry(4)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: store.get_or_make(KEYS[0], make), range(16)))
    assert len(made) == 1
    assert all(one.tensors["frames"][0] == 4 for one in found)


def test_entries_stay_right_while_threads_evict_each_others(store):
    small = TensorStore(store.root, 3 * size_of_one(store))

    def read_and_evict(turn: int) -> None:
        value = turn % len(KEYS)
        with small.hold([KEYS[(turn + 1) % len(KEYS)]]):
            found = small.get_or_make(KEYS[value], lambda: entry(value))
        assert found.tensors["frames"].unique().tolist() == [value]
        assert small.size_bytes() <= small.limit_bytes

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_and_evict, range(200)))
    assert small.counts.evicted > 20
    assert not list((store.root / ".holds").iterdir())


def test_what_a_killed_writer_left_is_cleared_away(store):
    dead, living = store.root / ".part-dead", store.root / ".part-living"
    dead.write_bytes(b"half")
    with open(living, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.put(KEYS[0], entry(0))
        assert (dead.exists(), living.exists()) == (False, True)
    store.put(KEYS[0], entry(0))
    assert not living.exists()


def test_a_disk_that_refuses_is_logged_and_costs_only_the_cache(store, monkeypatch, caplog):
    def refuse(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert store.get_or_make(KEYS[0], lambda: entry(3)).tensors["frames"][0] == 3
    assert "No space left" in caplog.text
    assert not list(store.root.glob(".part-*"))


def test_the_folder_is_closed_to_other_users(store):
    assert store.root.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "ABCDEF0123", "short"])
def test_a_key_that_is_no_digest_is_refused(store, key):
    with pytest.raises(ValueError, match="hexadecimal"):
        store.get(key)


def test_tensors_of_every_type_and_none_come_back(store):
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in (*number_types(), torch.bool)}
    tensors["nothing"] = torch.empty(0, 4)
    store.put(KEYS[0], Entry(tensors, {}))
    found = TensorStore(store.root, 10**9).get(KEYS[0])
    assert found is not None and found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def number_types() -> list[torch.dtype]:
    integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    return [*integers, torch.float16, torch.bfloat16, torch.float32, torch.float64]
