#!/usr/bin/env bash
# Makes the installed vLLM take stored video embeddings. Nothing of vLLM is overwritten: its model of
# Qwen2.5-VL is replaced through vLLM's plugin entry point, which this package brings along.
#   usage: bash vllm_replace.sh                    PYTHON=/path/to/python bash vllm_replace.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if ! "$python" -c 'import sys; from verl.rollout.vllm_plugin import is_entered; sys.exit(not is_entered())' 2>/dev/null; then
  echo "vllm_replace: installing this package into the environment of $python, without its dependencies"
  "$python" -m pip install --quiet --no-deps -e .
fi
"$python" -m verl.rollout.vllm_plugin
echo "vllm_replace: no file of vLLM was changed; to undo: $python -m pip uninstall long-rl"
