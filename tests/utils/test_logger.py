"""Loggers: the file is complete and in order, remote trouble stops nothing, secrets stay inside."""

from __future__ import annotations

import io
import json
import logging
import sys
import types

import pytest

from verl.utils import log_backends
from verl.utils import progress as progress_module
from verl.utils.log_backends import (
    BACKENDS,
    GIVE_UP_AFTER,
    Background,
    ConsoleBackend,
    markdown_table,
)
from verl.utils.logger import Tracker, progress, setup_logging
from verl.utils.redact import redact, redact_text


def tracker(folder, *loggers: str, config: dict | None = None) -> Tracker:
    return Tracker(loggers or ("file",), "project", "experiment", config or {}, folder)


def steps(folder, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def run_steps(folder, first: int, last: int) -> None:
    log = tracker(folder)
    log.resume(first - 1)
    for step in range(first, last + 1):
        log.log({"loss": 1 / step}, step)
        log.log_generations([{"response": f"r{step}"}], step)
    log.finish()


def test_every_step_is_one_line_of_strict_json(tmp_path):
    log = tracker(tmp_path)
    log.log({"loss": 0.1 + 0.2, "epoch": 1, "bad": float("nan")}, 1)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert (
        text == '{"step": 1, "metrics": {"loss": 0.30000000000000004, "epoch": 1, "bad": null}}\n'
    )
    log.log_generations([{"prompt": "p", "reward": 1.0}, {"prompt": "q"}], 1)
    rows = [json.loads(r) for r in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "prompt": "p", "reward": 1.0}, {"step": 1, "prompt": "q"}]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    run_steps(tmp_path, 1, 5)
    run_steps(tmp_path, 4, 6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path, "generations.jsonl") == [1, 2, 3, 4, 5, 6]


def test_without_being_told_the_first_step_decides(tmp_path):
    run_steps(tmp_path, 1, 5)
    log = tracker(tmp_path)
    log.log({"loss": 1.0}, 3)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("tail", ['{"step": 3, "metr', '{"step": 2, "metrics": {}}'])
def test_a_line_cut_off_by_a_kill_does_not_spoil_the_next(tmp_path, tail):
    run_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    run_steps(tmp_path, 3, 3)
    assert steps(tmp_path)[-1] == 3 and 1 in steps(tmp_path)


def test_a_new_run_puts_the_old_file_aside(tmp_path):
    run_steps(tmp_path, 1, 3)
    run_steps(tmp_path, 1, 1)
    assert steps(tmp_path) == [1]
    assert steps(tmp_path, "metrics.1.jsonl") == [1, 2, 3]


def test_an_unknown_logger_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"unknown logger 'wandbb'; did you mean wandb\?"):
        tracker(tmp_path, "wandbb")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_a_missing_package_names_the_extra_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'long-rl\[{name}\]'"):
        tracker(tmp_path, "file", name)


def test_tensorboard_holds_the_scalars_and_drops_repeated_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 3), (3, 4)):
        log = tracker(tmp_path, "file", "tensorboard")
        log.resume(first - 1)
        for step in range(first, last + 1):
            log.log({"loss": step + first / 10}, step)
        log.log_generations([{"response": "a|b"}], last)
        log.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]
    assert seen == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3)]


def test_wandb_works_offline_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = tracker(tmp_path, "file", "wandb", config={"api_key": "canary-secret", "lr": 0.1})
    log.resume(0)
    log.log({"loss": 1.0}, 1)
    log.log_generations([{"response": "r", "reward": 1.0}], 1)
    assert "canary-secret" not in str(dict(wandb.run.config))
    assert wandb.run.config["lr"] == 0.1
    log.finish()
    first = (tmp_path / "wandb_run_id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{first}/*.wandb"))
    again = log_backends.Run("p", "e", {}, tmp_path, last_step=1)
    assert again.run_id("wandb") == first
    assert log_backends.Run("p", "e", {}, tmp_path, last_step=None).run_id("wandb") != first


class Remote:
    """A remote logger that fails as told."""

    def __init__(self, failing: range = range(0)) -> None:
        self.failing, self.calls, self.seen = failing, 0, []

    def open(self, run) -> None:
        self.run = run

    def log(self, metrics, step) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise ConnectionError("no route to host")
        self.seen.append(step)

    def log_generations(self, rows, step) -> None:
        self.log({}, step)

    def finish(self, status) -> None:
        self.seen.append(status)


