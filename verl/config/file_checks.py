"""Files and folders that a run needs. They are looked at, never loaded: no torch, no network."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.config.problems import Problem, did_you_mean
from verl.config.weight_checks import weight_problems

if TYPE_CHECKING:
    from verl.config.data import DataConfig
    from verl.config.trainer import TrainerConfig
    from verl.config.worker import ModelConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_STEP_FOLDER = re.compile(r"global_step_\d+")


def data_file_problems(files: list[str], key: str, required: bool) -> Iterator[Problem]:
    """Each entry must be a file or folder, with or without `@split`."""
    if required and not files:
        yield Problem((key,), f"{key} is empty; set it to a json, jsonl or parquet file")
    for entry in files:
        if "://" in entry:
            yield Problem((key,), f"{key}={entry}: only local files are read; download it first")
            continue
        path, split = _split(entry)
        if not path.exists():
            text = f"{key}={entry}: there is no file or folder {path.absolute()}"
            if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
                text += "; a data set of the Hugging Face hub must be downloaded first"
            else:
                text += _beside(path)
            yield Problem((key,), text)
        elif path.is_file() and path.stat().st_size == 0:
            yield Problem((key,), f"{key}={entry}: the file {path.absolute()} is empty")
        elif path.is_dir() and not any(path.iterdir()):
            yield Problem((key,), f"{key}={entry}: the folder {path.absolute()} is empty")
        elif split == "":
            yield Problem((key,), f"{key}={entry}: the split after @ is missing; write @train")


def _split(entry: str) -> tuple[Path, str | None]:
    """`file@split` as a pair; a file whose own name holds @ stays whole."""
    path, at, split = entry.rpartition("@")
    if at and path and not Path(entry).exists():
        return Path(path), split
    return Path(entry), None


def media_dir_problems(data: DataConfig, cached_embeds_dir: str | None = None) -> Iterator[Problem]:
    """Media folders must be there, unless embeddings stand for the media."""
    if cached_embeds_dir is not None:
        return
    for key, folder in (("data.image_dir", data.image_dir), ("data.video_dir", data.video_dir)):
        if folder is not None and not Path(folder).is_dir():
            yield Problem(
                (key,),
                f"{key}={folder}: there is no folder {Path(folder).absolute()}"
                + _beside(Path(folder)),
            )


def cached_embeds_problems(folder: str | None, model: ModelConfig, at: str) -> Iterator[Problem]:
    """Embeddings made beforehand must be there, and are only right for weights that stay.

    `at` is what stands before `cached_embeds_dir`, such as `worker.actor.`.
    """
    if folder is None:
        return
    key, path = f"{at}cached_embeds_dir", Path(folder)
    if not path.is_dir():
        where = f"{key}={folder}: there is no folder {path.absolute()}{_beside(path)}; "
        yield Problem((key,), where + "make it with python3 -m verl.utils.cache_video_embeds_vila")
    elif not any(path.glob("*.safetensors")):
        inside = path / "embeds"
        better = f"did you mean {inside}?" if inside.is_dir() else (
            "make some with python3 -m verl.utils.cache_video_embeds_vila, or leave the key out"
        )  # fmt: skip
        yield Problem((key,), f"{key}={folder}: there are no embeddings in this folder; {better}")
    if not model.freeze_vision_tower:
        yield Problem(
            (key,),
            f"{key}={folder}: a tower that is trained changes at every step, and embeddings made "
            f"beforehand do not; set {at}model.freeze_vision_tower=true, or leave the key out",
        )
    if model.init == "random":
        yield Problem(
            (key,),
            f"{key}={folder}: random weights ({at}model.init=random) have no embeddings; set "
            f"{at}model.init=pretrained, or leave the key out",
        )


def format_prompt_problems(path: str | None) -> Iterator[Problem]:
    """The prompt template must be there and be valid Jinja."""
    if path is None:
        return
    key = "data.format_prompt"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        yield _unreadable(key, path, error)
        return
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment().parse(text)
    except TemplateSyntaxError as error:
        yield Problem(
            (key,), f"{key}={path}: line {error.lineno} is not valid Jinja: {error.message}"
        )
    if not text.strip():
        yield Problem((key,), f"{key}={path}: the template is empty; every prompt would be too")


def reward_function_problems(setting: str) -> Iterator[Problem]:
    """`file.py:name` must name a function that the file defines. The file is parsed, not run."""
    key = "worker.reward.reward_function"
    if not setting:
        yield Problem((key,), f"{key} is not set; write it as path/to/file.py:name")
        return
    path, colon, name = setting.rpartition(":")
    if not colon or not path or not name.isidentifier():
        yield Problem((key,), f"{key}={setting}: write it as path/to/file.py:name")
        return
    try:
        tree = ast.parse(Path(path).read_bytes(), filename=path)
    except OSError as error:
        yield _unreadable(key, setting, error, path)
        return
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        text = f"{key}={setting}: {path} is not valid Python{line}: {getattr(error, 'msg', error)}"
        yield Problem((key,), text)
        return
    functions, other_names = _defined(tree)
    if name not in functions and name not in other_names:
        listed = ", ".join(functions) if functions else "none"
        hint = f"; {did_you_mean(name, functions)}" if functions else ""
        if "did you mean" not in hint:
            hint = ""
        yield Problem(
            (key,),
            f"{key}={setting}: {path} does not define {name}; functions found: {listed}{hint}",
        )


def _defined(tree: ast.Module) -> tuple[list[str], set[str]]:
    """Functions at the top of a module, and names that may be functions (imports, aliases)."""
    functions: list[str] = []
    others: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            others.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            others.update(t.id for t in node.targets if isinstance(t, ast.Name))
    return functions, others


def model_problems(model: ModelConfig, prefix: str) -> Iterator[Problem]:
    """The model folder must hold a config and, when weights are loaded, safetensors."""
    key, path = f"{prefix}model_path", model.model_path
    if not path:
        yield Problem(
            (key,),
            f"{key} is not set; give a model folder or a hub id such as "
            "Qwen/Qwen2.5-VL-3B-Instruct",
        )
    elif not _is_hub_id(path):
        yield from _model_folder_problems(key, Path(path), model.init == "pretrained")
    if model.tokenizer_path is not None and not _is_hub_id(model.tokenizer_path):
        key, folder = f"{prefix}tokenizer_path", Path(model.tokenizer_path)
        if not folder.is_dir():
            yield Problem(
                (key,), f"{key}={folder}: there is no folder {folder.absolute()}" + _beside(folder)
            )
        elif not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            yield Problem(
                (key,),
                f"{key}={folder}: none of {', '.join(_TOKENIZER_FILES)} is in {folder.absolute()}",
            )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def _model_folder_problems(key: str, folder: Path, needs_weights: bool) -> Iterator[Problem]:
    at = f"{key}={folder}: "
    if not folder.is_dir():
        yield Problem((key,), f"{at}there is no folder {folder.absolute()}{_beside(folder)}")
        return
    config = folder / "config.json"
    if not config.is_file():
        text = f"{at}{config.absolute()} is missing; this is no model folder"
        if _STEP_FOLDER.fullmatch(folder.name) or (folder / "actor").is_dir():
            text += ". A checkpoint becomes one by `python3 scripts/model_merger.py --local_dir "
            text += f"{folder / 'actor'}`"
        yield Problem((key,), text)
        return
    try:
        _read_config(config)
    except ValueError as error:
        yield Problem((key,), f"{at}{config.absolute()} is not valid JSON: {error}")
    if needs_weights:
        yield from weight_problems(key, folder)
    if needs_weights and not any(folder.glob("*.safetensors")):
        text = f"{at}there is no *.safetensors file in {folder.absolute()}"
        if any(folder.glob("*.bin")):
            text += "; *.bin weights are not read, convert them to safetensors"
        elif key.startswith(("worker.", "model.")):
            text += f"; for random weights set {key.removesuffix('model_path')}init=random"
        yield Problem((key,), text)


def _is_hub_id(path: str) -> bool:
    """True for `org/name` that is not on disk and whose first part is no folder here."""
    return bool(_HUB_ID.fullmatch(path)) and not Path(path.split("/")[0]).exists()


def heads_of(model: ModelConfig) -> int | None:
    """Attention heads of the language model by its config.json; None when that is not at hand."""
    config = Path(model.model_path) / "config.json"
    if _is_hub_id(model.model_path):
        hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
        name = "models--" + model.model_path.replace("/", "--")
        found = sorted((hub / name / "snapshots").glob("*/config.json"))
        if not found:
            return None
        config = found[-1]
    try:
        content = _read_config(config)
    except (OSError, ValueError):
        return None
    for source in (model.override_config, content):
        for part in (source.get("text_config"), source):
            heads = part.get("num_attention_heads") if isinstance(part, dict) else None
            if isinstance(heads, int) and heads > 0:
                return heads
    return None


def _read_config(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("expected an object")
    return content


def checkpoint_problems(trainer: TrainerConfig) -> Iterator[Problem]:
    """A checkpoint that was asked for and is missing stops the run; it never starts afresh."""
    if trainer.load_checkpoint_path is None:
        return
    key, folder = "trainer.load_checkpoint_path", Path(trainer.load_checkpoint_path)
    at = f"{key}={folder}: "
    if not folder.is_dir():
        where = folder.parent if folder.parent.is_dir() else folder
        yield Problem(
            (key,),
            f"{at}there is no folder {folder.absolute()}; the run does not start "
            f"afresh instead. {_steps_in(where)}",
        )
    elif not _STEP_FOLDER.fullmatch(folder.resolve().name):
        where = folder.parent if (folder.name == "actor") else folder
        if folder.name == "actor":
            text = f"{at}give the folder above it, {folder.parent}"
        else:
            text = f"{at}this is no folder global_step_N. {_steps_in(where)}"
        yield Problem((key,), text)


def _steps_in(folder: Path) -> str:
    names = [p.name for p in folder.glob("global_step_*") if _STEP_FOLDER.fullmatch(p.name)]
    if not names:
        return "Give a folder global_step_N, or remove the key"
    names.sort(key=lambda name: int(name.rpartition("_")[2]))
    return f"In {folder} there are: {', '.join(names[-5:])}"


def output_problems(
    trainer: TrainerConfig | None, cache_dir: str | None, output: str | None = None
) -> Iterator[Problem]:
    """Folders that will be written must be possible to create and write."""
    wanted: list[tuple[str, Path]] = []
    if trainer is not None:
        wanted.append(("trainer.save_checkpoint_path", trainer.checkpoint_dir))
        if trainer.output_dir is not None:
            wanted.append(("trainer.output_dir", trainer.resolved_output_dir))
    if cache_dir is not None:
        wanted.append(("data.cache_dir", Path(cache_dir)))
    if output is not None:
        wanted.append(("output", Path(output).absolute().parent))
        if Path(output).is_dir():
            yield Problem(
                ("output",),
                f"output={output}: this is a folder; name a file in it, such"
                f" as {Path(output) / 'results.json'}",
            )
    for key, folder in wanted:
        there = folder.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            yield Problem(
                (key,),
                f"{key}={folder}: {there} is not a folder, so nothing can be "
                "written below it; choose another path",
            )
        elif not os.access(there, os.W_OK | os.X_OK):
            yield Problem(
                (key,),
                f"{key}={folder}: {there} cannot be written by this user; choose another path",
            )


def _beside(path: Path) -> str:
    """Names like the missing one in its folder, or the part of the path that is missing."""
    folder = path.absolute().parent
    if not folder.is_dir():
        while not folder.parent.is_dir():
            folder = folder.parent
        return f" (the folder {folder} is missing)"
    names = sorted(p.name for p in folder.iterdir())[:2000]
    hint = did_you_mean(path.name, names)
    return f"; {hint}" if "did you mean" in hint else ""


def _unreadable(key: str, value: str, error: Exception, path: str | None = None) -> Problem:
    target = Path(path or value)
    if isinstance(error, FileNotFoundError):
        text = f"{key}={value}: there is no file {target.absolute()}{_beside(target)}"
    elif isinstance(error, UnicodeDecodeError):
        text = f"{key}={value}: {target.absolute()} is not UTF-8 text; save it as UTF-8"
    else:
        reason = getattr(error, "strerror", None) or str(error)
        text = f"{key}={value}: {target.absolute()} cannot be read ({reason})"
    return Problem((key,), text)
