"""The hand-written questions about the film, and the excerpt of it that serves the tests."""

import hashlib
import importlib.util
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from verl.config import PPOConfig, load
from verl.data.dataset import frame_sampling
from verl.data.rows import RowKeys, read_rows
from verl.data.video import probe, sample_indices
from verl.utils.answers import option_letters

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ROOT / "examples/real_film/questions.jsonl"
EXCERPT = ROOT / "tests/assets/bbb_60s.mp4"
FILM_FRAMES, FILM_FPS = 14315, 24


def questions() -> list[dict]:
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def example(name: str):
    path = ROOT / f"examples/real_film/{name}.py"
    spec = importlib.util.spec_from_file_location(f"real_film_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_at_least_twelve_questions_on_the_film_of_several_kinds():
    rows = questions()
    assert len(rows) >= 12
    assert len({row["problem"] for row in rows}) == len(rows)
    assert {row["videos"] for row in rows} == {"bbb.mp4"}
    assert {"temporal", "goal", "plot", "spatial"} <= {row["problem_type"] for row in rows}


def test_every_question_offers_four_different_options_and_one_of_them_is_the_answer():
    for row in questions():
        letters = option_letters(row["options"])
        assert list(letters) == ["A", "B", "C", "D"], row["problem"]
        assert len(set(letters.values())) == 4, row["problem"]
        assert re.fullmatch(r"<answer>[ABCD]</answer>", row["answer"]), row["problem"]


def test_no_letter_is_right_more_often_than_another():
    counts = Counter(row["answer"] for row in questions())
    assert len(counts) == 4
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_evidence_spans_the_film_and_every_span_holds_a_frame_that_the_run_sees(monkeypatch):
    monkeypatch.chdir(ROOT)
    # The film's own folder is made when the film is fetched.
    argv = ["config=examples/real_film/config.yaml", "data.video_dir=tests/assets"]
    sampling = frame_sampling(load(argv, PPOConfig).data)
    times = [i / FILM_FPS for i in sample_indices(FILM_FRAMES, FILM_FPS, sampling)]
    assert len(times) == 256
    starts = []
    for row in questions():
        start, end = row["evidence_s"]
        assert 0 <= start < end <= FILM_FRAMES / FILM_FPS, row["problem"]
        assert any(start <= t <= end for t in times), row["problem"]
        assert row["evidence"].strip()
        starts.append(start)
    assert min(starts) < 60
    assert max(starts) > 540


def test_the_data_layer_reads_the_questions():
    rows = read_rows([str(QUESTIONS)], RowKeys())
    assert all(row.answer in "ABCD" and len(row.answer) == 1 for row in rows)
    assert all(row.extra["evidence_s"] for row in rows)


def test_the_excerpt_is_the_one_that_its_readme_describes():
    info = probe(str(EXCERPT))
    assert (info.width, info.height, info.fps, info.n_frames) == (160, 90, 12, 720)
    assert EXCERPT.stat().st_size < 2_000_000
    readme = (EXCERPT.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(EXCERPT.read_bytes()).hexdigest() in readme
    assert "Blender Foundation" in readme and "creativecommons.org/licenses/by/3.0" in readme


def test_a_film_with_the_right_contents_is_not_fetched_again(tmp_path, monkeypatch):
    module = example("get_film")
    (tmp_path / "bbb.mp4").write_bytes(b"film")
    monkeypatch.setattr(module, "FILM_SHA256", hashlib.sha256(b"film").hexdigest())
    monkeypatch.setattr(module, "download", lambda folder: pytest.fail("downloaded again"))
    assert module.get_film(tmp_path).read_bytes() == b"film"


def write_sdist(module, folder: Path, film: bytes) -> Path:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(module.MEMBER, film)
    folder.mkdir(parents=True)
    sdist = folder / module.SDIST
    with tarfile.open(sdist, "w:gz") as outer:
        entry = tarfile.TarInfo(f"moviepy-2.2.1/{module.ARCHIVE}")
        entry.size = len(inner.getvalue())
        outer.addfile(entry, io.BytesIO(inner.getvalue()))
    return sdist


def test_the_film_is_taken_out_of_a_source_distribution_that_is_there(tmp_path, monkeypatch):
    module = example("get_film")
    sdist = write_sdist(module, tmp_path / "download", b"film")
    monkeypatch.setattr(module, "SDIST_SHA256", module.sha256(sdist))
    monkeypatch.setattr(module, "FILM_SHA256", hashlib.sha256(b"film").hexdigest())
    assert module.get_film(tmp_path).read_bytes() == b"film"


def test_a_film_with_other_contents_is_refused_and_not_kept(tmp_path, monkeypatch):
    module = example("get_film")
    sdist = write_sdist(module, tmp_path / "download", b"another film")
    monkeypatch.setattr(module, "SDIST_SHA256", module.sha256(sdist))
    with pytest.raises(SystemExit, match="expected 475fbbf3"):
        module.get_film(tmp_path)
    assert not (tmp_path / "bbb.mp4").exists()


def test_the_reward_tells_nearly_finished_answers_from_unfinished_ones():
    def score(response: str) -> dict[str, float]:
        row = {"response": response, "ground_truth": "B", "options": ["A. x", "B. y"]}
        return example("reward").compute_score([row | {"question": "which?"}])[0]

    whole, wrong = (
        "<think> b </think> <answer> B </answer>",
        "<think> a </think> <answer> A </answer>",
    )
    assert score(whole) == {"overall": pytest.approx(1.0), "accuracy": 1.0, "format": 1.0}
    assert score(wrong)["overall"] == pytest.approx(0.1)
    assert score("<think> square")["format"] == 0.25
    assert score("<think> <think> square")["format"] == 0.0


def test_the_summary_prints_phases_memory_and_tokens_of_the_training_steps(tmp_path):
    step = {
        "perf/step_s": 2.0,
        "prompt_length/mean": 3700.0,
        "reward/overall": 0.25,
        "timing_s/update": 1.5,
        "memory/host_peak_gib": 1.25,
    }
    lines = [{"step": 0, "metrics": {"timing_s/validation": 9.0}}, {"step": 1, "metrics": step}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summarise = example("summarise")
    rows = dict(summarise.describe_run(summarise.read_steps(path)))
    assert rows["steps"] == "1"
    assert rows["tokens a prompt, mean"] == "3,700"
    assert rows["seconds, update"].startswith("1.50")
    assert rows["peak memory of a worker"] == "1.25 GiB"
