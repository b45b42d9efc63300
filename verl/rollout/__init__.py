"""Rollout engines behind one protocol. Letters: P prompt tokens, M visual tokens, E hidden size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps all words."""
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Go on after a stop word, up to `max_tokens`; for benchmarks."""


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt and the seeds of the samples wanted from it."""

    prompt_ids: Tensor
    """(P,) with visual placeholders expanded."""
    positions: Tensor
    """(3, P)."""
    features: Tensor | None
    """(M, E) stored embeddings of the prompt's media, in order."""
    seeds: tuple[int, ...]
    """One 63-bit seed a sample; equal seeds give equal samples whatever else is in the batch."""


@dataclass(frozen=True)
class RolloutOutput:
    """One sampled response."""

    token_ids: Tensor
    """(R,), the stop word included."""
    log_probs: Tensor
    """(R,) under softmax(logits / temperature) without media words, before top-p and top-k."""
    finish_reason: Literal["stop", "length"]


class Rollout(Protocol):
    """A rollout engine: takes weights, gives samples."""

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights by transformers' names; iterates to the end."""
        ...

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> list[list[RolloutOutput]]:
        """Samples of each request, in the order of its seeds."""
        ...

    def sleep(self) -> None:
        """Frees device memory until `wake`."""
        ...

    def wake(self) -> None:
        """Makes the engine ready to generate."""
        ...


def sample_seed(run_seed: int, step: int, uid: str, sample: int) -> int:
    """Seed of one sample: it depends on what is sampled, never on where the work runs."""
    text = f"{run_seed}/{step}/{uid}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
