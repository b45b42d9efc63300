"""The report: one page that needs nothing else, says what is missing, and escapes everything."""

import base64
import io
import json
import math
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from tests.trainer.fake_run import (
    KINDS,
    VIDEO,
    evaluation,
    make_run,
    prediction,
    rl_metrics,
    sft_metrics,
    write_jsonl,
)
from verl.data.video import FrameSampling
from verl.trainer.report import (
    accuracy_table,
    half_interval,
    headline,
    main,
    report_of_run,
    seconds_text,
    write_report,
)
from verl.trainer.report_charts import ChartSpec, draw_charts, nice_ticks, read_metrics
from verl.trainer.report_samples import choose, compare, make_cards, make_strip
from verl.trainer.summary import build_summary


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "quickstart", n=24, n_steps=45)


def text_of(page) -> str:
    return page.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_the_network(run):
    html = text_of(report_of_run(run, n_frames=4, n_samples=2))
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    assert all(src.startswith("data:image/jpeg") for src in re.findall(r'src="([^"]+)"', html))


def test_the_page_shows_every_part_of_a_whole_run(run):
    html = text_of(report_of_run(run, n_frames=4, n_samples=2))
    for heading in ("Accuracy", "Curves", "Where the time went", "Sample questions", "Notes"):
        assert f"<h2>{heading}</h2>" in html
    for title in ("Reward", "Response length", "KL to the reference", "SFT loss"):
        assert f"<h3>{title}</h3>" in html
    assert "Rollout versus trainer log-probs" in html
    for fact in ("1.1 M parameters", "torch 2.", "sft 60, rl 45", "7 min 33 s"):
        assert fact in html
    for name in ("chance", "blind", "few frames", "SFT", "RL", "merged"):
        assert f"<td>{name}</td>" in html
    assert "its base model knows the shapes already" in html
    assert "Not logged" not in html


def test_sample_questions_show_frames_both_chains_the_gold_answer_and_the_reward(run):
    html = text_of(report_of_run(run, n_frames=8, n_samples=1))
    assert html.count("<article>") == 1
    assert html.count("<img ") == 8
    article = html.split("<article>")[1]
    assert len(re.findall(r'<div class="reply (?:right|wrong)">', article)) == 2
    assert article.count("&lt;think&gt;") == 2
    assert 'class="gold">' in article
    assert re.search(r"SFT: <b>[A-D], wrong</b>.*reward 0\.10", article)
    assert re.search(r"RL: <b>[A-D], correct</b>.*reward 1\.00", article)


def test_texts_from_data_are_escaped_everywhere(tmp_path):
    evil = "<script>alert('x')</script>"
    row = prediction(
        0, True, question=evil, options=[f"A{evil}"], response=evil, problem_type=evil, video=None
    )
    files = {
        name: write_jsonl(tmp_path / f"predictions_{name}.jsonl", [row]) for name in ("sft", "rl")
    }
    line = {"step": 1, "metrics": {f"reward/by_type/{evil}": 1.0, f"timing_s/{evil}": 1.0}}
    metrics = write_jsonl(tmp_path / "<b>run" / "metrics.jsonl", [line])
    summary = {
        "accuracy": {evil: {"overall": 0.5, "n": 2, "by_type": {evil: 0.5}}},
        "seconds": {evil: 1.0},
        "about": {evil: evil},
    }
    page = write_report(
        tmp_path / "r.html", summary=summary, metrics_jsonl=[metrics], predictions=files,
        title=evil, notes=[evil],
    )  # fmt: skip
    html = text_of(page)
    assert "<script" not in html
    assert "<b>run" not in html
    assert html.count("&lt;script&gt;") > 10


def test_a_page_from_nothing_says_what_is_missing(tmp_path):
    html = text_of(write_report(tmp_path / "deep" / "report.html", summary={}))
    assert "This run has no evaluations." in html
    assert "No times were recorded." in html
    assert "No predictions or generations were kept." in html
    assert "Not logged in this run: Reward, Accuracy" in html


