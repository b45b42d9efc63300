"""Every part of benchmarks/video_plane.py runs here with the smallest settings, and says enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
FILM = str(ROOT / "tests" / "assets" / "bbb_60s.mp4")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plane(monkeypatch):
    """The benchmark's own modules, as Python finds them for a script of that folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def measured(out: Path, *arguments: str) -> dict[str, Any]:
    import video_plane

    video_plane.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())
    assert {"cores", "load_before", "load_after"} <= set(found["hardware"])
    assert found["versions"]["torch"] and found["versions"]["transformers"]
    return found


def test_decode_says_seconds_and_memory_of_a_process_of_its_own(tmp_path):
    found = measured(tmp_path / "x.json", "decode", FILM, "--frames", "4")
    (row,) = found["measured"]
    assert row["file"] == "film" and row["frames"] == 4
    assert row["decode_s"] > 0 and row["peak_gb"] > row["frames_gb"]


def test_encode_compares_variants_and_counts_what_was_asked_for(tmp_path, capsys):
    found = measured(
        tmp_path / "x.json", "encode", "--model", "tiny", "--frames", "7", "--size", "112x168",
        "--block-patches", "96", "256", "--variants", "loop", "ours", "ours+linear+pad",
        "--warmups", "0", "--repeats", "1", "--device", "cpu", "--dtype", "fp32",
    )  # fmt: skip
    assert found["grid_thw"] == [4, 8, 12]
    rows = [(r["what"], r["variant"], r["patches_a_call"]) for r in found["measured"]]
    alone = [("tower", v, n) for v in ("loop", "ours", "ours+linear+pad") for n in (96, 256)]
    assert [row for row in rows if row[0] == "tower"] == alone
    assert [row[1] for row in rows if row[0] == "together"] == ["ours", "ours+linear+pad"]
    assert all(r["frames"] == 8 and r["frames_a_s"] > 0 for r in found["measured"])
    assert all(r["share_of_peak"] is None for r in found["measured"])  # There is none of a CPU.
    assert {"attention", "mlp", "patch_embed"} <= set(found["milliseconds_by_part"])
    assert "patches_a_call" in capsys.readouterr().out


def test_a_gather_in_more_parts_says_what_memory_it_added(tmp_path):
    found = measured(tmp_path / "x.json", "gather", "--gb", "0.01", "--chunks", "1", "8")
    assert [row["num_chunk_seq"] for row in found["measured"]] == [8, 1]
    assert all(row["seconds"] > 0 and row["added_gb"] >= 0 for row in found["measured"])


def test_store_says_how_fast_it_writes_and_reads(tmp_path):
    found = measured(tmp_path / "x.json", "store", "--gb", "0.01", "--dir", str(tmp_path))
    rates = {row["what"]: row["gb_a_s"] for row in found["measured"]}
    assert set(rates) == {"write", "read warm", "read cold", "read a tenth, warm"}
    assert all(rate > 0 for rate in rates.values())
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_second_epoch_encodes_nothing(tmp_path):
    found = measured(
        tmp_path / "x.json", "epochs", FILM, "--segments", "2", "--frames", "4",
        "--model", "tiny", "--device", "cpu", "--dir", str(tmp_path),
    )  # fmt: skip
    rows = {row["epoch"]: row for row in found["measured"]}
    assert [rows[e]["encoded"] for e in ("first", "second", "later run")] == [2, 0, 0]
    assert rows["first"]["frames"] == 8 and rows["first"]["features_gb"] > 0


def test_flops_are_those_that_torch_counts():
    from plane import tower

    hf, adapter = tower.build("tiny", CPU, torch.float32)
    for grids in ([(2, 8, 8)], [(3, 10, 12), (1, 4, 20)]):
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), tower.PATCH_WIDTH)
        # The counter does not know the fused attention of the CPU.
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            adapter.encode(hf, pixels, grids)
        assert tower.flops(hf.config.vision_config, grids) == counter.get_total_flops()


@torch.no_grad()
def test_variants_give_the_same_features():
    from plane import tower

    hf, adapter = tower.build("tiny", CPU, torch.float32)
    hf.model.visual.blocks[0].mlp.gate_proj.bias.normal_()
    grids = [(3, 10, 12), (1, 4, 20)]
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), tower.PATCH_WIDTH)
    expected = tower.caller(tower.variant(hf, "loop"), adapter, "loop")(pixels, grids)
    padded = tower.variant(hf, "ours+linear")
    tower.pad_mlps(padded.model.visual, multiple=48)
    assert padded.model.visual.blocks[0].mlp.up_proj.out_features == 128
    assert padded.model.visual.blocks[0].mlp.up_proj.weight.shape == (144, 64)
    fused = tower.variant(hf, "ours+fused")
    assert type(fused.model.visual.blocks[0].attn).__name__ == "FusedAttention"
    for model in (tower.variant(hf, "ours"), padded, fused):
        got = tower.caller(model, adapter, "ours")(pixels, grids)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [[], ["encod"]])
def test_a_part_that_there_is_not_is_answered_with_those_that_there_are(arguments):
    script = ROOT / "benchmarks" / "video_plane.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "use one of ('decode', 'encode', 'gather', 'store', 'epochs')" in done.stderr
