"""Keeps secrets out of logs and experiment trackers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(^|[_.-])(api_?key|access_?key|private_?key|secrets?|secret_?key|passwords?|passwd|"
    r"credentials?|auth|authorization|token)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[\w-]{16,}|"
    r"AKIA[0-9A-Z]{16}|xox[baprs]-[\w-]{10,}|(?<=[Bb]earer )[\w.~+/=-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact_text(text: str) -> str:
    """The text with known forms of keys, and secrets of this process's environment, hidden."""
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return _SECRET_TEXT.sub(HIDDEN, text)


def redact(value: Any) -> Any:
    """A copy of nested settings without secrets: by name of the key, and by form of the text."""
    if isinstance(value, Mapping):
        return {
            k: HIDDEN if v and isinstance(v, str) and _SECRET_NAME.search(str(k)) else redact(v)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value
