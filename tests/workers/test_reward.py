import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl.config import RewardConfig
from verl.workers.reward import RewardError, RewardManager

ROWS = [
    {"response": f"r{i}", "ground_truth": "B", "options": ["A", "B"], "level": i} for i in range(5)
]


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    """Makes a manager of a function `f`, given as source."""
    made: list[RewardManager] = []

    def make(source: str, **settings: Any) -> RewardManager:
        path = tmp_path / "reward.py"
        path.write_text(source)
        made.append(RewardManager(RewardConfig(reward_function=f"{path}:f", **settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


Make = Callable[..., RewardManager]


def failure(make: Callable[[], RewardManager]) -> str:
    with pytest.raises(RewardError) as caught:
        make().score(ROWS)
    return str(caught.value)


def test_a_batch_function_sees_every_column_and_its_keyword_arguments(manager: Make):
    source = (
        "def f(rows, scale):\n"
        "    assert rows[0]['ground_truth'] == 'B' and rows[0]['options'] == ['A', 'B']\n"
        "    return [{'overall': r['level'] * scale, 'size': len(rows)} for r in rows]\n"
    )
    scores = manager(source, reward_function_kwargs={"scale": 0.5}).score(ROWS)
    assert scores == [{"overall": i * 0.5, "size": 5.0} for i in range(5)]


def test_a_sequential_function_may_return_plain_numbers(manager: Make):
    source = "def f(row): return row['level'] > 2 if row['level'] else 7"
    scores = manager(source, reward_type="sequential").score(ROWS)
    assert [s["overall"] for s in scores] == [7.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["batch", "sequential"])
def test_several_processes_keep_the_order_of_the_samples(manager: Make, kind: str):
    one = "{'overall': r['level'], 'pid': os.getpid()}"
    body = f"[{one} for r in rows]" if kind == "batch" else one.replace("r[", "rows[")
    source = f"import os\ndef f(rows): return {body}"
    rewards = manager(source, reward_type=kind, num_cpus=3)
    for rows in (ROWS, ROWS[:1], ROWS * 200):
        scores = rewards.score(rows)
        assert [s["overall"] for s in scores] == [r["level"] for r in rows]
    assert len({s["pid"] for s in scores}) == 3


def test_no_samples_give_no_scores(manager: Make):
    assert manager("def f(rows): return []").score([]) == []


def test_the_function_runs_without_torch_or_the_main_script_in_its_process(manager: Make):
    source = (
        "import os, sys\n"
        "def f(row): return {'overall': 0, 'torch': 'torch' in sys.modules,"
        " 'pytest': 'pytest' in sys.modules, 'same': os.getpid() == row['pid']}\n"
    )
    (score,) = manager(source, reward_type="sequential").score([{"pid": os.getpid()}])
    assert score == {"overall": 0, "torch": 0, "pytest": 0, "same": 0}


def test_numbers_of_numpy_are_numbers(manager: Make):
    source = "import numpy as np\ndef f(row): return np.float32(0.5)"
    assert manager(source, reward_type="sequential").score(ROWS[:1]) == [{"overall": 0.5}]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("float('nan')", "returned overall=nan, which is not finite"),
        ("{'overall': 1, 'part': float('inf')}", "returned part=inf, which is not finite"),
        ("None", "returned overall=None, a NoneType and not a number"),
        ("'1'", "returned overall='1', a str and not a number"),
        ("{'accuracy': 1}", "which has no 'overall'"),
    ],
)
def test_a_wrong_score_stops_with_the_sample_that_got_it(manager: Make, returned: str, words: str):
    source = f"def f(rows): return [1.0 if r['level'] < 3 else {returned} for r in rows]"
    for kind in ("batch", "sequential"):
        text = failure(lambda kind=kind: manager(as_kind(source, kind), reward_type=kind))
        assert words in text
        assert 'the sample: {"response": "r3"' in text


def as_kind(source: str, kind: str) -> str:
    """The same rule for one row instead of a list of them."""
    if kind == "batch":
        return source
    return source.replace("[", "", 1).replace(" for r in rows]", "").replace("(rows)", "(r)")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[1.0]", "returned 1 scores for 5 samples"),
        ("{'overall': 1}", "returned a dict, not a list of scores"),
        ("None", "returned a NoneType, not a list of scores"),
        ("'11111'", "returned a str, not a list of scores"),
        ("[{'overall': 1, 'x': 2}] + [1] * 4", "returned the parts ['overall', 'x']"),
    ],
)
def test_a_batch_of_the_wrong_shape_stops_the_run(manager: Make, returned: str, words: str):
    text = failure(lambda: manager(f"def f(rows): return {returned}"))
    assert words in text and '{"response": "r' in text


