"""Hands a trainer's weights to a vLLM engine in the same process."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from verl.rollout import vllm_compat


def load_weights(llm: Any, named: Iterable[tuple[str, Tensor]], *, is_first: bool = False) -> None:
    """Loads whole tensors by transformers' names, one after another, and forgets what is stale.

    `named` is consumed inside of the engine, so that no more than a layer exists twice; with tensor
    parallelism every rank passes the same tensors in the same order, and iterating may be a
    collective. Tied weights must come under both names: vLLM holds a head of its own. Layers that
    do not come keep their weights, of which vLLM says nothing: `is_first` looks for them, and
    raises RuntimeError where a weight of the engine is not among `named`. The tower may be left
    out: the engine has none.
    """
    with vllm_compat.recorded_loading(llm) if is_first else nullcontext([]) as missing:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named)})
    if missing:
        raise RuntimeError(
            f"{len(missing)} weights of vLLM's model were not sent: {', '.join(missing[:5])}"
        )
    vllm_compat.reset_caches(llm)
