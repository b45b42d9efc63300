"""The head of a safetensors file, for writers that put it into a file that is already open.

The library's own writer makes a file of its own beside the target and renames it, so that a store
could neither lock nor flush it. No torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

_ALIGNMENT = 64


def encode_head(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """What stands before the tensors' bytes, which follow in the order given without gaps.

    A tensor is (type as the format calls it, shape, bytes).
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, n_bytes) in tensors.items():
        offsets = [end, end + n_bytes]
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += n_bytes
    encoded = json.dumps(head).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded
