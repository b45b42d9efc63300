"""Variable-length FlashAttention over packed rows: torch's own, or the package `flash-attn`.

The package's call follows the signature of its releases 2.7 and 2.8 and is tested against a
stand-in with that signature; it has not been run with the real package.
Letters: N heads, K key-value heads, S packed tokens, D head dim, Q queries and W keys of all
sequences of a row, one after the other.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from verl.sequence_parallel.packing import Layout

PACKAGE = "flash_attn"
EXTRA = "pip install 'long-rl[flash-attn]'"
LEAST_CAPABILITY = (8, 0)
"""Of a GPU that FlashAttention runs on, torch's own and the package's alike: Ampere and later."""


@dataclass(frozen=True)
class Varlen:
    """Where each sequence begins among the queries and the keys.

    A sequence has at least as many keys as queries, and its last query sees its last key.
    """

    cu_queries: Tensor
    """Running sum of the numbers of queries, from 0, int32."""
    cu_keys: Tensor
    longest_query: int
    longest_key: int


class VarlenKernel(Protocol):
    """Exact causal attention within sequences of different lengths, with gradients."""

    def __call__(
        self, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, scale: float
    ) -> Tensor:
        """Attention output, (Q, N, D)."""
        ...


def torch_varlen(q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, scale: float) -> Tensor:
    """torch's built-in FlashAttention (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_QND.shape[1] // k_WKD.shape[1]
    if groups > 1:
        k_WKD, v_WKD = (x.repeat_interleave(groups, dim=1) for x in (k_WKD, v_WKD))
    out = varlen_attn(
        q_QND, k_WKD, v_WKD,
        seqs.cu_queries, seqs.cu_keys, seqs.longest_query, seqs.longest_key,
        scale=scale, window_size=(-1, 0),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def package_varlen(
    q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, scale: float
) -> Tensor:
    """`flash_attn_varlen_func` of the package `flash-attn` (CUDA, bf16 or fp16).

    It takes fewer key-value heads as they are, and aligns causality with the last key.
    """
    return importlib.import_module(PACKAGE).flash_attn_varlen_func(
        q_QND, k_WKD, v_WKD,
        cu_seqlens_q=seqs.cu_queries, cu_seqlens_k=seqs.cu_keys,
        max_seqlen_q=seqs.longest_query, max_seqlen_k=seqs.longest_key,
        softmax_scale=scale, causal=True,
    )  # fmt: skip


def flash_kernel(
    attn_implementation: str, device: torch.device, dtype: torch.dtype
) -> VarlenKernel | None:
    """The kernel that `model.attn_implementation` means on a device; None means sdpa.

    `auto` takes the package where it is installed, torch's kernel elsewhere, and sdpa where
    neither can run. Raises ValueError for a kernel that was asked for by name and cannot run.
    """
    obstacle = _obstacle(device, dtype)
    setting = f"model.attn_implementation={attn_implementation}"
    if attn_implementation in ("flash", PACKAGE) and obstacle:
        raise ValueError(f"{setting} needs {obstacle}; use auto or sdpa")
    installed = importlib.util.find_spec(PACKAGE) is not None
    if attn_implementation == PACKAGE and not installed:
        raise ValueError(f"{setting} needs the package flash-attn; run `{EXTRA}`, or use auto")
    if attn_implementation == "sdpa" or obstacle:
        return None
    takes_package = attn_implementation == PACKAGE or (attn_implementation == "auto" and installed)
    return package_varlen if takes_package else torch_varlen


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """What FlashAttention needs and lacks here, in words; empty where it runs."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA and bf16 compute, but this is {device.type} with {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        return f"a GPU of compute capability {least} or later, but this one has {found}"
    return ""


class FlashRow:
    """Attention of a whole packed row in one call: prompts by themselves, responses behind theirs.

    A response is a sequence whose keys are those of its prompt and its own.
    """

    def __init__(self, layout: Layout, device: torch.device, kernel: VarlenKernel) -> None:
        prompts, responses = layout.spans()
        queries = [torch.arange(start, end) for start, end in prompts]
        keys = list(queries)
        for start, end, group in responses:
            if end > start:
                own = torch.arange(start, end)
                queries.append(own)
                keys.append(torch.cat([torch.arange(*prompts[group]), own]))
        self._queries, self._keys = (torch.cat(x).to(device) for x in (queries, keys))
        self._seqs = Varlen(
            cu_queries=_running(queries, device),
            cu_keys=_running(keys, device),
            longest_query=max(map(len, queries)),
            longest_key=max(map(len, keys)),
        )
        self._kernel = kernel

    def __call__(self, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float) -> Tensor:
        """Attention output in the order of the row, (S, N, D)."""
        q_QND = q_NSD.transpose(0, 1)[self._queries]
        k_WKD, v_WKD = (x.transpose(0, 1)[self._keys] for x in (k_KSD, v_KSD))
        out_QND = self._kernel(q_QND, k_WKD, v_WKD, self._seqs, scale)
        return torch.empty_like(out_QND).index_copy(0, self._queries, out_QND)


def _running(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    sums = list(accumulate(map(len, pieces), initial=0))
    return torch.tensor(sums, dtype=torch.int32, device=device)
