"""Evaluates a Hugging Face folder: `python3 -m verl.evaluation.main model_path=DIR ...`.

Each variant changes what the model sees: `full` as configured, `blind` with blank frames,
`frames:K` with K frames a video.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl.config import EvalConfig, ModelConfig, parse_cli

logger = logging.getLogger(__name__)


def run(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Scores of every variant by name; each is also written beside `config.output`."""
    # Heavy imports wait until the configuration is known to be good.
    from verl.data.dataset import PromptDataset
    from verl.models.loader import load_adapter, load_tokenizer
    from verl.single_controller.worker_group import WorkerGroup
    from verl.trainer import launch
    from verl.trainer.sampling import Sampler
    from verl.workers.eval_worker import EvalWorker

    model = ModelConfig(model_path=config.model_path, tokenizer_path=config.tokenizer_path)
    tokenizer, adapter = load_tokenizer(model), load_adapter(model)
    device = launch.resolve_device(config.device, config.n_gpus_per_node)
    results = {}
    with (
        launch.ray_for(config.n_gpus_per_node, device),
        WorkerGroup(
            EvalWorker, config.world_size, device=device, init_kwargs={"config": config}
        ) as workers,
    ):
        workers.init_model()
        for variant in config.variants:
            started = time.perf_counter()
            sampler = Sampler(
                workers,
                tokenizer,
                config.data.max_response_length,
                skip_special_tokens=True,
                blank=variant == "blind",
            )
            data = config.data
            if variant.startswith("frames:"):
                data = replace(data, num_video_frames=int(variant.partition(":")[2]), fps=None)
            dataset = PromptDataset(data, tokenizer, adapter, files=data.val_files)
            loader = launch.validation_loader(dataset, data)
            results[variant] = _evaluate(config, variant, loader, sampler)
            results[variant]["seconds"] = time.perf_counter() - started
            _write(config, variant, results[variant])
    return results


def _evaluate(config: EvalConfig, variant: str, loader: Any, sampler: Any) -> dict[str, Any]:
    from verl.protocol import DataProto
    from verl.trainer.validation import answer_report, best_constant_answer
    from verl.utils.logger import progress

    shown = progress(loader, f"{config.name or 'model'} {variant}", total=len(loader))
    batches = [sampler(samples, config.rollout, step=0) for samples in shown]
    report = answer_report(DataProto.concat(batches))
    kinds = {k.partition("/")[2]: v for k, v in report.metrics.items() if k.startswith("accuracy/")}
    answer, chance = best_constant_answer([r["answer"] for r in report.rows])
    return {
        "name": config.name,
        "variant": variant,
        "n": int(report.metrics["n"]),
        "overall": report.metrics["accuracy"],
        "by_type": kinds,
        "strict": report.metrics["strict"],
        "parse_rate": report.metrics["parse_rate"],
        "response_length": report.metrics["response_length"],
        "chance": {"answer": answer, "overall": chance},
        "temperature": config.rollout.temperature,
        "rows": report.rows,
    }


def _write(config: EvalConfig, variant: str, result: dict[str, Any]) -> None:
    """`<output>` for the first variant, `<output stem>_<variant>` for others; answers as jsonl."""
    if config.output is None:
        return
    base = Path(config.output)
    if variant != config.variants[0]:
        base = base.with_stem(f"{base.stem}_{variant.replace(':', '')}")
    base.parent.mkdir(parents=True, exist_ok=True)
    rows = result.pop("rows")
    base.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    base.with_name(f"{base.stem}_answers.jsonl").write_text(lines, encoding="utf-8")
    logger.info(
        "%s %s: %.1f%% of %d (best constant answer %s: %.1f%%), written to %s",
        config.name, variant, 100 * result["overall"], result["n"],
        result["chance"]["answer"], 100 * result["chance"]["overall"], base,
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

    exit_on_error(main)
