#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/models -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# Byte code is written where it may be, so that worker processes do not compile torch again.
export PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=offline
started=$SECONDS
echo "test: running pytest; results are printed below"
# Two files at a time; each needs up to two cores and 3 GB while runs with workers are tested.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
echo "test: passed in $((SECONDS - started)) s"
