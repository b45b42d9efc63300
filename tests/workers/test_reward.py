import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from verl.config import RewardConfig
from verl.workers.reward import RewardError, RewardManager
from verl.workers.reward_process import RewardCall, load_function

EXAMPLES = Path(__file__).parents[2] / "examples" / "reward_function"
DOCS = Path(__file__).parents[2] / "docs"


def sample(i: int, response: str = "<answer>A</answer>") -> dict[str, Any]:
    return {
        "uid": f"row-{i}", "response": response, "response_length": 5, "ground_truth": "A",
        "question": "Which?", "problem_type": "order", "options": ["red", "blue"],
        "finish_reason": "stop", "number": i,
    }  # fmt: skip


ROWS = [sample(i) for i in range(7)]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[..., RewardManager]]:
    """Makes managers of functions given as source text, and checks that nothing is left of them."""
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    made: list[RewardManager] = []

    def make(source: str, **settings: Any) -> RewardManager:
        file = tmp_path / "my_reward.py"
        file.write_text(textwrap.dedent(source))
        config = RewardConfig(reward_function=f"{file}:score", **settings)
        made.append(RewardManager(config))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def failure(manager: RewardManager, rows: list[dict[str, Any]] = ROWS) -> str:
    with pytest.raises(RewardError) as caught:
        manager.score(rows)
    assert caught.value.user_message == str(caught.value)
    return str(caught.value)


BATCH = """
    def score(samples):
        return [{"overall": s["number"] / 2, "accuracy": 1} for s in samples]
"""
SEQUENTIAL = """
    def score(sample):
        return {"overall": sample["number"] / 2, "accuracy": 1}
"""


@pytest.mark.parametrize(
    ("kind", "source", "num_cpus"),
    [("batch", BATCH, 1), ("sequential", SEQUENTIAL, 1), ("sequential", SEQUENTIAL, 3)],
)
def test_scores_come_in_the_order_of_samples(manager, kind: str, source: str, num_cpus: int):
    with manager(source, reward_type=kind, num_cpus=num_cpus) as reward:
        for rows in (ROWS, ROWS[:1], [], ROWS[::-1]):  # also fewer samples than processes
            expected = [{"overall": r["number"] / 2, "accuracy": 1.0} for r in rows]
            assert reward.score(rows) == expected


def test_a_batch_function_sees_all_samples_together(manager):
    source = """
        def score(samples):
            best = max(s["number"] for s in samples)
            return [float(s["number"] == best) for s in samples]
    """
    with manager(source, reward_type="batch") as reward:
        assert [s["overall"] for s in reward.score(ROWS)] == [0.0] * 6 + [1.0]


def test_processes_work_at_the_same_time_each_on_a_contiguous_share(manager):
    source = """
        import os, time
        def score(sample):
            time.sleep(0.02 if sample["number"] < 100 else 0)
            return {"overall": 0.0, "process": os.getpid()}
    """
    rows = [sample(i) for i in range(20)] + [sample(100 + i) for i in range(3000)]
    with manager(source, reward_type="sequential", num_cpus=2) as reward:
        scores = reward.score(rows)
        assert len({s["process"] for s in scores}) == 2
    changes = sum(a["process"] != b["process"] for a, b in pairwise(scores))
    assert changes == 1


def test_keywords_numbers_of_numpy_and_bare_numbers_are_taken(manager):
    source = """
        import numpy
        def score(samples, scale, *, offset=0.0):
            return (numpy.float32(scale), offset, *[1] * (len(samples) - 2))
    """
    with manager(source, reward_function_kwargs={"scale": 0.5, "offset": 2}) as reward:
        assert [s["overall"] for s in reward.score(ROWS)] == [0.5, 2.0, 1, 1, 1, 1, 1]


def test_the_process_has_neither_torch_nor_the_modules_of_the_main_script(manager):
    source = """
        import sys
        def score(sample):
            return {"overall": 0, **{m: int(m in sys.modules) for m in ("torch", "ray", "pytest")}}
    """
    with manager(source, reward_type="sequential") as reward:
        assert reward.score(ROWS[:1]) == [{"overall": 0, "torch": 0, "ray": 0, "pytest": 0}]


def test_a_file_named_like_a_standard_module_does_not_hide_it(tmp_path: Path):
    file = tmp_path / "math.py"
    file.write_text("import math\ndef score(sample): return math.pi\n")
    config = RewardConfig(reward_function=f"{file}:score", reward_type="sequential")
    with RewardManager(config) as reward:
        assert reward.score(ROWS[:1])[0]["overall"] > 3


