"""Every decoder against sequential PyAV, frame by frame, on a minute of a real film."""

from pathlib import Path

import numpy as np
import pytest

from verl.data import decoders, video_decode
from verl.data.decoders import BACKENDS
from verl.data.video import probe
from verl.data.video_decode import iter_frames
from verl.utils.exits import UserError

FILM = str(Path(__file__).parents[1] / "assets" / "bbb_60s.mp4")


@pytest.fixture(scope="module")
def reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_decode._Reader, "_jump_towards", lambda *_: None)
        patch.setattr(video_decode, "_TELL_UNREFERENCED", ())
        return list(iter_frames(probe(FILM), range(probe(FILM).n_frames)))


def decode(decoder: str, indices, threads: int = 1):
    try:
        return list(iter_frames(probe(FILM), indices, decoder=decoder, threads=threads))  # type: ignore[arg-type]
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("step", [1, 7, 60])
@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_a_decoder_returns_the_frames_of_sequential_pyav(reference, decoder, step, threads):
    indices = range(step - 1, len(reference), step)
    for frame in decode(decoder, indices, threads):
        expected = reference[frame.index]
        assert frame.time_s == pytest.approx(expected.time_s, abs=0.002)
        assert np.array_equal(frame.rgb_HWC, expected.rgb_HWC), frame.index


def test_the_table_holds_each_decoder_that_can_be_asked_for():
    assert set(BACKENDS) == set(decoders.Decoder.__args__)


def test_a_torchcodec_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"data\.video_decoder=pyav"):
        list(iter_frames(probe(FILM), [0], decoder="torchcodec"))
