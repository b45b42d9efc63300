#!/usr/bin/env bash
# The main job, end to end on this machine: data, CoT-SFT, GRPO, evaluation, merge, report.
#   usage: bash examples/quickstart.sh              about 10 minutes on 2 CPU cores, after set-up
#          SEED=1 bash examples/quickstart.sh      in outputs/quickstart_seed1; OUT=DIR chooses
#          CONTROL=1 bash examples/quickstart.sh   also fine-tunes for as long as both stages took
#          OUT=outputs/vllm bash examples/quickstart.sh worker.rollout.name=vllm
#                                                  arguments go to the RL stage, the engine also to evaluation
#          QUICKSTART_SMOKE=1 bash examples/quickstart.sh     every stage in short, under 3 minutes
# Run again after an interruption, it resumes. For a fresh start remove the output folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=${QUICKSTART_SMOKE:-0}
seed=${SEED:-0}
if [ "$smoke" = 1 ]; then
  out=${OUT:-outputs/quickstart_smoke} videos=60 took="2 to 3 minutes"
  sft_args=(trainer.max_steps=4)
  rl_args=(trainer.max_steps=2 trainer.val_freq=-1 data.rollout_batch_size=8 worker.actor.global_batch_size=8)
else
  out=${OUT:-outputs/quickstart$([ "$seed" = 0 ] || echo "_seed$seed")} videos=1200 took="6 to 10 minutes"
  sft_args=() rl_args=()
fi
rl_args+=("$@")
eval_args=()
for argument in "$@"; do
  case $argument in worker.rollout.name=*) eval_args+=("${argument#worker.}") ;; esac
done
if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi -L 2>/dev/null | wc -l) && [ "$gpus" -gt 0 ]; then
  workers=$((gpus < 2 ? gpus : 2))
else
  workers=2
fi
smoke_note() {
  [ "$smoke" != 1 ] || echo "quickstart: smoke run: 4 SFT and 2 GRPO steps; accuracies mean nothing here"
}
echo "quickstart: data, CoT-SFT, evaluation, GRPO, merge, evaluation, report; $took on 2 CPU cores, after set-up"
echo "quickstart: results go to $out; an interrupted run goes on with the same command"
smoke_note
bash scripts/setup.sh
export PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
python=.venv/bin/python
data=$out/data
media=(data.video_dir="$data/videos" data.cache_dir="$out/cache")

example=quickstart
source examples/stages.sh

make_data() {
  local want="$videos videos, seed $seed"
  if [ "$(cat "$data/made" 2>/dev/null)" = "$want" ]; then
    echo "data: $data is there already ($want)"
    return
  fi
  $python -m verl.data.synthetic --out "$data" --videos "$videos" --frames 64 --seed "$seed"
  echo "$want" > "$data/made"
}

# evaluate MODEL NAME VARIANTS: greedy accuracy on the test split.
evaluate() {
  $python -m verl.evaluation.main model_path="$1" name="$2" variants="$3" output="$out/eval_$2.json" \
    data.val_files="$data/test.jsonl" data.format_prompt=examples/quickstart/prompt.jinja \
    data.num_video_frames=64 data.video_min_pixels=3136 data.video_max_pixels=3136 \
    data.max_prompt_length=256 data.max_response_length=48 n_gpus_per_node=$workers "${media[@]}" "${eval_args[@]}"
}

# run_sft NAME [OVERRIDE...]
run_sft() {
  local name=$1
  shift
  $python -m verl.trainer.sft config=examples/quickstart/sft.yaml data.train_files="$data/train_sft.jsonl" \
    data.seed="$seed" trainer.save_checkpoint_path="$out/$name" trainer.n_gpus_per_node=$workers \
    "${media[@]}" "${sft_args[@]}" "$@"
  merge "$out/$name" "$out/${name}_model"
}

run_rl() {
  $python -m verl.trainer.main config=examples/quickstart/rl.yaml data.train_files="$data/train_rl.jsonl" \
    data.val_files="[$data/val.jsonl, $data/test.jsonl]" data.seed="$seed" worker.rollout.seed="$seed" \
    worker.actor.model.model_path="$out/sft_model" trainer.save_checkpoint_path="$out/rl" \
    trainer.n_gpus_per_node=$workers "${media[@]}" "${rl_args[@]}"
}

stage data make_data
stage sft run_sft sft
stage evaluate_sft evaluate "$out/sft_model" sft "[full, temperature:1]"
stage rl run_rl
stage merge merge "$out/rl" "$out/merged_model"
stage evaluate_merged evaluate "$out/merged_model" merged "[full, blind, frames:8, temperature:1]"
if [ "${CONTROL:-0}" = 1 ]; then
  # Epochs, not seconds, so that the control repeats exactly; 10 take about as long as SFT and RL do on 2 cores.
  stage sft_longer run_sft sft_longer trainer.total_epochs=10
  stage evaluate_sft_longer evaluate "$out/sft_longer_model" sft_longer "[full]"
fi
stage ask $python examples/quickstart/ask.py "$out/merged_model" "$data"
stage report $python examples/quickstart/summarize.py "$out" --seed "$seed"
echo "quickstart: done in $SECONDS s; results: $out/summary.json, report: $out/report.html, model: $out/merged_model"
smoke_note
