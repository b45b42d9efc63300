"""What README and guides tell to type is understood by the programs it is typed to."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/long_videos.md")
PROGRAM = re.compile(r"verl\.(trainer\.(main|sft)|evaluation\.main)")
PLACEHOLDERS = ("sft.jsonl", "rl.jsonl", "val.jsonl", "test.jsonl", "rows.jsonl")
MODELS = (
    "sft_model",
    "rl_model",
    "outputs/own/sft_model",
    "outputs/own/rl_model",
    "Qwen/Qwen2.5-VL-3B-Instruct",
)
"""Models that the commands, and the examples they name, start from."""


def commands(text: str) -> list[list[str]]:
    """Words of every command in the shell blocks of a Markdown text, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def runs() -> list[tuple[str, list[str]]]:
    """(module, arguments) of the pages' commands that start a trainer or an evaluation."""
    found = []
    for words in (w for page in PAGES for w in commands((ROOT / page).read_text("utf-8"))):
        for i, word in enumerate(words):
            if PROGRAM.fullmatch(word) and words[i - 1] == "-m":
                found.append((word, words[i + 1 :]))
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that has what the README's placeholders stand for."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("videos", "images"):
        (tmp_path / name).mkdir()
    for name in PLACEHOLDERS:
        (tmp_path / name).write_text('{"problem": "?", "answer": "A"}\n')
    for name in MODELS:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"num_attention_heads": 28}))
        (tmp_path / name / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_starts_each_program_at_least_once():
    assert {module for module, _ in runs()} == {
        "verl.trainer.main", "verl.trainer.sft", "verl.evaluation.main"
    }  # fmt: skip


@pytest.mark.parametrize(("module", "arguments"), runs(), ids=lambda value: str(value)[:60])
def test_a_command_of_the_readme_is_a_configuration_that_can_run(folder, capsys, module, arguments):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main([*arguments, "--print-config"])
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed.err
    assert "model_path: " in printed.out


def test_a_key_that_is_misspelt_in_a_command_would_be_found(folder, capsys):
    text = "```bash\npython3 -m verl.evaluation.main model_pth=rl_model \\\n  name=x # why\n```\n"
    (words,) = commands(text)
    assert words[-1] == "name=x"
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(words[2]).main([*words[3:], "--print-config"])
    assert stopped.value.code == 2 and "model_pth: unknown key" in capsys.readouterr().err
