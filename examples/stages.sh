# Sourced by examples that run in stages, after `example` (its name), `out` and `python` are set.

# stage NAME COMMAND...: runs it, says how long it took and keeps the time in $out/seconds for the
# report. The parts of an interrupted stage add up; a stage that has ended once keeps that time when
# it is run again.
mkdir -p "$out/seconds"
running="" started=0
stage() {
  running=$1 started=$SECONDS
  shift
  echo "$example [$SECONDS s]: $running"
  "$@"
  echo "$example [$SECONDS s]: $running took $((SECONDS - started)) s"
  keep_seconds
  [ -f "$out/seconds/$running" ] || mv "$out/seconds/$running.part" "$out/seconds/$running"
  rm -f "$out/seconds/$running.part"
  running=""
}
keep_seconds() {
  echo $((SECONDS - started + $(cat "$out/seconds/$running.part" 2>/dev/null || echo 0))) > "$out/seconds/$running.part"
}
trap '[ -z "$running" ] || keep_seconds' EXIT

# newest FOLDER: the last checkpoint's actor folder.
newest() {
  $python -c 'import json, sys, pathlib as p; r = p.Path(sys.argv[1]); print(r / json.loads((r / "checkpoint_tracker.json").read_text())["last_checkpoint"] / "actor")' "$1"
}

# merge RUN MODEL: a Hugging Face folder of the last checkpoint of a run.
merge() { $python scripts/model_merger.py --local_dir "$(newest "$1")" --output "$2" --dtype fp32; }