def test_a_run_without_kl_says_so_and_still_draws_the_rest(tmp_path):
    metrics = write_jsonl(tmp_path / "rl" / "metrics.jsonl", rl_metrics(5, kl=False))
    html = text_of(write_report(tmp_path / "r.html", summary={}, metrics_jsonl=[metrics]))
    assert "<h3>KL to the reference</h3>" not in html
    assert "Not logged in this run: KL to the reference, SFT loss" in html
    assert "<h3>Reward</h3>" in html


def test_a_video_that_is_gone_is_named_and_the_rest_of_the_page_stays(tmp_path):
    rows = [prediction(0, True, video=str(tmp_path / "gone.mp4"))]
    files = {"rl": write_jsonl(tmp_path / "predictions_rl.jsonl", rows)}
    html = text_of(write_report(tmp_path / "r.html", summary={}, predictions=files))
    assert "No frames: gone.mp4 cannot be read" in html
    assert "which event comes first" in html


def test_without_predictions_the_first_and_last_logged_generations_are_shown(tmp_path):
    rows = [prediction(0, step == 20) | {"step": step} for step in (0, 10, 20)]
    generations = write_jsonl(tmp_path / "generations.jsonl", rows)
    page = write_report(tmp_path / "r.html", summary={}, generations_jsonl=generations, n_frames=2)
    html = text_of(page)
    assert "step 0: <b>B, wrong</b>" in html
    assert "step 20: <b>A, correct</b>" in html
    assert "step 10" not in html


def test_thumbnails_are_the_frames_that_sampling_takes():
    strip = make_strip(str(VIDEO), FrameSampling(num_frames=8))
    assert strip.n_sampled == len(strip.frames) == 8
    assert strip.frames[0].time_s == 0
    assert strip.frames[-1].time_s == pytest.approx(719 / 12)
    picture = Image.open(io.BytesIO(base64.b64decode(strip.frames[3].data_uri.split(",")[1])))
    assert picture.format == "JPEG"
    assert max(picture.size) == 112


def test_a_long_strip_is_thinned_and_says_of_how_many(tmp_path):
    strip = make_strip(str(VIDEO), FrameSampling(num_frames=256), limit=5)
    assert (len(strip.frames), strip.n_sampled) == (5, 256)
    assert strip.frames[-1].time_s == pytest.approx(719 / 12)


def test_a_card_shows_the_part_of_the_video_that_was_asked_about():
    rows = {"u": prediction(0, True, video=str(VIDEO)) | {"uid": "u", "segment": [10.0, 20.0]}}
    (card,) = make_cards(["u"], {"rl": rows}, 4)
    assert [frame.time_s for frame in card.strip.frames][::3] == [10.0, 20.0]


def answers(pattern: str) -> dict:
    return {f"u{i:03d}": prediction(i, mark == "1") for i, mark in enumerate(pattern)}


def test_changes_are_counted_over_the_questions_that_both_answered():
    found = compare(answers("0011"), answers("010"))
    assert (found.both, found.gained, found.lost, found.neither) == (0, 1, 1, 1)
    assert found.total == 3


def test_samples_show_what_was_learnt_of_each_kind_and_also_what_was_not():
    before, after = answers("000000111000"), answers("111111110000")
    chosen = choose(before, after, 6)
    outcomes = [(before[u]["correct"], after[u]["correct"]) for u in chosen]
    assert outcomes.count((False, True)) == 3
    assert {(True, True), (False, False), (True, False)} <= set(outcomes)
    learnt = [u for u, o in zip(chosen, outcomes, strict=True) if o == (False, True)]
    assert {after[u]["problem_type"] for u in learnt} == set(KINDS)
    assert chosen == choose(before, after, 6)
    assert len(choose(before, after, 99)) == 12


def test_accuracy_rows_come_in_the_order_of_the_story_and_gaps_stay_gaps():
    kinds, rows = accuracy_table(
        {
            "rl": {"overall": 0.9, "n": 100, "by_type": {"last": 0.9}},
            "pass1": {"overall": 0.8},
            "chance": {"overall": 0.25, "n": 100, "by_type": {"first": 0.25}},
        }
    )
    assert kinds == ["first", "last"]
    assert [row.label for row in rows] == ["chance", "RL", "pass1"]
    assert rows[0].by_type == [0.25, None]
    assert rows[0].margin is None
    assert rows[2].n is None