def test_a_failing_server_is_one_warning_and_training_goes_on(tmp_path, monkeypatch, caplog):
    remote = Remote(failing=range(2, 4))
    monkeypatch.setitem(BACKENDS, "wandb", lambda: Background("wandb", remote))
    log = tracker(tmp_path, "file", "wandb")
    for step in range(1, 6):
        log.log({"loss": 1.0}, step)
    log.finish("failed")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert remote.seen == [1, 4, 5, "failed"]
    assert caplog.text.count("no route to host") == 1


def test_a_dead_server_is_left_alone_after_a_while():
    remote = Remote(failing=range(1, 1000))
    background = Background("mlflow", remote)
    background.open(None)
    for step in range(50):
        background.log({}, step)
    background.finish("finished")
    assert remote.calls == GIVE_UP_AFTER


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_server_that_cannot_be_opened_is_not_called_again(caplog, in_thread):
    remote = Remote()
    remote.open = lambda run: 1 / 0
    background = Background("swanlab", remote, opens_in_thread=in_thread)
    background.open(None)
    background.log({}, 1)
    background.finish("finished")
    assert remote.calls == 0 and "ZeroDivisionError" in caplog.text


def test_swanlab_is_opened_where_it_cannot_take_the_signals_of_the_run(tmp_path, monkeypatch):
    import threading

    threads = []
    fake = types.ModuleType("swanlab")
    for what in ("init", "log", "finish"):
        setattr(fake, what, lambda *_, **__: threads.append(threading.current_thread()))
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    log = tracker(tmp_path, "file", "swanlab")
    log.log({"loss": 1.0}, 1)
    log.finish()
    assert len(threads) == 3 and threading.main_thread() not in threads


def test_a_hanging_server_costs_no_time(caplog):
    import threading

    release = threading.Event()
    remote = Remote()
    remote.log = lambda metrics, step: release.wait(30)
    background = Background("wandb", remote, capacity=3)
    background.open(None)
    for step in range(20):
        background.log({}, step)
    background.finish("finished", timeout_s=0.05)
    release.set()
    assert "is too slow" in caplog.text


@pytest.mark.parametrize("name", ["mlflow", "swanlab"])
def test_mlflow_and_swanlab_get_metrics_samples_and_status(tmp_path, monkeypatch, name):
    calls = []

    def record(what):
        def call(*args, **kwargs):
            calls.append((what, args, kwargs))
            return types.SimpleNamespace(
                info=types.SimpleNamespace(run_id="abc"), experiment_id="7"
            )

        return call

    fake = types.ModuleType(name)
    client = types.SimpleNamespace()
    for what in ("init", "log", "finish", "Text", "set_experiment"):
        setattr(fake, what, record(what))
    for what in ("create_run", "update_run", "log_dict", "log_batch", "log_text",
                 "set_terminated"):  # fmt: skip
        setattr(client, what, record(what))
    fake.MlflowClient = lambda: client
    fake.entities = types.SimpleNamespace(Metric=lambda *values: values)
    monkeypatch.setitem(sys.modules, name, fake)
    for last_step in (0, 1):
        log = tracker(tmp_path, "file", name, config={"password": "canary"})
        log.resume(last_step)
        log.log({"reward/by_type/what?": 1.0}, last_step + 1)
        log.log_generations([{"response": "r"}], last_step + 1)
        log.finish("finished")
    assert "canary" not in str(calls)
    text = str(calls)
    assert "project" in text and "experiment" in text
    if name == "mlflow":
        assert [w for w, *_ in calls].count("create_run") == 1  # the resumed run is the same
        assert [a for w, a, _ in calls if w == "update_run"] == [("abc",)]
        logged = [(run, m[0]) for w, (run, *m), _ in calls if w == "log_batch"]
        assert [(r, m[0], m[1], m[3]) for r, [m] in logged] == [
            ("abc", "reward/by_type/what_", 1.0, 1), ("abc", "reward/by_type/what_", 1.0, 2)
        ]  # fmt: skip
        assert [a for w, a, _ in calls if w == "set_terminated"] == [("abc", "FINISHED")] * 2
    else:
        ids = [kwargs["id"] for what, _, kwargs in calls if what == "init"]
        assert ids[0] == ids[1] and len(ids) == 2


