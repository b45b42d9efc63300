"""Imports point down: the order of layers of docs/architecture.md, checked on the source.

Imports are read from the syntax tree, so that relative ones, those inside of functions and those
for type checkers count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: list[list[str]] = [
    [
        "verl.trainer.main",
        "verl.trainer.sft",
        "verl.evaluation",
        # An entry point at the path that users of Long-RL know.
        "verl.utils.cache_video_embeds_vila",
    ],
    ["verl.trainer"],
    ["verl.workers"],
    ["verl.single_controller"],
    ["verl.algorithms"],
    ["verl.rollout"],
    ["verl.sequence_parallel"],
    ["verl.models"],
    ["verl.data"],
    ["verl.config"],
    ["verl.protocol"],
    ["verl.utils"],
]
"""From the top down. A module belongs to the longest prefix that fits."""

APART: list[tuple[str, str, str]] = [
    ("verl.models", "verl.sequence_parallel", "attention is registered by name with transformers"),
    ("verl.protocol", "verl.utils", "both are leaves: they import nothing else of verl"),
    ("verl.algorithms", "verl.rollout", "algorithms are pure functions of tensors"),
    ("verl.algorithms", "verl.models", "algorithms are pure functions of tensors"),
    ("verl.algorithms", "verl.data", "algorithms are pure functions of tensors"),
    ("verl.single_controller", "verl.algorithms", "it places and calls workers, it knows no RL"),
    ("verl.single_controller", "verl.models", "it places and calls workers, it knows no RL"),
]
"""Layers of which neither imports the other, and why."""

ONLY: dict[str, tuple[str, ...]] = {
    "vllm": ("verl.rollout",),
    "ray": ("verl.single_controller", "verl.trainer", "verl.evaluation", "verl.utils.processes"),
    "torch.distributed": (
        "verl.sequence_parallel",
        "verl.workers",
        "verl.single_controller",
        # Checkpoints are written by all ranks; norms are taken over all shards.
        "verl.utils.safe_dcp",
        "verl.utils.shards",
        "verl.utils.torch_functional",
    ),
}
"""Packages that only these modules may use. Collectives elsewhere would hide who waits for whom."""

NEVER: dict[str, tuple[str, ...]] = {
    "verl.config": ("torch", "numpy", "transformers", "ray", "datasets", "av"),
    "verl.algorithms": ("transformers", "datasets", "av"),
    "verl.utils.answers": ("torch", "transformers"),
    "verl.utils.exits": ("torch", "transformers"),
    "verl.utils.reaper": ("torch", "psutil", "verl"),
}
"""Packages that these modules must do without: they start fast, or are pure."""


@dataclass(frozen=True)
class Use:
    """A module that another one imports, or an attribute of a package that it uses."""

    user: str
    used: str
    line: int

    def __str__(self) -> str:
        return f"{self.user} (line {self.line}) uses {self.used}"


def modules() -> dict[str, Path]:
    """Source file of every module of the package."""
    found = {}
    for path in sorted((ROOT / "verl").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def uses_in(source: str, module: str, is_package: bool = False) -> Iterator[Use]:
    """Everything that a module imports, with names in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Use(module, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(node, module, is_package)
            yield from (Use(module, f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name, first = ast.unparse(node.func), node.args[0]
            if name in ("__import__", "import_module", "importlib.import_module") and isinstance(
                first, ast.Constant
            ):
                yield Use(module, str(first.value), node.lineno)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield Use(module, "torch.distributed", node.lineno)


def _base_of(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module: str) -> int | None:
    """Number of the layer, 0 at the top; None for a module that has no place yet."""
    fits = [
        (len(prefix), number)
        for number, layer in enumerate(LAYERS)
        for prefix in layer
        if within(module, prefix)
    ]
    return max(fits)[1] if fits else None


def upward(uses: Sequence[Use]) -> list[str]:
    """Uses that break the order of layers, in words."""
    problems = []
    for use in uses:
        if not within(use.used, "verl"):
            continue
        user, used = layer_of(use.user), layer_of(use.used)
        if user is not None and used is not None and used < user:
            names = f"{LAYERS[used][0]} lies above {LAYERS[user][0]}"
            problems.append(f"{use}: {names}; pass it in, or move what is needed down")
        for a, b, why in APART:
            if any(within(use.user, x) and within(use.used, y) for x, y in ((a, b), (b, a))):
                problems.append(f"{use}: {a} and {b} stay apart, {why}")
    return problems


def outside(uses: Sequence[Use], only: Mapping[str, Sequence[str]]) -> list[str]:
    """Uses of packages that are reserved to other modules, in words."""
    return [
        f"{use}: only {', '.join(allowed)} may use {package}"
        for use in uses
        for package, allowed in only.items()
        if within(use.used, package) and not any(within(use.user, a) for a in allowed)
    ]


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return [
        use
        for module, path in modules().items()
        for use in uses_in(path.read_text(), module, is_package=path.name == "__init__.py")
    ]


def test_every_module_has_a_place_in_the_layers():
    homeless = [m for m in modules() if m != "verl" and layer_of(m) is None]
    assert not homeless, f"give these a place in LAYERS and in docs/architecture.md: {homeless}"


def test_imports_point_down(uses: list[Use]):
    problems = upward(uses)
    assert not problems, "\n".join(problems)


def test_vllm_ray_and_collectives_stay_in_their_places(uses: list[Use]):
    problems = outside(uses, ONLY)
    assert not problems, "\n".join(problems)


def test_pure_and_fast_modules_do_without_heavy_packages(uses: list[Use]):
    problems = [
        f"{use}: {module} must not import {package}"
        for use in uses
        for module, packages in NEVER.items()
        for package in packages
        if within(use.user, module) and within(use.used, package)
    ]
    assert not problems, "\n".join(problems)


def test_nothing_that_the_configuration_imports_loads_torch():
    names = [m for m in modules() if within(m, "verl.config")] + ["verl.utils.answers"]
    code = f"import {', '.join(names)}, sys; print(sorted(m for m in sys.modules if '.' not in m))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(result.stdout)) & set(NEVER["verl.config"])
    assert not loaded, f"importing verl.config and verl.utils.answers loads {sorted(loaded)}"


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("verl.data.rows", "from verl.models import loader", "verl.models lies above verl.data"),
        ("verl.data.rows", "def f():\n    import verl.trainer.main", "(line 2)"),
        ("verl.data.rows", "from ..workers import batches", "uses verl.workers.batches"),
        ("verl.data.rows", "importlib.import_module('verl.rollout')", "uses verl.rollout"),
        ("verl.trainer.build", "from .main import run", "verl.trainer.main lies above"),
        ("verl.sequence_parallel.packing", "from verl import models", "stay apart"),
        ("verl.protocol", "from verl.utils.rng import x", "both are leaves"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str, problem: str):
    problems = upward(list(uses_in(source, module)))
    assert len(problems) == 1 and problem in problems[0]


def test_downward_imports_and_those_of_the_own_layer_are_fine():
    source = (
        "import torch\nfrom verl.config import DataConfig\nfrom . import media\nimport verl.utils"
    )
    assert not upward(list(uses_in(source, "verl.data.rows")))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("verl.models.loader", "import vllm.config"),
        ("verl.algorithms.losses", "import torch.distributed as dist"),
        ("verl.models.loader", "from torch import distributed"),
        ("verl.algorithms.losses", "import torch\ntorch.distributed.all_reduce(x)"),
        ("verl.data.loader", "def f():\n    from ray import get"),
    ],
)
def test_a_reserved_package_is_found(module: str, source: str):
    problems = outside(list(uses_in(source, module)), ONLY)
    assert len(problems) == 1 and f"{module} (line" in problems[0]
