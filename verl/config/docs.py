"""Writes docs/configuration.md: `python3 -m verl.config.docs > docs/configuration.md`."""

from __future__ import annotations

import sys
from dataclasses import fields

from verl.config.evaluation import EvalConfig, EvalSizes
from verl.config.ppo import PPOConfig, PPOSizes
from verl.config.render import default_text
from verl.config.schema import describe, field_docs, sections, settings
from verl.config.sft import SFTConfig, SFTSizes

_INTRO = """\
# Configuration

This page is made from the dataclasses in `verl/config` by
`python3 -m verl.config.docs > docs/configuration.md`; edit the docstrings there.

Every entry point takes `config=FILE` (YAML) and then any of `a.b=c`, `--a.b=c` and `--a.b c`.
Arguments win over the file, later ones over earlier ones. `--help` lists the keys, and
`--print-config` prints the resolved file with the derived sizes as comments.

- Values are read by the declared type, not by YAML's guess: `lr: 1e-6` is a number, and `no` is
  a word where a word is expected. Lists are written as `[a, b]` or `a,b`.
- `${section.key}` refers to another setting, `${oc.env:NAME}` to an environment variable. Names
  that look like secrets (key, token, secret, password) are refused: they would be saved.
- Settings are checked before anything starts: unknown keys, types, combinations, files. All
  mistakes are reported together, with file and line or argument, and the exit code is 2.
- Data are checked before workers start: every row of the files, and whether the image and video
  files that rows name are there. Missing ones are reported together, also with exit code 2. What is
  wrong inside of a media file is found when its row comes up.
"""

_ROOTS = (
    (PPOConfig, PPOSizes, "Reinforcement learning", "python3 -m verl.trainer.main"),
    (SFTConfig, SFTSizes, "Supervised fine-tuning", "python3 -m verl.trainer.sft"),
    (EvalConfig, EvalSizes, "Evaluation", "python3 -m verl.evaluation.main"),
)


def render_docs() -> str:
    """The whole page as Markdown."""
    parts = [_INTRO]
    for root, sizes, title, command in _ROOTS:
        parts.append(f"## {title}\n\n`{command}`\n")
        parts.append(_sizes_table(sizes))
        parts.extend(_section_tables(root))
    return "\n".join(parts)


def _sizes_table(sizes: type) -> str:
    docs = field_docs(sizes)
    rows = [f"| {field.name.replace('_', ' ')} | {docs[field.name]} |" for field in fields(sizes)]
    return "\n".join(["| derived size | how it follows |", "|---|---|", *rows, ""])


def _section_tables(root: type) -> list[str]:
    tables: dict[str, list[str]] = {}
    for key, setting in settings(root).items():
        cells = (f"`{key}`", describe(setting.type), default_text(setting.default), setting.doc)
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        tables.setdefault(key.rpartition(".")[0], []).append(row)
    return [
        "\n".join(
            [
                *_heading(root, section),
                "| key | type | default | meaning |",
                "|---|---|---|---|",
                *rows,
                "",
            ]
        )
        for section, rows in tables.items()
    ]


def _heading(root: type, section: str) -> list[str]:
    if not section:
        return ["### top level", "", "Keys outside of any section.", ""]
    return [f"### {section}", "", sections(root)[section], ""]


if __name__ == "__main__":
    sys.stdout.write(render_docs())