def test_a_function_may_start_processes_and_they_end_with_it(manager):
    source = """
        import subprocess
        def score(samples):
            child = subprocess.Popen(["sleep", "600"])
            return [float(child.pid)] * len(samples)
    """
    reward = manager(source)
    pid = int(reward.score(ROWS[:1])[0]["overall"])
    assert psutil.pid_exists(pid)
    reward.close()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- failures ------------------------------------------------------------------------------------

RETURNS = [
    ("float('nan')", "nan is not finite"),
    ("float('inf')", "inf is not finite"),
    ("-float('inf')", "-inf is not finite"),
    ("10 ** 400", "is not finite"),
    ("True", "True is a bool and not a number"),
    ("'0.5'", "'0.5' is a str and not a number"),
    ("None", "None is a NoneType and not a number"),
    ("[1.0]", r"\[1.0\] is a list and not a number"),
    ("{'overall': 1.0, 'format': None}", "None is a NoneType"),
    ("{'accuracy': 1.0}", "which has no 'overall'"),
    ("{}", "which has no 'overall'"),
]
BAD_ROW = """
    def score(sample{s}):
        good = {{"overall": 1.0, "format": 1.0}}
        bad = lambda: {value}
        return {result}
"""


@pytest.mark.parametrize(("value", "words"), RETURNS)
def test_what_is_no_finite_number_stops_the_run_with_its_sample(manager, value: str, words: str):
    one = "bad() if sample['number'] == 4 else good"
    reward = manager(BAD_ROW.format(s="", value=value, result=one), reward_type="sequential")
    message = failure(reward)
    assert re.search(words, message), message
    assert "my_reward.py:score returned" in message
    assert "row-4" in message and "row-3" not in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("return [1.0] * 2 + [float('nan')] * 5", r"nan is not finite\nthe sample: .*row-2"),
        ("return [1.0] * 6", "returned 6 scores for 7 samples\nthe first of 7 samples: .*row-0"),
        ("return [1.0] * 8", "returned 8 scores for 7 samples"),
        ("return 'ok'", "returned a str for 7 samples, not a list"),
        ("return {'overall': [1.0] * 7}", "returned a dict for 7 samples, not a list"),
        ("return None", "returned a NoneType for 7 samples"),
        ("return (1.0 for s in samples)", "returned a generator for 7 samples"),
        (
            "return [{'overall': 1, 'a': 1}] * 3 + [{'overall': 1}] * 4",
            r"returned the parts \['overall'\] for one sample .*\nthe sample: .*row-3",
        ),
        (
            "return samples[2]['missing']",
            r"raised:\n(.|\n)*my_reward.py\", line 3(.|\n)*KeyError: 'missing'"
            r"\nthe first of 7 samples: .*row-0",
        ),
    ],
)
def test_a_batch_function_that_fails_stops_the_run(manager, source: str, words: str):
    message = failure(manager(f"\ndef score(samples):\n    {source}\n"))
    assert re.search(words, message), message
    assert "my_reward.py:score " in message
    assert "reward_process.py" not in message


def test_a_function_that_raises_is_shown_with_its_line_and_sample(manager):
    source = """
        def parse(text):
            raise ValueError(f"cannot read {text}")
        def score(sample):
            return parse(sample["uid"]) if sample["number"] == 5 else 1.0
    """
    message = failure(manager(source, reward_type="sequential", num_cpus=2))
    assert "ValueError: cannot read row-5" in message and '"uid": "row-5"' in message
    assert "my_reward.py" in message and 'raise ValueError(f"cannot read {text}")' in message


@pytest.mark.parametrize(
    ("kind", "words"),
    [("batch", "the first of 7 samples: "), ("sequential", "the sample: .*row-3")],
)
@pytest.mark.parametrize("hang", ["time.sleep(600)", "re.match('(a+)+$', 'a' * 60 + 'b')"])
def test_a_function_that_hangs_is_stopped_in_time(manager, kind: str, words: str, hang: str):
    source = f"""
        import re, time
        def score(samples):
            if samples if isinstance(samples, list) else samples["number"] == 3:
                {hang}
            return 1.0
    """
    reward = manager(source, reward_type=kind, timeout_s=0.3)
    start = time.monotonic()
    message = failure(reward)
    assert time.monotonic() - start < 3
    assert "my_reward.py:score took more than worker.reward.timeout_s=0.3" in message
    assert re.search(words, message), message