def test_an_exception_stops_with_its_traceback_and_the_sample(manager: Make):
    source = "def f(row):\n    return 1 / (row['level'] - 2)\n"
    text = failure(lambda: manager(source, reward_type="sequential"))
    assert "ZeroDivisionError" in text and "line 2" in text
    assert 'the sample: {"response": "r2"' in text


def test_an_exception_in_a_batch_shows_its_first_sample(manager: Make):
    text = failure(lambda: manager("def f(rows): raise KeyError('judge')"))
    assert "KeyError: 'judge'" in text and 'the first of 5: {"response": "r0"' in text


def test_a_function_that_hangs_is_killed_and_the_sample_named(manager: Make):
    source = "import time\ndef f(row):\n    if row['level'] == 2: time.sleep(600)\n    return 0\n"
    rewards = manager(source, reward_type="sequential", timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"more than 0\.5 s .*raise worker\.reward\.timeout_s"
    ) as e:
        rewards.score(ROWS)
    assert time.monotonic() - started < 5
    assert 'the sample: {"response": "r2"' in str(e.value)
    with pytest.raises(RuntimeError, match="closed"):
        rewards.score(ROWS)


def test_the_time_limit_is_for_the_batch_and_not_for_each_sample(manager: Make):
    source = "import time\ndef f(row): time.sleep(0.2); return 0\n"
    text = failure(lambda: manager(source, reward_type="sequential", timeout_s=0.5))
    assert "took more than 0.5 s for 5 samples" in text


@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(3)"])
def test_a_function_that_ends_its_process_is_reported_with_the_sample(manager: Make, end: str):
    source = f"import os, sys\ndef f(row):\n    if row['level'] == 4: {end}\n    return 0\n"
    text = failure(lambda: manager(source, reward_type="sequential", num_cpus=2))
    assert "ended its process (exit code 3)" in text
    assert 'the sample: {"response": "r4"' in text


def test_a_process_that_was_killed_between_two_steps_is_noticed(manager: Make):
    rewards = manager("import os\ndef f(rows): return [os.getpid()] * len(rows)")
    pid = int(rewards.score(ROWS)[0]["overall"])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RewardError, match=r"ended its process \(exit code -9\)"):
        rewards.score(ROWS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def g(rows): return []", r"has no function 'f'; it has ['g']"),
        ("raise SystemExit(9)", "ended its process (exit code 9)"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused_at_the_start(
    manager: Make, source: str, words: str
):
    with pytest.raises(RewardError) as caught:
        manager(source)
    assert words in str(caught.value)
    assert "reward.py:f" in caught.value.user_message


def test_a_file_named_like_a_standard_module_does_not_hide_it(tmp_path: Path):
    path = tmp_path / "math.py"
    path.write_text("import math\ndef f(row): return math.pi")
    config = RewardConfig(reward_function=f"{path}:f", reward_type="sequential")
    with RewardManager(config) as rewards:
        assert rewards.score(ROWS[:1])[0]["overall"] > 3


def test_no_process_is_left_when_the_block_ends(manager: Make):
    source = "import os\ndef f(rows): return [os.getpid()] * len(rows)"
    with manager(source, num_cpus=2) as rewards:
        pids = {int(s["overall"]) for s in rewards.score(ROWS)}
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def test_no_process_is_left_when_the_driver_is_killed_in_the_middle(tmp_path: Path):
    (tmp_path / "reward.py").write_text(
        "import os, time\ndef f(rows):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
    )
    driver = (
        "from verl.config import RewardConfig\n"
        "from verl.workers.reward import RewardManager\n"
        f"RewardManager(RewardConfig(reward_function='{tmp_path}/reward.py:f')).score([{{}}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert alive(child)
        process.kill()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    """False also for a process that has ended and waits for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
