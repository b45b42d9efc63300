"""Whether a forward pass is the second one, which activation checkpointing runs in backward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_state = threading.local()


def is_recomputing() -> bool:
    """True in a checkpointed function that backward runs again."""
    return getattr(_state, "recomputing", False)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `context_fn` of `torch.utils.checkpoint.checkpoint`: the first pass, and the second."""
    return nullcontext(), _recomputing()


@contextmanager
def _recomputing() -> Iterator[None]:
    _state.recomputing = True
    try:
        yield
    finally:
        _state.recomputing = False
