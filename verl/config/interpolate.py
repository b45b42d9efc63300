"""`${section.key}` and `${oc.env:NAME}` in values, resolved by OmegaConf. Secrets are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verl.config.coerce import Mismatch, Scalar, untyped

SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_ENV = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)")


def has_interpolation(value: Any) -> bool:
    """True when some text inside `value` holds `${`."""
    if isinstance(value, dict):
        return any(has_interpolation(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(has_interpolation(item) for item in value)
    text = value.text if isinstance(value, Scalar) else value
    return isinstance(text, str) and "${" in text


def resolve(values: Mapping[str, Any], keys: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of `keys` with interpolations filled in, and for the rest what went wrong.

    `values` holds every setting by dotted key (raw or default), so that any can be referred to.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    errors: dict[str, str] = {}
    tree: dict[str, Any] = {}
    for key, value in values.items():
        try:
            if has_interpolation(value):
                _refuse_secrets(value)
            ready = _for_omegaconf(value)
            OmegaConf.create({"value": ready})
        except (Mismatch, OmegaConfBaseException) as error:
            errors[key] = _first_line(error)
            continue
        _put(tree, key, ready)
    config = OmegaConf.create(tree)
    resolved: dict[str, Any] = {}
    for key in keys:
        if key in errors:
            continue
        try:
            found = OmegaConf.select(config, key, throw_on_missing=True)
            if OmegaConf.is_config(found):
                found = OmegaConf.to_container(found, resolve=True)
        except OmegaConfBaseException as error:
            errors[key] = _first_line(error)
        except RecursionError:
            errors[key] = "the settings refer to each other in a circle"
        else:
            resolved[key] = _text_again(found)
    return resolved, {key: text for key, text in errors.items() if key in keys}


def _refuse_secrets(value: Any) -> None:
    """A secret that is resolved here would be printed, logged and saved with the configuration."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_secrets(item)
        return
    text = value.text if isinstance(value, Scalar) else str(value)
    for name in _ENV.findall(text):
        if SECRET.search(name) or "$" in name:
            raise Mismatch(
                f"the environment variable {name.strip()} looks like a secret and would be saved "
                "with the configuration; pass its name and read it where it is used"
            )


def _for_omegaconf(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _for_omegaconf(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_omegaconf(item) for item in value]
    if isinstance(value, Scalar):
        return value.text if "${" in value.text else untyped(value)
    return value


def _text_again(value: Any) -> Any:
    """Resolved text is read by the declared type, like text that was written out."""
    return Scalar(value) if isinstance(value, str) else value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
