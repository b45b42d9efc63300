#!/usr/bin/env bash
# Three GRPO steps on a real film of ten minutes, 256 frames of it, with the quickstart's model.
#   usage: bash examples/real_film.sh [key=value ...]     keys: python3 -m verl.trainer.main --help
#   MODEL=DIR chooses the model; without it, the one that examples/quickstart.sh has fine-tuned, or
#   else the quickstart's base model.
# Big Buck Bunny, (c) copyright 2008, Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

out=outputs/real_film
# Byte code is written where it may be, so that worker processes do not compile torch again.
export PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
started=$SECONDS
.venv/bin/python examples/real_film/get_film.py "$out"

# One worker on a GPU; two processes where there is none.
workers=2
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then workers=1; fi
model=${MODEL:-outputs/quickstart/sft_model}
if [ -z "${MODEL:-}" ] && [ ! -f "$model/config.json" ]; then model=examples/quickstart/base; fi
settings=(config=examples/real_film/config.yaml trainer.n_gpus_per_node="$workers"
  worker.actor.model.model_path="$model" "$@")

echo "real_film: three GRPO steps on 20 questions with $model, $workers worker(s); about two minutes on 2 CPU cores"
rm -rf "$out/run" # each call is a new run; the film and its decoded frames are kept
.venv/bin/python -m verl.trainer.main "${settings[@]}"

echo "real_film: what was run, and what it took"
.venv/bin/python examples/real_film/summarise.py "${settings[@]}"
echo "real_film: the model is tiny and knows coloured shapes only: this shows that real input runs, not that it answers"
echo "real_film: done in $((SECONDS - started)) s after set-up; metrics and checkpoint are in $out/run"