def test_the_interval_is_wilsons():
    assert half_interval(0.5, 100) == pytest.approx(0.09617, abs=1e-4)
    assert 0 < half_interval(1.0, 300) < 0.01


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.6, 0.9, "raised accuracy from 60.0% to 90.0% (+30.0 points) on 300 held-out"),
        (0.6, 0.5, "lowered accuracy from 60.0% to 50.0% (-10.0 points)"),
        (0.6, 0.6, "left accuracy at 60.0%"),
    ],
)
def test_the_headline_says_what_happened_in_both_directions(before, after, words):
    text = headline({"sft": {"overall": before}, "rl": {"overall": after, "n": 300}})
    assert words in text
    assert headline({"rl": {"overall": after}}) == ""


def test_durations_are_readable():
    assert [seconds_text(s) for s in (0.5, 12.34, 245, 7384)] == [
        "0.50 s", "12.3 s", "4 min 05 s", "2 h 03 min",
    ]  # fmt: skip


def test_charts_are_well_formed_and_have_their_axes_named(tmp_path):
    path = write_jsonl(tmp_path / "rl" / "metrics.jsonl", rl_metrics(50))
    charts, _ = draw_charts({"rl": read_metrics(path)})
    for chart in charts:
        root = ElementTree.fromstring(str(chart.svg))
        names = [t.text for t in root.iter("text") if t.get("class") == "name"]
        assert names[0] == "step"
        assert names[1]
        assert len(list(root.iter("polyline"))) >= 1


def test_a_metric_that_two_runs_have_is_labelled_with_the_run():
    spec = ChartSpec("Loss", "nats", {"loss": "loss"})
    charts, _ = draw_charts({"seed0": {"loss": [(1, 2.0)]}, "seed1": {"loss": [(1, 3.0)]}}, [spec])
    assert charts[0].legend == ["seed0: loss", "seed1: loss"]


def test_values_that_are_not_finite_or_not_positive_on_a_log_axis_are_left_out(tmp_path):
    lines = [{"step": i, "metrics": {"d": v}} for i, v in enumerate([math.nan, 0.0, 1e-6])]
    series = read_metrics(write_jsonl(tmp_path / "metrics.jsonl", lines))
    assert series["d"] == [(1, 0.0), (2, 1e-6)]
    spec = ChartSpec("Difference", "nats", {"d": "d"}, log=True)
    charts, _ = draw_charts({"run": series}, [spec])
    assert str(charts[0].svg).count("<circle") == 1
    assert draw_charts({"run": {"d": [(1, 0.0)]}}, [spec])[1] == ["Difference"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0003), (-5, 17), (1e6, 3e6), (2, 2)])
def test_ticks_are_few_ascending_and_inside_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


def test_the_summary_holds_what_its_readers_were_promised(run):
    summary = build_summary(run)
    assert list(summary["accuracy"]) == ["chance", "blind", "few_frames", "sft", "rl", "merged"]
    for scores in summary["accuracy"].values():
        assert scores["n"] == 24
        assert 0 <= scores["overall"] <= 1
        assert set(scores["by_type"]) == set(KINDS)
    assert summary["seconds"]["rl"] == 251.7
    assert summary["seed"] == 0
    assert summary["steps"] == {"sft": 60, "rl": 45}
    assert {"python", "torch", "transformers", "ray"} <= set(summary["versions"])
    assert {"processor", "cores", "memory"} <= set(summary["hardware"])


def test_an_evaluation_under_its_own_name_wins_over_a_variant_of_a_model(run):
    rows = [prediction(i, i == 0) for i in range(10)]
    (run / "eval_blind.json").write_text(json.dumps(evaluation(rows, "blind")))
    assert build_summary(run)["accuracy"]["blind"]["overall"] == 0.1


