import io

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from verl.data.dataset import PromptDataset
from verl.data.inline import InlineImages
from verl.data.media import decode_media
from verl.data.rows import BadSample
from verl.data.sources import DataError


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


ROW = {"problem": "<image> What is it?", "answer": "noise"}


@pytest.fixture
def open_rows(tmp_path, make_config, tokenizer, fmt):
    """A data set over a parquet file of the given rows, with the cache in a folder of that name."""

    def open_parquet(rows, cache="cache", **settings):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        config = make_config(str(path), cache_dir=str(tmp_path / cache), **settings)
        return PromptDataset(config, tokenizer, fmt)

    return open_parquet


def frames(dataset: PromptDataset, row: int) -> list[torch.Tensor]:
    return [decode_media(item.ref).frames_u8 for item in dataset.sample(row).media]


def test_images_as_bytes_give_the_frames_of_the_same_files(open_rows, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    record = {"bytes": png(1), "path": "a name without a file.png"}
    inline = open_rows([{**ROW, "images": [record]}])
    files = open_rows([{**ROW, "images": [{"bytes": None, "path": "a.png"}]}])
    torch.testing.assert_close(frames(inline, 0), frames(files, 0), rtol=0, atol=0)
    assert inline.sample(0).prompt_ids == files.sample(0).prompt_ids
    two = {"problem": "<image> or <image>?", "answer": "b"}
    inline = open_rows([{**two, "images": [record, {"bytes": png(2), "path": None}]}])
    files = open_rows([{**two, "images": ["a.png", "b.png"]}])
    torch.testing.assert_close(frames(inline, 0), frames(files, 0), rtol=0, atol=0)


def test_a_column_of_bare_bytes_is_an_image(open_rows):
    dataset = open_rows([{**ROW, "image": png(3)}], image_key="image")
    assert len(frames(dataset, 0)) == 1


def test_a_saved_data_set_with_its_image_feature_is_read(tmp_path, make_config, tokenizer, fmt):
    feature = datasets.Sequence(datasets.Image())
    saved = datasets.Dataset.from_list([{**ROW, "images": [{"bytes": png(4), "path": None}]}])
    saved.cast_column("images", feature).save_to_disk(tmp_path / "saved")
    config = make_config(str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    assert len(frames(PromptDataset(config, tokenizer, fmt), 0)) == 1


def test_the_same_image_is_kept_once_and_named_alike_everywhere(open_rows, tmp_path):
    rows = [{**ROW, "images": [{"bytes": png(5), "path": name}]} for name in ("x.png", "y.png")]
    one, other = open_rows(rows), open_rows(rows, cache="elsewhere")
    assert len(list((tmp_path / "cache/inline").iterdir())) == 1
    assert one.fingerprint == other.fingerprint
    assert one.sample(0).media[0].ref.key == other.sample(1).media[0].ref.key
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_half_written_image_is_written_again(open_rows, tmp_path):
    rows = [{**ROW, "images": [{"bytes": png(6), "path": None}]}]
    open_rows(rows)
    (kept,) = (tmp_path / "cache/inline").iterdir()
    kept.write_bytes(png(6)[:50])
    assert len(frames(open_rows(rows), 0)) == 1


def test_a_damaged_image_of_the_same_size_is_written_again(open_rows, tmp_path):
    rows = [{**ROW, "images": [{"bytes": png(7), "path": None}]}]
    open_rows(rows)
    (kept,) = (tmp_path / "cache/inline").iterdir()
    kept.write_bytes(png(7)[:-40] + bytes(40))
    open_rows(rows)
    assert kept.read_bytes() == png(7)
    assert list((tmp_path / "cache/inline").iterdir()) == [kept]


def test_an_image_is_on_the_disk_before_it_gets_its_name(open_rows, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("verl.data.inline.fsync", flushed.append)
    open_rows([{**ROW, "images": [{"bytes": png(8), "path": None}] * 2}])
    assert [path.name[:5] for path in flushed] == [".tmp-"]

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr("verl.data.inline.fsync", full)
    with pytest.raises(OSError, match="No space"):
        open_rows([{**ROW, "images": [{"bytes": png(9), "path": None}]}])
    assert len(list((tmp_path / "cache/inline").iterdir())) == 1


def test_bytes_that_are_no_image_name_the_row(open_rows):
    dataset = open_rows([{**ROW, "images": [{"bytes": b"no image", "path": None}]}])
    with pytest.raises(BadSample, match=r"rows.parquet row 0: not_media"):
        dataset.sample(0)


@pytest.mark.parametrize("name", ["inline:../../etc/passwd", "inline:" + "0" * 31, "inline:"])
def test_a_row_cannot_name_other_files_through_the_folder(name: str, make_config):
    assert InlineImages(make_config("unused")).path_of(name) is None


def test_videos_as_bytes_say_what_to_do(open_rows):
    with pytest.raises(DataError, match=r"'videos' holds bytes data .*; save media as files"):
        open_rows([{**ROW, "videos": [{"bytes": b"mp4", "path": "a.mp4"}]}])
