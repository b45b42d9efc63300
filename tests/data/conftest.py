"""A tokenizer, a prompt format and media without pixels, shared by the tests of the data layer."""

from __future__ import annotations

import json
import string
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from verl.config import DataConfig
from verl.data import dataset as dataset_module
from verl.data.media import MediaItem, MediaRef
from verl.data.media_files import BadMedia
from verl.data.preprocess import ResizeRule, VisionSpec

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Qwen2.5-VL's template for turns whose content is text.
CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PADS = {"image": SPECIAL.index("<|image_pad|>"), "video": SPECIAL.index("<|video_pad|>")}


@pytest.fixture(scope="session")
def tokenizer():
    """One token a character, except that two line breaks merge, as in real vocabularies."""
    characters = [*string.printable, "é", "\n\n"]
    vocab = {text: i for i, text in enumerate([*SPECIAL, *characters])}
    core = Tokenizer(models.BPE(vocab, merges=[("\n", "\n")]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
    )


class FakeFormat:
    """Qwen2.5-VL's placeholders, without a model."""

    vision = VisionSpec()
    image_token = "<|vision_start|><|image_pad|><|vision_end|>"
    video_token = "<|vision_start|><|video_pad|><|vision_end|>"

    def expand(self, ids, media):
        queue, expanded = list(media), []
        for token in ids:
            if token not in PADS.values():
                expanded.append(token)
                continue
            item = queue.pop(0)
            assert PADS[item.ref.kind] == token
            expanded += [token] * item.n_tokens
        assert not queue
        return expanded


class FakeCache:
    """Stands for MediaCache: decodes nothing, fails for files whose name holds `broken`."""

    def __init__(self, delay=None):
        self.asked = []
        self.held = []
        self._delay = delay or (lambda path: None)

    def get(self, ref):
        self._delay(ref.path)
        self.asked.append(Path(ref.path).name)
        if "broken" in ref.path:
            raise BadMedia("decode_error", ref.path, "nothing decodes")
        return SimpleNamespace()

    @contextmanager
    def hold(self, keys):
        self.held = sorted(Path(key).name for key in keys)
        try:
            yield
        finally:
            self.held = []


def fake_media_item(path, kind, sampling, resize, decoder="pyav", reading=None):
    """Geometry from the file's text, `t h w` in patches; BadMedia where it is no such text."""
    try:
        t, h, w = map(int, Path(path).read_text().split())
    except ValueError:
        raise BadMedia("not_media", path, "no grid in the file") from None
    ref = MediaRef(kind, path, sampling, resize or ResizeRule(min_pixels=1, max_pixels=9), path)
    return MediaItem(ref, (t, h, w), 1.0, t * h * w // 4, tuple(float(i) for i in range(2 * t)))


@pytest.fixture
def fake_media(monkeypatch):
    """Media files are texts that hold a grid; the list of measured paths is returned."""
    probed = []

    def measure(path, *args):
        probed.append(Path(path).name)
        return fake_media_item(path, *args)

    monkeypatch.setattr(dataset_module, "make_media_item", measure)
    return probed


@pytest.fixture
def fmt():
    return FakeFormat()


@pytest.fixture
def fake_cache():
    return FakeCache


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSON lines and returns the path as text."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def write_video(tmp_path):
    def write(name, grid="2 2 4"):
        (tmp_path / name).write_text(grid)
        return name

    return write


@pytest.fixture
def make_config():
    def make(file, **settings):
        return DataConfig(train_files=[file], **settings)

    return make