def test_a_sequential_function_has_the_time_limit_for_each_sample(manager):
    source = """
        import time
        def score(sample):
            time.sleep(600 if sample["number"] == 99 else 0.1)
            return 1.0
    """
    reward = manager(source, reward_type="sequential", timeout_s=0.6, num_cpus=2)
    assert len(reward.score(ROWS * 3)) == 21  # a second for each process
    # The other process reports its samples in time for 2 s; that must not hide the one that hangs.
    start = time.monotonic()
    message = failure(reward, [*ROWS[:2], sample(99), *[sample(0)] * 17, *[sample(1)] * 20])
    assert time.monotonic() - start < 1.8
    assert "took more than worker.reward.timeout_s=0.6 for a sample; raise it" in message
    assert '"uid": "row-99"' in message


def test_a_batch_function_has_the_time_limit_for_the_whole_batch(manager):
    source = """
        import time
        def score(samples):
            for _ in samples:
                time.sleep(0.05)
            return [1.0] * len(samples)
    """
    reward = manager(source, timeout_s=1.0)
    assert len(reward.score(ROWS[:2])) == 2
    message = failure(reward, ROWS * 4)
    assert "took more than worker.reward.timeout_s=1 for a batch; raise it" in message


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("os._exit(3)", "exit code 3"),
        ("sys.exit(4)", "exit code 4"),
        ("os.kill(os.getpid(), 9)", "SIGKILL, out of memory?"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
)
def test_a_process_that_ends_is_told_with_its_sample(manager, way: str, words: str):
    source = f"""
        import os, sys
        def score(sample):
            if sample["number"] == 6:
                {way}
            return 1.0
    """
    message = failure(manager(source, reward_type="sequential", num_cpus=2))
    assert f"my_reward.py:score ended its process while scoring ({words})" in message
    assert "row-6" in message


def test_a_process_that_ends_between_batches_is_noticed(manager):
    source = """
        import os, threading
        def score(samples):
            threading.Timer(0.05, os._exit, args=(5,)).start()
            return [1.0] * len(samples)
    """
    reward = manager(source)
    reward.score(ROWS)
    time.sleep(0.3)
    assert "ended its process while scoring (exit code 5)" in failure(reward)


def test_after_a_failure_the_manager_is_closed(manager):
    reward = manager("def score(samples):\n    return None\n")
    failure(reward)
    assert "is closed" in failure(reward)


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("def scores(samples): pass", {}, r"has no function 'score'; it has \['scores'\]"),
        ("score = 3", {}, "has no function 'score'"),
        ("import not_there", {}, "No module named 'not_there'"),
        ("def score(samples) pass", {}, "SyntaxError"),
        ("raise SystemExit(7)", {}, r"ended its process while loading \(exit code 7\)"),
        ("def score(): pass", {}, r"score\(\) cannot be called with the samples"),
        (
            "def score(samples, weight=1): pass",
            {"reward_function_kwargs": {"wieght": 2}},
            r"kwargs=\{'wieght': 2\}: got an unexpected keyword argument 'wieght'",
        ),
    ],
)
def test_a_function_that_cannot_be_used_fails_before_the_first_sample(
    manager, source: str, settings: dict[str, Any], words: str
):
    with pytest.raises(RewardError, match=words) as caught:
        manager(source, **settings)
    assert "worker.reward.reward_function=" in str(caught.value)
    assert "my_reward.py:score" in str(caught.value)


def test_a_file_that_is_missing_is_named():
    with pytest.raises(RewardError, match=r"reward_function=/nowhere/r.py:score cannot be read"):
        RewardManager(RewardConfig(reward_function="/nowhere/r.py:score"))


def test_a_long_sample_is_shortened_in_the_message(manager):
    message = failure(manager("def score(s): return None"), [sample(0, "x" * 100_000)])
    assert len(message) < 5000 and "row-0" in message and "finish_reason" in message


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path):
    file = tmp_path / "hang.py"
    file.write_text("import time\ndef score(samples):\n    time.sleep(600)\n")
    # No `if __name__ == "__main__"`: starting processes must not run the caller's script again.
    script = tmp_path / "driver.py"
    script.write_text(f"""
from verl.config import RewardConfig
from verl.workers.reward import RewardManager
config = RewardConfig(reward_function="{file}:score", reward_type="sequential", num_cpus=2)
reward = RewardManager(config)
print(*[child._process.pid for child in reward._children], flush=True)
reward.score([{{}}, {{}}])
""")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])}
    driver = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert driver.stdout is not None
    children = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(children) == 2 and all(psutil.pid_exists(pid) for pid in children)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the functions that come with the project ----------------------------------------------------


def example(name: str) -> Any:
    return sys.modules[load_function(
        RewardCall(str(EXAMPLES / f"{name}.py"), "compute_score", "batch", {})
    ).__module__]  # fmt: skip


