"""Which attention kernel runs, and attention by the package `flash-attn`.

The package's call follows the signature of its releases 2.7 and 2.8 and is tested against a
stand-in with that signature; it has not been run with the real package.
Letters: N heads, K key-value heads, S packed tokens, D head dim, Q queries and W keys of all
sequences of a row, one after the other.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.varlen import Varlen

PACKAGE = "flash_attn"
EXTRA = "pip install 'long-rl[flash-attn]'"
LEAST_CAPABILITY = (8, 0)
"""Of a GPU that FlashAttention runs on, torch's own and the package's alike: Ampere and later."""
NEWER = {"flash3": ("FA3", "flash_attn_interface"), "flash4": ("FA4", "flash_attn.cute")}
"""FlashAttention 3 and 4: the name by which torch knows each, and the module that it takes."""
FITTING = {"flash4": "flash-attn-4==4.0.0b15 nvidia-cutlass-dsl==4.4.2 quack-kernels==0.4.0"}
"""Packages seen to work with torch 2.11 on an H100; later releases of the first two did not."""
FASTER_CUDNN = (9, 0)
"""Compute capability from which cuDNN's attention is faster than FlashAttention 2: Hopper."""


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


def kernel_of(attn_implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that `model.attn_implementation` means on a device: its name, auto resolved.

    `auto` takes cuDNN from Hopper on, else torch's FlashAttention where it can run: both read a
    shared prompt once, and the package would repeat its keys for every response. Raises ValueError
    for a kernel that was asked for by name and cannot run.
    """
    if attn_implementation == "sdpa":
        return "sdpa"
    obstacle = _obstacle(device, dtype)
    setting = f"model.attn_implementation={attn_implementation}"
    if attn_implementation != "auto" and obstacle:
        raise ValueError(f"{setting} needs {obstacle}; use auto or sdpa")
    if attn_implementation == PACKAGE and importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"{setting} needs the package flash-attn; run `{EXTRA}`, or use auto")
    if obstacle:
        return "sdpa"
    if attn_implementation in NEWER:
        _activate(attn_implementation)
        return "flash"
    if attn_implementation != "auto":
        return attn_implementation
    is_hopper = torch.cuda.get_device_capability(device) >= FASTER_CUDNN
    return "cudnn" if is_hopper and torch.backends.cudnn.is_available() else "flash"


def _activate(name: str) -> None:
    """Puts newer kernels in the place of torch's FlashAttention operators, in this process.

    Through torch's registration, which takes them from their packages. Raises ValueError where that
    fails, with the reason.
    """
    known_as, module = NEWER[name]
    try:
        activate_flash_attention_impl(known_as)
    except Exception as error:  # Whatever a package raises when it is imported or does not fit.
        fitting = f" ({FITTING[name]} fit torch 2.11)" if name in FITTING else ""
        raise ValueError(
            f"model.attn_implementation={name}: torch {torch.__version__} could not take "
            f"{known_as} from the module {module} ({type(error).__name__}: {error}); install a "
            f"package that fits{fitting}, or use auto"
        ) from error


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
    """Attention of a whole packed row in one call, each segment behind what it continues.

    A segment is a sequence whose keys are those that it continues, repeated for it, and its own.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        queries, keys = [], []
        for i, (start, end) in enumerate(layout.spans):
            if start < end:
                own = torch.arange(start, end)
                before = [torch.arange(*layout.spans[j]) for j in layout.ancestors(i)]
                queries.append(own)
                keys.append(torch.cat([*before, own]))
        self._queries, self._keys = (torch.cat(x).to(device) for x in (queries, keys))
        self._seqs = Varlen.of([len(q) for q in queries], [len(k) for k in keys], device)

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        """Attention output in the order of the row, (S, N, D)."""
        q_QND = q_NSD.transpose(0, 1)[self._queries]
        k_WKD, v_WKD = (x.transpose(0, 1)[self._keys] for x in (k_KSD, v_KSD))
        out_QND = package_varlen(q_QND, k_WKD, v_WKD, self._seqs, scale)
        return torch.empty_like(out_QND).index_copy(0, self._queries, out_QND)
