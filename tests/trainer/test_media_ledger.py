"""Counts of media over driver and workers, over stages, and over runs that are repeated."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from verl.data.sources import DataError
from verl.trainer.media_ledger import MediaLedger, counters_of


def ledger(*shown: set[str], decoded: int = 0, encoded: tuple[int, ...] = (), name: Any = None):
    cache: Any = SimpleNamespace(decoded=Counter(video=decoded))
    shares = [{"video/decoded": 1, "video/encoded": n} for n in encoded]
    workers = SimpleNamespace(media_counts=lambda: shares, feature_name=lambda: [name])
    loaders: Any = [SimpleNamespace(shown=keys) for keys in shown]
    return MediaLedger(cache, loaders, workers)


def test_a_video_that_training_and_validation_show_is_one():
    found = ledger({"video a", "video b"}, {"video b", "image p"}, decoded=2, encoded=(1, 2))
    assert found.counts() == {
        "video/distinct": 2, "video/decoded": 4, "video/encoded": 3,
        "image/distinct": 1, "image/decoded": 0,
    }  # fmt: skip
    assert ledger(set()).counts() == {}


def test_stages_add_up_and_a_repeated_run_says_that_it_decoded_nothing(tmp_path):
    for stage, shown in (("sft", {"video a", "video b"}), ("rl", {"video b", "video c"})):
        (tmp_path / stage).mkdir()
        ledger(shown, decoded=1, encoded=(1,)).write(tmp_path / stage / "media.json")
    ledger({"video d"}, decoded=0, encoded=(1,)).write(tmp_path / "media_eval.json")
    assert counters_of(tmp_path) == {"video/distinct": 4, "video/decoded": 5, "video/encoded": 3}
    for stage in ("sft", "rl"):
        ledger(set()).write(tmp_path / stage / "media.json")
    (tmp_path / "media_eval.json").unlink()
    assert counters_of(tmp_path) == {"video/distinct": 3, "video/decoded": 0, "video/encoded": 0}


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"counters": 3, "shown": []}'])
def test_files_that_are_no_counts_are_left_out(tmp_path, content, caplog):
    (tmp_path / "media.json").write_text(content)
    ledger({"video a"}, decoded=1).write(tmp_path / "media_eval.json")
    assert counters_of(tmp_path)["video/distinct"] == 1
    ledger({"video b"}).write(tmp_path / "media.json")
    assert json.loads((tmp_path / "media.json").read_text())["shown"] == ["video b"]
    assert "left out" in caplog.text


def test_stored_embeddings_for_a_model_of_text_alone_are_refused(tmp_path):
    adapter: Any = SimpleNamespace(vision=None)
    data: Any = None
    with pytest.raises(DataError, match="reads no images or videos"):
        ledger(set()).skip_encoded(adapter, data, str(tmp_path))
