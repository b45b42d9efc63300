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
class RequestMedia:
    """Geometry and name of a piece of media in a prompt."""

    kind: Literal["image", "video"]
    grid_thw: tuple[int, int, int]
    """Patches in time, height and width."""
    seconds_per_grid: float
    """Seconds that one step in time stands for; 0 for an image."""
    n_tokens: int
    name: str
    """Of its features, encoder included: until weights are loaded anew, equal names mean equal
    features."""


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
    media: tuple[RequestMedia, ...] = ()
    """What `features` are of, in order."""
    name: str = ""
    """Of the prompt, for messages."""


@dataclass(frozen=True)
class RolloutOutput:
    """One sampled response."""

    token_ids: Tensor
    """(R,), the stop word included."""
    log_probs: Tensor
    """(R,) under softmax(logits / temperature) without media words; before top-p and top-k with
    `hf`, after them with `vllm`."""
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

    def waves(
        self, prompt_lens: Sequence[int], n_samples: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """Numbers of the prompts that are worked on together; every prompt is in exactly one."""
        ...

    def sleep(self) -> None:
        """Frees device memory. Weights may be lost: `load_weights` comes before `generate`."""
        ...

    def asleep_bytes(self) -> int:
        """Of device memory that was given back, which torch counts as allocated all the same."""
        ...

    def start_up_seconds(self) -> dict[str, float]:
        """How long the parts of starting the engine took, by name."""
        ...


def sample_seed(run_seed: int, step: int, uid: str, sample: int) -> int:
    """Seed of one sample: it depends on what is sampled, never on where the work runs."""
    text = f"{run_seed}/{step}/{uid}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
