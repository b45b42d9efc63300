"""Evaluates a Hugging Face folder: `python3 -m verl.evaluation.main model_path=DIR ...`.

Each variant changes what the model sees, or how it answers: `full` as configured, `blind` with
blank frames, `frames:K` with K frames a video, `temperature:T` sampled at that temperature.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from verl.config import EvalConfig, ModelConfig, parse_cli

if TYPE_CHECKING:
    from verl.data.media import MediaCache
    from verl.trainer.media_ledger import MediaLedger
    from verl.trainer.sampling import Sampler

logger = logging.getLogger(__name__)


def run(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Scores of every variant by name; each is also written beside `config.output`."""
    # Heavy imports wait until the configuration is known to be good.
    from verl.trainer import launch

    results = {}
    with ExitStack() as stack:
        with launch.starting():
            sampler, loaders, media = _build(config, stack)
        for variant, loader in loaders.items():
            started = time.perf_counter()
            results[variant] = _evaluate(config, variant, loader, sampler)
            results[variant]["seconds"] = time.perf_counter() - started
            _write(config, variant, results[variant])
        if config.output is not None:
            output = Path(config.output)
            media.write(output.with_name(f"media_{output.stem}.json"))
    return results


def _build(config: EvalConfig, stack: ExitStack) -> tuple[Sampler, dict[str, Any], MediaLedger]:
    """A sampler, and the questions of every variant; what has to be closed goes on `stack`."""
    from verl.models.loader import load_adapter, load_tokenizer
    from verl.single_controller.worker_group import WorkerGroup
    from verl.trainer import launch
    from verl.trainer.media_ledger import MediaLedger
    from verl.trainer.sampling import Sampler
    from verl.workers.eval_worker import EvalWorker
    from verl.workers.media_stores import media_cache

    model = ModelConfig(model_path=config.model_path, tokenizer_path=config.tokenizer_path)
    device = launch.resolve_device(config.device, config.n_gpus_per_node)
    rollout = launch.resolve_rollout(config.rollout, device, "rollout.")
    launch.check_engine(rollout, model, config.data, config.world_size, device, "rollout.")
    config = replace(config, rollout=rollout)
    tokenizer, adapter = load_tokenizer(model), load_adapter(model)
    cache = media_cache(config.data)
    loaders = {v: _questions(config, v, tokenizer, adapter, cache) for v in config.variants}
    launch.check_media(loaders.values())
    stack.enter_context(launch.ray_for(config.n_gpus_per_node, device))
    group = WorkerGroup(
        EvalWorker, config.world_size, device=device, init_kwargs={"config": config}
    )
    workers: Any = stack.enter_context(group)
    workers.init_model()
    media = MediaLedger(cache, loaders.values(), workers)
    media.skip_encoded(adapter, config.data, config.cached_embeds_dir)
    limit = config.data.max_response_length
    return Sampler(workers, tokenizer, limit, skip_special_tokens=True), loaders, media


def _questions(
    config: EvalConfig, variant: str, tokenizer: Any, adapter: Any, cache: MediaCache
) -> Any:
    """A loader of all questions with the frames that the variant shows."""
    from verl.data.dataset import PromptDataset
    from verl.trainer import launch

    data = config.data
    if variant.startswith("frames:"):
        data = replace(data, num_video_frames=int(variant.partition(":")[2]), fps=None)
    return launch.validation_loader(
        PromptDataset(data, tokenizer, adapter, files=data.val_files),
        data,
        None if variant == "blind" else cache,
    )


def _evaluate(config: EvalConfig, variant: str, loader: Any, sampler: Sampler) -> dict[str, Any]:
    from verl.protocol import DataProto
    from verl.trainer.validation import answer_report, evaluation_record
    from verl.utils.logger import progress

    shown = progress(loader, f"{config.name or 'model'} {variant}", total=len(loader))
    kind, _, value = variant.partition(":")
    rollout = config.rollout
    if kind == "temperature":
        rollout = replace(rollout, temperature=float(value))
    batches = [sampler(samples, rollout, step=0, blank=kind == "blind") for samples in shown]
    batch = DataProto.concat(batches)
    rows = answer_report(batch).rows
    return evaluation_record(config.name, rows, rollout.temperature) | {
        "variant": variant,
        "left_out": len(loader.dataset.quarantine),
        "prompt_length": fmean(len(ids) for ids in batch["prompt_ids"]),
        "rows": rows,
    }


def _write(config: EvalConfig, variant: str, result: dict[str, Any]) -> None:
    """Tells the result, and writes it where `config.output` names a file.

    The first variant goes to `<output>`, others to `<output stem>_<variant>`; answers stand beside
    it as jsonl.
    """
    where = "set output=FILE.json to keep result and answers"
    if config.output is not None:
        path = Path(config.output)
        if variant != config.variants[0]:
            path = path.with_stem(f"{path.stem}_{variant.replace(':', '')}")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in result.items() if k != "rows"}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in result["rows"])
        answers = path.with_name(f"{path.stem}_answers.jsonl")
        answers.write_text(lines, encoding="utf-8")
        where = f"result in {path}, answers in {answers}"
    logger.info(
        "%s %s: %.1f%% of %d (best constant answer %s: %.1f%%), %s",
        config.name or config.model_path, variant, 100 * result["overall"], result["n"],
        result["chance"]["answer"], 100 * result["chance"]["overall"], where,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    config = parse_cli(sys.argv[1:] if argv is None else argv, EvalConfig, "verl.evaluation.main")
    from verl.utils.logger import setup_logging

    setup_logging()
    run(config)
    return 0


if __name__ == "__main__":
    from verl.utils.processes import exit_on_error

    exit_on_error(main, resumes=False)