def with_controls(run, **about: str):
    """Adds two evaluations of our own, and what `about` says, to a run."""
    rows = [prediction(i, i % 2 == 0) for i in range(24)]
    longer, sampled = evaluation(rows, "sft_longer"), evaluation(rows, "rl") | {"temperature": 1.0}
    (run / "eval_sft_longer.json").write_text(json.dumps(longer))
    (run / "eval_rl_sampled.json").write_text(json.dumps(sampled))
    facts = json.loads((run / "run.json").read_text())
    facts["about"] |= about
    (run / "run.json").write_text(json.dumps(facts))
    return run


def test_evaluations_of_other_names_stand_in_the_summary_behind_the_known_ones(run):
    accuracy = build_summary(with_controls(run))["accuracy"]
    assert list(accuracy) == [
        "chance", "blind", "few_frames", "sft", "rl", "merged", "rl_sampled", "sft_longer"
    ]  # fmt: skip
    assert accuracy["sft_longer"]["overall"] == 0.5
    assert accuracy["rl_sampled"]["temperature"] == 1.0


def test_variants_beyond_the_known_two_are_shown_under_their_own_names(run):
    rows = [prediction(i, True) for i in range(10)]
    for name in ("sft_blind", "rl_frames32", "rl_blind_sampled"):
        (run / f"eval_{name}.json").write_text(json.dumps(evaluation(rows, name)))
    accuracy = build_summary(run)["accuracy"]
    assert list(accuracy)[6:] == ["rl_blind_sampled", "rl_frames8", "sft_blind"]
    assert accuracy["blind"]["overall"] < 1 == accuracy["few_frames"]["overall"]


def test_captions_of_evaluations_are_those_that_the_run_gives(run):
    about = {"sft_longer": "as many seconds of SFT as of RL", "few_frames": "8 of 64 frames"}
    html = text_of(report_of_run(with_controls(run, **about), n_frames=2, n_samples=1))

    def caption(label: str) -> str:
        found = re.search(rf'<td>{label}</td><td class="words"><span class="of">([^<]*)<', html)
        assert found
        return found[1]

    assert caption("SFT longer") == "as many seconds of SFT as of RL"
    assert caption("few frames") == "8 of 64 frames"
    assert caption("RL sampled") == "sampled at temperature 1"
    assert caption("blind") == "every frame blanked"
    assert html.count("as many seconds of SFT as of RL") == 1  # a caption is no fact of the header
    assert "1.1 M parameters" in html


def test_a_folder_without_evaluations_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no eval_<name>"):
        build_summary(tmp_path)


def test_the_command_writes_summary_and_page_and_says_where(run, capsys):
    assert main(["--run", str(run), "--frames", "2", "--samples", "1", "--note", "Seen once."]) == 0
    assert f"{run}/report.html" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["accuracy"]["rl"]["n"] == 24
    assert "Seen once." in text_of(run / "report.html")


def test_the_command_uses_a_stored_summary_where_there_are_no_evaluations(tmp_path):
    summary = {"accuracy": {"rl": {"overall": 0.75, "n": 4}}, "title": "Stored"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    write_jsonl(tmp_path / "sft" / "metrics.jsonl", sft_metrics(3))
    main(["--run", str(tmp_path)])
    html = text_of(tmp_path / "report.html")
    assert "<h1>Stored</h1>" in html
    assert "75.0%" in html
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_run_folder_that_is_not_there_is_an_error_of_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--run", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


def test_the_merged_models_answers_stand_in_where_the_trainers_are_missing(run):
    (run / "eval_rl_answers.jsonl").unlink()
    html = text_of(report_of_run(run, n_frames=2, n_samples=1))
    assert "only by merged" in html


def test_a_metric_that_is_always_zero_lies_on_the_axis_of_its_chart():
    charts, _ = draw_charts({"rl": {"x": [(1, 0.0), (2, 0.0)]}}, [ChartSpec("X", "u", {"x": "x"})])
    root = ElementTree.fromstring(str(charts[0].svg))
    labels = [text.text for text in root.iter("text")]
    assert "0" in labels
    assert not any(label.startswith("-") for label in labels)
