"""Attention of a group of responses that share a prompt: one layer's call, forward and backward.

    python3 benchmarks/shared_prefix.py --prompts 36000,131072,252000 --out FILE.json

Compares, on one GPU in bf16: `shared` (`verl.sequence_parallel.shared_prefix`), the same with long
segments by cuDNN, `flex` (the same by flex attention, compiled) and `replicated` (each response
with a prompt of its own; one of the group is measured and taken times the group). Errors are
against exact matrix products in float32 on a small row. A query's product with a key it sees counts
4 D FLOPs forward and 10 D backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl.sequence_parallel.flex import flex_tree_attention
from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.shared_prefix import shared_prefix_attention
from verl.sequence_parallel.tree import tree_attention

HEADS = {"3b": (16, 2), "7b": (28, 4)}
DIM = 128
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = _arguments(argv)
    if args.impl != "FA2":
        torch.nn.attention.activate_flash_attention_impl(args.impl)
    heads = HEADS[args.model]
    record: dict[str, Any] = {
        "part": "shared_prefix attention",
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "errors": _errors(heads),
        "measured": [],
    }
    lens = _lens(args.group, args.response)
    for prompt in args.prompts:
        row = Layout.of_groups([prompt], [lens])
        alone = Layout.of_groups([prompt], [lens[:1]])
        calls: dict[str, tuple[Layout, int, Call]] = {
            "shared": (row, 1, lambda *x: shared_prefix_attention(*x, prompt, lens)),  # noqa: B023
            "shared, cudnn": (row, 1, lambda *x: tree_attention(*x, row, DIM**-0.5, "cudnn")),  # noqa: B023
            "replicated, 1 measured": (
                Layout((alone.size,), (-1,)), args.group,
                lambda *x: shared_prefix_attention(*x, len(x[0]), ()),
            ),
        }  # fmt: skip
        if args.flex:
            calls["flex"] = (row, 1, lambda *x: flex_tree_attention(*x, row, DIM**-0.5))  # noqa: B023
        for name, (layout, times, call) in calls.items():
            found = _timed(call, layout, heads, args.repeats)
            seconds = times * (found["forward_s"] + found["backward_s"])
            found |= {"name": name, "prompt": prompt, "group_s": seconds}
            record["measured"].append(found)
            print(json.dumps(found), flush=True)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=HEADS, default="3b", help="whose heads")
    parser.add_argument(
        "--prompts", type=lambda t: [int(n) for n in t.split(",")], default=[36000, 131072],
        help="tokens of the prompt",
    )  # fmt: skip
    parser.add_argument("--group", type=int, default=8, help="responses")
    parser.add_argument("--response", type=int, default=1024, help="tokens of the longest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--impl", choices=("FA2", "FA3", "FA4"), default="FA2")
    parser.add_argument("--flex", action="store_true", help="compare with flex attention as well")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _lens(group: int, longest: int) -> tuple[int, ...]:
    """From half the longest to the longest, evenly."""
    return tuple(longest // 2 + longest // 2 * i // max(1, group - 1) for i in range(group))[::-1]


def _qkv(layout: Layout, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(layout.size, n, DIM, generator=g, device="cuda").to(dtype).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]


def _timed(call: Call, layout: Layout, heads: tuple[int, int], repeats: int) -> dict[str, Any]:
    qkv = _qkv(layout, heads, torch.bfloat16)
    grad = torch.randn_like(qkv[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward, backward = [], []
    for _ in range(repeats + 1):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        out = call(*qkv)
        marks[1].record()
        torch.autograd.grad(out, qkv, grad)
        marks[2].record()
        torch.cuda.synchronize()
        forward.append(marks[0].elapsed_time(marks[1]) / 1e3)
        backward.append(marks[1].elapsed_time(marks[2]) / 1e3)
    f, b = statistics.median(forward[1:]), statistics.median(backward[1:])
    work = layout.n_pairs * DIM * heads[0] / 1e12
    return {
        "forward_s": f,
        "backward_s": b,
        "forward_tflops": 4 * work / f,
        "backward_tflops": 10 * work / b,
        "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
    }


def _errors(heads: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Relative error of output and gradients of each form against float32."""
    layout = Layout.of_groups([1000], [(300, 1, 70, 129)])
    found = {}
    exact = _results(lambda *x: tree_attention(*x, layout, DIM**-0.5), layout, heads, torch.float32)
    for name, call in {
        "shared": lambda *x: tree_attention(*x, layout, DIM**-0.5, "flash"),
        "flex": lambda *x: flex_tree_attention(*x, layout, DIM**-0.5),
        "exact": lambda *x: tree_attention(*x, layout, DIM**-0.5, "exact"),
    }.items():
        results = _results(call, layout, heads, torch.bfloat16)
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]
        found[name] = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
    return found


def _results(call: Call, layout: Layout, heads: tuple[int, int], dtype: torch.dtype) -> list[Any]:
    # The same bf16 numbers in either dtype.
    qkv = [x.detach().to(dtype).requires_grad_() for x in _qkv(layout, heads, torch.bfloat16)]
    out = call(*qkv)
    g = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(out.shape, generator=g, device="cuda").bfloat16().to(dtype)
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, qkv, weight))]


if __name__ == "__main__":
    main()