def r1v(response: str, gold: str = "B", **columns: Any) -> dict[str, float]:
    row = sample(0, response) | {"ground_truth": gold} | columns
    return example("r1v").compute_score([row])[0]


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("<think>It is B.</think> <answer>B</answer>", 1, 1),
        ("<think>A then B</think>\n<answer>\nB. blue\n</answer>\n", 1, 1),
        ("<think>It is B.</think> <answer>A</answer>", 0, 1),
        ("<answer>B</answer>", 1, 0),
        ("<think></think><answer>B</answer>", 1, 0),
        ("<think> \n </think> <answer>B</answer>", 1, 0),
        ("<think>It is B.</think> <answer> \n </answer>", 0, 0),
        ("<think>x</think> so <answer>B</answer>", 1, 0),
        ("<think>x</think><answer>A</answer><answer>B</answer>", 1, 0),
        ("<think>x</think><think>y</think><answer>B</answer>", 1, 0),
        ("<think>The answer is <answer>B</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_r1v_weighs_the_answer_and_the_form(response: str, accuracy: float, form: float):
    scores = r1v(response)
    assert scores == pytest.approx(
        {"overall": 0.9 * accuracy + 0.1 * form, "accuracy": accuracy, "format": form}
    )


@pytest.mark.parametrize(
    ("given", "gold", "accuracy"),
    [
        ("42.0", "42", 1), ("\\frac{1}{2}", "0.5", 1), ("1 + x^2", "x^2+1", 1),
        ("the dog", "dog", 1),
        ("there are 4 cats and 3 dogs", "3", 0), ("3 of them", "the man in row 3", 0),
        ("9^{9^{9^{9}}}", "3", 0), ("a red car", "a blue car", 0),
    ],
)  # fmt: skip
def test_r1v_compares_open_answers_by_text_and_formulas_by_value(given, gold, accuracy):
    assert (
        r1v(f"<think>x</think><answer>{given}</answer>", gold, options=[])["accuracy"] == accuracy
    )


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("<think>x</think> It is \\boxed{\\frac{1}{2}}.", 1, 1),
        ("<think>x</think> It is \\boxed{\\sqrt{\\frac{1}{4}}}", 1, 1),
        ("<think>x</think> \\boxed{3}, no, \\boxed{0.5}", 1, 1),
        ("It is \\boxed{0.5}", 1, 0),
        ("<think>\\boxed{0.5}</think> I do not know.", 0, 0),
        ("<think>\\boxed{0.5}", 0, 0),
        ("<think>x</think> \\boxed{9^{9^{9}}}", 0, 1),
        ("<think>x</think> \\boxed{}", 0, 0),
        ("<think> \n </think> \\boxed{0.5}", 1, 0),
    ],
)
def test_math_weighs_the_boxed_result_and_the_form(response: str, accuracy: float, form: float):
    row = sample(0, response) | {"ground_truth": "0.5"}
    scores = example("math").compute_score([row])[0]
    assert scores == pytest.approx(
        {"overall": 0.9 * accuracy + 0.1 * form, "accuracy": accuracy, "format": form}
    )


@pytest.mark.parametrize(
    "loop",
    [
        "<think>",
        "</think>\\boxed{",
        "<think>a</think><answer>",
        "<answer>a",
        "\\ab",
        "\\a",
        "1+",
        " ",
    ],
)
def test_no_response_makes_the_examples_slow(loop: str):
    rows = [
        sample(0, start + loop * (100_000 // len(loop))) | {"options": [], "ground_truth": "3"}
        for start in ("", "<think>", "<think>a</think><answer>")
    ]
    for name in ("r1v", "math"):
        start = time.process_time()
        example(name).compute_score(rows)
        # A watchdog, not a figure: quadratic work would take minutes.
        assert time.process_time() - start < 30


def test_the_format_weight_is_a_setting():
    compute_score = example("r1v").compute_score
    row = sample(0, "<think>x</think> <answer>A</answer>") | {"ground_truth": "B"}
    assert compute_score([row], format_weight=0.3)[0]["overall"] == pytest.approx(0.3)


def test_the_example_of_the_documentation_runs(manager):
    page = (DOCS / "add_a_reward.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    settings = re.search(r"reward_function_kwargs: \{(\w+): ([\d.]+)\}", page)
    assert settings
    kwargs = {settings[1]: float(settings[2])}
    with manager(source, reward_type="batch", reward_function_kwargs=kwargs) as reward:
        right = sample(0) | {"difficulty": "hard"}
        scores = reward.score([right, sample(1, "<answer>B</answer>")])
    assert [s["accuracy"] for s in scores] == [1.0, 0.0]
    assert scores[0]["overall"] > scores[1]["overall"]
