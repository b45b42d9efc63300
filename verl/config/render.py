"""A configuration as a dict, YAML text, help text or fingerprint, and what differs between two."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

import yaml

from verl.config.coerce import Mismatch, Scalar, untyped
from verl.config.interpolate import SECRET
from verl.config.schema import describe, field_docs, sections, settings, value_of

REDACTED = "(redacted)"

NEUTRAL: tuple[str, ...] = (
    # Names and places of outputs.
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.logger",
    "trainer.save_*",
    "trainer.load_checkpoint_path",
    "trainer.find_last_checkpoint",
    "trainer.output_dir",
    # Validation reads the model and changes nothing.
    "trainer.val_*",
    "data.val_files",
    "data.val_batch_size",
    "worker.rollout.val_override_config",
    # Where and how fast it is computed: equal up to rounding.
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.device",
    "data.num_workers",
    "data.prefetch_gib",
    "data.cache_*",
    "data.decode_*",
    "data.media_fingerprint",
    "data.max_bad_fraction",
    "worker.actor.micro_batch_size_per_device_*",
    "worker.actor.padding_free",
    "worker.actor.shared_prefix",
    "*ulysses_size",
    "worker.actor.max_tokens_per_device",
    "worker.actor.old_log_probs",
    "worker.actor.zero_advantage_groups",
    "algorithm.reference_log_probs",
    "worker.rollout.tensor_parallel_size",
    "worker.rollout.gpu_memory_utilization",
    "worker.rollout.max_num_seqs",
    "worker.rollout.max_model_len",
    "worker.rollout.enforce_eager",
    "worker.rollout.enable_chunked_prefill",
    "worker.rollout.limit_images",
    "batch.max_tokens_per_micro_batch",
    "batch.packing",
    "*enable_gradient_checkpointing",
    "*attn_implementation",
    "*keep_attention",
    "*mlp_tile_tokens",
    "*trim_last_layer",
    "*compile_pointwise",
    "*compile_vision_tower",
    "*fsdp.enable_full_shard",
    "*offload.offload_*",
    "*rollout.max_num_batched_tokens",
    "*rollout.num_chunk_seq",
    "*cached_embeds_dir",
    "worker.reward.num_cpus",
    "worker.reward.timeout_s",
)
"""Settings that do not change what is learned; a root may have its own list, named the same."""


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain values of every setting. Secrets inside free-form mappings are redacted."""
    tree: dict[str, Any] = {}
    for key in settings(type(cfg)):
        *parents, last = key.split(".")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = _plain(value_of(cfg, key))
    return tree


def to_yaml(cfg: Any) -> str:
    """YAML text that `config=FILE` reads back to an equal configuration (secrets excepted)."""
    return yaml.dump(to_dict(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{dotted key: value}`; empty mappings stay values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def fingerprint(cfg: Any, ignore: Sequence[str] | None = None) -> str:
    """sha256 (hex) over the settings that change results.

    `ignore` holds key patterns (`*`) that are left out; by default those of NEUTRAL.
    """
    patterns = getattr(cfg, "NEUTRAL", NEUTRAL) if ignore is None else ignore
    kept = {
        key: _plain(value_of(cfg, key))
        for key in settings(type(cfg))
        if not any(fnmatchcase(key, pattern) for pattern in patterns)
    }
    text = json.dumps(kept, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each difference between two `to_dict`s; None when absent."""
    a, b = flatten(old), flatten(new)
    keys = [*a, *(key for key in b if key not in a)]
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def sizes_text(cfg: Any) -> str:
    """The derived batch sizes as aligned lines: what, how many, and how they follow.

    None is a size that only the data tell.
    """
    sizes = cfg.derived()
    docs = field_docs(type(sizes))
    counts = {f.name: getattr(sizes, f.name) for f in fields(sizes)}
    rows = [
        (name.replace("_", " "), "unknown" if count is None else count, docs[name])
        for name, count in counts.items()
    ]
    wide = max(len(label) for label, _, _ in rows)
    long = max(len(str(count)) for _, count, _ in rows)
    return "\n".join(f"{label:<{wide}}  {count:>{long}}  = {how}" for label, count, how in rows)


def resolved_text(cfg: Any) -> str:
    """What `--print-config` shows: a YAML file, with the derived sizes as comments at its end."""
    sizes = "".join(f"#   {line}\n" for line in sizes_text(cfg).splitlines())
    return f"{to_yaml(cfg)}\n# Derived sizes\n{sizes}"


def help_text(root: type, prog: str) -> str:
    """Every key with type, default and docstring."""
    lines = [
        f"usage: {prog} [config=FILE] [key=value | --key=value | --key value ...]",
        "",
        (root.__doc__ or "").strip(),
        "",
        "  config=FILE     YAML file with the keys below; arguments win over it",
        "  --print-config  print the resolved configuration and the derived batch sizes, and stop",
        "  --help          print this, and stop",
    ]
    section = None
    for key, setting in settings(root).items():
        head = key.rpartition(".")[0]
        if head != section:
            section = head
            title = f"{head}: {sections(root)[head]}" if head else ""
            lines += ["", title] if title else [""]
        lines.append(
            f"  {key}  ({describe(setting.type)}, default {default_text(setting.default)})"
        )
        lines.append(f"      {setting.doc}")
    return "\n".join(lines) + "\n"


def default_text(value: Any) -> str:
    """A default the way it would be typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(default_text(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:g}" if value else "0.0"
    return '""' if value == "" else str(value)


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if name and isinstance(value, str) and SECRET.search(name):
        return REDACTED
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else, and numbers stay short."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    escaped = text.replace("${", "\\${")
    try:
        ambiguous = untyped(Scalar(escaped)) != escaped
    except Mismatch:
        ambiguous = True
    style = '"' if ambiguous else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style=style)


def _number(dumper: yaml.SafeDumper, number: float) -> yaml.Node:
    # YAML 1.1 needs a dot in a float: `1e-06` would be text to other readers of the file.
    text = re.sub(r"^(-?\d+)e([+-])0*(\d)", r"\1.0e\2\3", repr(number))
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)
