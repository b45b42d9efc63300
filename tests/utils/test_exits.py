"""Signals stop a run once in an orderly way and then for good; errors become one message."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verl.utils import exits
from verl.utils.exits import Explained, Interrupted, UserError, exit_on_error

ROOT = Path(__file__).parents[2]
STUBBORN = """
import time
from verl.utils import exits
exits.SECONDS_TO_STOP = {limit}
with exits.signals_raise():
    words = ["ready"]
    while True:
        try:
            while words:
                print(words.pop(), flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("caught", flush=True)
"""


@pytest.fixture(autouse=True)
def no_late_exit(monkeypatch):
    """The bound on the time that Python takes to exit would end pytest."""
    monkeypatch.setattr(exits, "_exit_within", lambda seconds, code: None)


def run(main, capsys, **options) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        exit_on_error(main, **options)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def fail(error: BaseException):
    def main() -> None:
        raise error

    return main


class WrongConfig(Explained, ValueError):
    exit_code = 2


def test_an_entry_point_exits_with_what_it_returns(capsys):
    assert run(lambda: None, capsys) == (0, "")
    assert run(lambda: 3, capsys) == (3, "")


def advised(error: BaseException, advice: str = "It goes on from global_step_4."):
    def main() -> None:
        with exits.advising(lambda: advice):
            raise error

    return main


def test_an_explained_error_is_one_message_that_says_how_to_go_on(capsys):
    error = type("Bad", (Explained, ValueError), {})("a.mp4 has no frames")
    error.add_note("Raised by worker rank 1 in generate().\nTraceback ...")
    code, text = run(advised(error), capsys)
    assert code == 1
    assert text == (
        "\nerror: a.mp4 has no frames\nRaised by worker rank 1 in generate().\n"
        "It goes on from global_step_4.\n"
    )


def test_an_error_before_anything_was_begun_promises_nothing(capsys):
    assert run(fail(UserError("no such file")), capsys) == (1, "\nerror: no such file\n")
    assert run(advised(UserError("no such file"), ""), capsys)[1] == "\nerror: no such file\n"


def test_advice_outlives_an_error_that_takes_the_place_of_another(capsys):
    def main() -> None:
        with exits.signals_raise(), exits.advising(lambda: "From global_step_4."):
            try:
                signal.raise_signal(signal.SIGINT)
            except Interrupted:
                raise KeyboardInterrupt from None  # as ray.get does

    assert run(main, capsys) == (130, "\nStopped by SIGINT.\nFrom global_step_4.\n")


def test_a_wrong_configuration_exits_with_2_and_promises_nothing(capsys):
    assert run(advised(WrongConfig("n=0")), capsys) == (2, "\nerror: n=0\n")


def test_commands_without_checkpoints_promise_nothing(capsys):
    assert run(advised(UserError("x")), capsys, resumes=False)[1] == "\nerror: x\n"


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (KeyboardInterrupt(), 130, "SIGINT"),
        (Interrupted(signal.SIGINT), 130, "SIGINT"),
        (Interrupted(signal.SIGTERM), 143, "SIGTERM"),
    ],
)
def test_signals_have_their_exit_codes(capsys, error, code, name):
    found, text = run(fail(error), capsys)
    assert found == code
    assert text.startswith(f"\nStopped by {name}.\n") and "Traceback" not in text


def test_an_unexpected_error_keeps_its_traceback(capsys):
    code, text = run(fail(ZeroDivisionError("oops")), capsys)
    assert code == 1
    assert "Traceback" in text and "error: ZeroDivisionError: oops" in text


def in_a_ray_task(error: Exception):
    """An entry point that waits for a task of Ray that raises."""

    def task() -> None:
        raise error

    def main() -> None:
        import ray

        ray.get(ray.remote(task).remote())

    return main


def test_an_explained_error_out_of_a_ray_task_is_one_message(capsys, ray_cluster):
    main = in_a_ray_task(UserError("lower worker.rollout.n"))
    assert run(main, capsys, resumes=False) == (1, "\nerror: lower worker.rollout.n\n")


def test_an_unexpected_error_out_of_a_ray_task_keeps_its_traceback(capsys, ray_cluster):
    code, text = run(in_a_ray_task(IndexError("5")), capsys)
    assert code == 1 and "Traceback" in text and "in task" in text


def test_a_plain_keyboard_interrupt_after_a_signal_tells_which_it_was():
    with pytest.raises(Interrupted, match="SIGTERM"), exits.signals_raise():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise KeyboardInterrupt from None  # as ray.get does


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with exits.signals_raise():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def stubborn_process(limit: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN.format(limit=limit)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_a_run_that_swallows_a_signal_is_cut_off():
    process = stubborn_process(limit=0.5)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Received SIGTERM: stopping the run" in error and "is cut off" in error


def test_a_second_signal_ends_the_process_at_once():
    process = stubborn_process(limit=60)
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "caught\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - start < 5