def test_mlflow_keeps_all_of_a_resumed_run_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    for last_step in (0, 2):
        log = tracker(tmp_path, "file", "mlflow", config={"lr": 0.1, "password": "canary"})
        log.resume(last_step)
        for step in (last_step + 1, last_step + 2):
            log.log({"reward/by_type/what?": 0.5 * step, "bad": float("nan")}, step)
            log.log_generations([{"response": "r"}], step)
        log.finish("finished")
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "project"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("experiment", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "reward/by_type/what_")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert len(client.list_artifacts(run.info.run_id, "generations")) == 4
    config = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/config.json")
    assert config == {"lr": 0.1, "password": "***"}


def test_the_console_shows_the_few_numbers_that_matter(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metrics = {f"timing_s/{i}": 1.0 for i in range(40)} | {"perf/step_s": 2.04}
    metrics |= {"reward/overall": 0.51234, "val/test/accuracy": 0.25, "val/test/accuracy/x": 1.0}
    console(tmp_path, total_steps=None).log(metrics, 7)
    line = caplog.messages[-1]
    assert line == "step 7: reward 0.5123  test accuracy 0.25  2.0 s/step"


def test_the_console_tells_how_far_the_run_is(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = iter((100.0, 110.0, 130.0, 190.0))
    monkeypatch.setattr(log_backends.time, "monotonic", lambda: next(now))
    backend = console(tmp_path, total_steps=9)
    for step in (5, 6, 7, 9):
        backend.log({"train/loss": 1.5}, step)
    assert caplog.messages[-4:] == [
        "step 5/9: loss 1.5",
        "step 6/9: loss 1.5  0:00:30 left",
        "step 7/9: loss 1.5  0:00:30 left",
        "step 9/9: loss 1.5",
    ]


def test_metrics_of_a_step_whose_line_a_kill_prevented_are_logged_on_resume(tmp_path):
    run_steps(tmp_path, 1, 2)
    for _ in range(2):
        log = tracker(tmp_path)
        log.resume(3, last_metrics={"loss": 0.25})
        log.finish()
    assert steps(tmp_path) == [1, 2, 3]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 3, "metrics": {"loss": 0.25}}


def console(folder, total_steps: int | None) -> ConsoleBackend:
    backend = ConsoleBackend()
    run = log_backends.Run("p", "e", {}, folder, last_step=None, total_steps=total_steps)
    backend.open(run)
    return backend


def test_markdown_tables_survive_bars_and_line_breaks():
    assert markdown_table([{"a": "x|y\nz"}]).splitlines()[-1] == "|x\\|y<br>z|"


def test_secrets_are_hidden_by_name_by_form_and_by_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    settings = {
        "hf_token": "abc", "loss_avg_mode": "token", "max_tokens": 8, "api_key": None,
        "nested": [{"password": "x"}, "hf_" + "a" * 20], "url": "https://me:pass@host/x",
        "command": "curl -d correct-horse-battery",
    }  # fmt: skip
    assert redact(settings) == {
        "hf_token": "***", "loss_avg_mode": "token", "max_tokens": 8, "api_key": None,
        "nested": [{"password": "***"}, "***"], "url": "https://***@host/x",
        "command": "curl -d ***",
    }  # fmt: skip
    assert redact_text("Authorization: Bearer abcdefgh12") == "Authorization: Bearer ***"


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    root.handlers, root.level = before, level


def test_log_lines_carry_the_rank_and_no_secret(root_logger, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    setup_logging(3, "actor")
    setup_logging(3, "actor")
    try:
        raise ValueError("key hf_" + "b" * 20)
    except ValueError:
        logging.getLogger("verl.test").exception("failed with %s", "sk-" + "c" * 20)
    text = stream.getvalue()
    assert text.count("ERROR [actor rank 3] verl.test: failed with ***") == 1
    assert "hf_b" not in text and "ValueError: key ***" in text


def test_progress_is_lines_in_a_log_and_silent_when_short(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert list(progress(range(3), "short work")) == [0, 1, 2]
    assert caplog.text == ""
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(now)))
    assert list(progress((i for i in range(8)), "long work", total=8)) == list(range(8))
    assert "long work: 2 of 8 (25%)" in caplog.text
    assert "s left" in caplog.text and "long work: done in" in caplog.text
    assert len(caplog.messages) <= 5


@pytest.mark.parametrize(
    ("status", "told"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_mlflow_tells_a_run_that_was_stopped_from_one_that_failed(status, told):
    backend, seen = log_backends.MlflowBackend(), []
    backend._run_id = "7"
    backend._client = types.SimpleNamespace(set_terminated=lambda *args: seen.append(args))
    backend.finish(status)
    assert seen == [("7", told)]
