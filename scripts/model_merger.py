#!/usr/bin/env python3
"""Turns a training checkpoint into a Hugging Face folder that transformers and vLLM load.

    python3 scripts/model_merger.py --local_dir checkpoints/PROJECT/RUN/global_step_N/actor

Needs no GPU and no torch.distributed, and about one output shard of memory. Files are compared with
the checkpoint's manifest before they are read. An upload is private unless --public is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from verl.utils.checkpoint import ASSETS
from verl.utils.logger import Progress, setup_logging
from verl.utils.manifest import (
    MANIFEST,
    CheckpointError,
    check_files,
    from_json,
    read_manifest,
    refuse,
)
from verl.utils.safe_dcp import differences, load_tensors, read_metadata, tensor_table

logger = logging.getLogger("model_merger")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def merge(
    local_dir: Path,
    output: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the Hugging Face folder and returns it; `output` defaults to `local_dir/huggingface`.

    `dtype` defaults to that of config.json, or float32 where it names none. Raises CheckpointError
    for a folder that is no checkpoint, that is damaged, or whose tensors do not fit its config.
    """
    local_dir = checkpoint_folder(local_dir)
    assets = local_dir / ASSETS
    verify(local_dir)
    model = empty_model(assets, dtype)
    metadata = read_metadata(local_dir)
    check_fit(model, metadata)
    output = output or assets
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f"{output.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        write_weights(model, local_dir, metadata, temporary, shard_bytes)
        install(temporary, assets, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def checkpoint_folder(path: Path) -> Path:
    """The folder with the shards; `global_step_N` stands for its `actor`."""
    for folder in (path, path / "actor"):
        if (folder / ".metadata").is_file() and (folder / MANIFEST).is_file():
            return folder
    if not path.exists():
        raise CheckpointError(f"--local_dir {path}: there is no such folder; {nearest(path)}")
    raise CheckpointError(
        f"--local_dir {path} is not a checkpoint: it has no .metadata and {MANIFEST}; give "
        "checkpoints/PROJECT/RUN/global_step_N/actor"
    )


def nearest(path: Path) -> str:
    """What there is in place of a folder that does not exist."""
    root = next(p for p in path.absolute().parents if p.is_dir())
    found = [p.name for p in root.glob("global_step_*") if p.name.partition("step_")[2].isdigit()]
    if not found:
        return f"{root} holds no global_step_N; give checkpoints/PROJECT/RUN/global_step_N/actor"
    steps = sorted(found, key=lambda name: int(name.rpartition("_")[2]))
    return f"there are: {', '.join(steps)}"


def verify(local_dir: Path) -> None:
    """Compares shards, and tokenizer and processor, with the manifests."""
    refuse(local_dir, check_files(local_dir, from_json(read_manifest(local_dir)["files"])))
    whole = local_dir.parent
    if not (whole / MANIFEST).is_file():
        logger.warning("%s has been moved away from its checkpoint: tokenizer unchecked", local_dir)
        return
    records = from_json(read_manifest(whole)["files"])
    ours = {name: record for name, record in records.items() if is_ours(name, local_dir)}
    refuse(whole, check_files(whole, ours))


def is_ours(name: str, local_dir: Path) -> bool:
    """Whether a file of the whole checkpoint concerns the merge.

    Left out are shards, which have been read just now, and config.json, which an earlier merge may
    have given another dtype; a wrong config is found when tensors are compared with it.
    """
    path = Path(name)
    if path.parts[0] != local_dir.name or path.name == "config.json":
        return False
    return ASSETS in path.parts or path.name == MANIFEST


def empty_model(assets: Path, dtype: torch.dtype | None) -> Any:
    """The model of the assets' config, without memory for weights."""
    import transformers
    from transformers.models.auto import modeling_auto

    if not (assets / "config.json").is_file():
        raise CheckpointError(f"{assets}/config.json is missing: copy it from the model trained")
    config = transformers.AutoConfig.from_pretrained(assets)
    names = list(getattr(config, "architectures", None) or [])
    for table in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        names += [table[config.model_type]] if config.model_type in table else []
    classes = [c for name in names if (c := getattr(transformers, str(name), None)) is not None]
    if not classes:
        raise CheckpointError(f"transformers has no model class for {config.model_type!r}")
    with torch.device("meta"):
        return classes[0]._from_config(config, dtype=dtype or config.dtype or torch.float32)


def check_fit(model: Any, metadata: Metadata) -> None:
    """Raises CheckpointError where names or shapes of the checkpoint are not those of the model."""
    tied = model.all_tied_weights_keys
    found = {
        name.removeprefix("model."): entry
        for name, entry in tensor_table(metadata).items()
        if name.startswith("model.")
    }
    wanted = {
        name: torch.empty_like(tensor, dtype=found[name][0] if name in found else None)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    if problems := differences(wanted, found):
        raise CheckpointError(
            f"the checkpoint does not fit its config.json: {'; '.join(problems[:5])}"
            f"{f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''}"
        )


def shards_of(model: Any, metadata: Metadata, shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each output file, in the model's order, at most `shard_bytes`."""
    table = tensor_table(metadata)
    shards: list[list[str]] = []
    room = 0
    for name in model.state_dict():
        if f"model.{name}" not in table:
            continue
        size = table[f"model.{name}"][1].numel() * model.dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def read_tensors(
    local_dir: Path, metadata: Metadata, names: list[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one at a time, floating ones in `dtype`."""
    table = tensor_table(metadata)
    for name in names:
        stored, shape = table[f"model.{name}"]
        tensor = torch.empty(shape, dtype=stored)
        load_tensors(local_dir, {"model": {name: tensor}}, metadata, alone=True)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_weights(
    model: Any, local_dir: Path, metadata: Metadata, target: Path, shard_bytes: int
) -> None:
    """Writes safetensors with the names that published checkpoints have, config and index.

    transformers renames on saving, so each shard goes through `save_pretrained` by itself, in a
    folder of its own, since it also deletes the shards it finds.
    """
    part = target / "part"
    shards = shards_of(model, metadata, shard_bytes)
    total = sum(tensor_table(metadata)[f"model.{n}"][1].numel() for s in shards for n in s)
    weight_map: dict[str, str] = {}
    written = size = 0
    with Progress(total, "merging parameters") as bar:
        for number, names in enumerate(shards, 1):
            state = {}
            for name, tensor in read_tensors(local_dir, metadata, names, model.dtype):
                state[name] = tensor
                bar.advance(tensor.numel())
            model.save_pretrained(part, state_dict=state, max_shard_size=2**62)
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else file
            (part / "model.safetensors").rename(target / file)
            with safe_open(target / file, "pt") as content:
                for name in list(content.keys()):
                    written += torch.Size(content.get_slice(name).get_shape()).numel()
                    weight_map[name] = file
            size += (target / file).stat().st_size
    for path in part.iterdir():
        path.rename(target / path.name)
    part.rmdir()
    if written != total:
        raise CheckpointError(
            f"{total} parameters went in and {written} came out: this family's names can only be "
            "converted as a whole; report it with the model's name"
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def install(temporary: Path, assets: Path, output: Path) -> None:
    """Moves the new files into `output` beside tokenizer and processor; config.json comes last."""
    output.mkdir(exist_ok=True)
    for old in [*output.glob("model*.safetensors"), output / INDEX]:
        old.unlink(missing_ok=True)
    kept = [p for p in assets.iterdir() if p.is_file() and p.name != "config.json"]
    kept = [p for p in kept if not p.name.startswith("model") or p.suffix == ".jinja"]
    if assets.resolve() != output.resolve():
        for path in kept:
            shutil.copyfile(path, output / path.name)
    of_model = {p.name for p in kept}
    new = [p for p in temporary.iterdir() if p.name not in of_model]
    for path in sorted(new, key=lambda p: p.name == "config.json"):
        path.replace(output / path.name)


def upload(folder: Path, repo_id: str, *, public: bool) -> str:
    """Uploads to the Hugging Face hub; returns the address.

    Raises CheckpointError when the repository exists and is public, but --public was not given.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=not public, exist_ok=True)
    if not public and not api.repo_info(repo_id).private:
        raise CheckpointError(
            f"--hf_upload_path {repo_id} exists and is public: nothing was uploaded. Give --public "
            "if that is meant, or choose another name"
        )
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--local_dir", type=Path, required=True, help="global_step_N/actor")
    parser.add_argument("--hf_upload_path", help="NAME/REPO to upload to; private by default")
    parser.add_argument("--public", action="store_true", help="make the uploaded model public")
    parser.add_argument("--output", type=Path, help="default: <local_dir>/huggingface")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: that of config.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line entry: 0, or 2 with the reason."""
    from transformers.utils import logging as transformers_logging

    arguments = parse(argv)
    setup_logging()
    transformers_logging.disable_progress_bar()  # ours counts parameters over all shards
    try:
        output = merge(arguments.local_dir, arguments.output, DTYPES.get(arguments.dtype or ""))
        print(f"merged model: {output}")
        if arguments.hf_upload_path:
            address = upload(output, arguments.hf_upload_path, public=arguments.public)
            print(f"uploaded: {address}")
    except (CheckpointError, OSError) as error:
        print(f"model_merger: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
