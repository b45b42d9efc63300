"""Bad configurations: each ends with exit code 2 and a message that says what to type instead."""

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from verl.config import EvalConfig, PPOConfig, SFTConfig, parse_cli
from verl.utils.logger import LOGGERS

GOOD = {
    "data.train_files": "train.jsonl",
    "data.val_files": "val.jsonl",
    "worker.actor.model.model_path": "model",
    "worker.reward.reward_function": "reward.py:score",
}
SFT_GOOD = {"data.train_files": "train.jsonl", "model.model_path": "model"}
EVAL_GOOD = {"data.val_files": "val.jsonl", "model_path": "model"}


def safetensors(shapes):
    """Bytes of a float32 file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with everything a run needs, as the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text('{"problem": "?", "answer": "A"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"num_attention_heads": 28}))
    (tmp_path / "model/model.safetensors").write_bytes(safetensors({"w": (2, 3)}))
    (tmp_path / "reward.py").write_text("def score(x):\n    ...\n\ndef helper():\n    ...\n")
    (tmp_path / "prompt.jinja").write_text("{{ problem }}")
    return tmp_path


def errors(capsys, root, *argv, good=None):
    """What parse_cli prints for a command line that must be refused."""
    base = GOOD if root is PPOConfig else SFT_GOOD if root is SFTConfig else EVAL_GOOD
    words = [f"{key}={value}" for key, value in (base if good is None else good).items()]
    with pytest.raises(SystemExit) as stop:
        parse_cli([*words, *argv], root, "prog")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def accepted(root, *argv):
    """The configuration of a command line that must not be refused."""
    base = GOOD if root is PPOConfig else SFT_GOOD
    return parse_cli([*(f"{key}={value}" for key, value in base.items()), *argv], root, "prog")


ARGUMENTS = {
    "unknown key": (
        ["algorithm.kl_coeff=0.1"],
        "algorithm.kl_coeff: unknown key; did you mean algorithm.kl_coef",
        "[argument 'algorithm.kl_coeff=0.1']",
    ),
    "right name in the wrong section": (
        ["trainer.rollout_batch_size=8"],
        "did you mean data.rollout_batch_size",
    ),
    "unknown key like nothing": (["zzz.qqq=1"], "nothing similar exists; --help lists every key"),
    "vLLM key of EasyR1": (
        ["worker.rollout.disable_tqdm=true"],
        "unknown key; vLLM's progress bars are never shown; remove it",
    ),
    "tensor parallelism without vLLM": (
        ["worker.rollout.tensor_parallel_size=2", "worker.rollout.name=hf"],
        "worker.rollout.tensor_parallel_size=2: only vllm spreads a model over workers; use "
        "worker.rollout.tensor_parallel_size=1, or worker.rollout.name=vllm",
    ),
    "tensor parallelism that does not fit": (
        ["worker.rollout.tensor_parallel_size=3", "worker.rollout.name=vllm"],
        "worker.rollout.tensor_parallel_size=3 must divide the ",
    ),
    "words left out with vLLM": (
        ["worker.rollout.top_p=0.9", "worker.rollout.name=vllm"],
        "worker.rollout.top_p=0.9: with vllm, log-probs are of the words that are left, and the "
        "trainer's are of all; use worker.rollout.top_p=1, or worker.rollout.name=hf",
    ),
    "weights of a law that was not sampled from": (
        [
            "algorithm.rollout_correction.rollout_is=token",
            "worker.rollout.top_k=9",
            "worker.rollout.name=hf",
        ],
        "algorithm.rollout_correction.rollout_is=token with worker.rollout.top_k=9: the engine "
        "samples from the words that are left, and the ratio would be of all; use "
        "algorithm.rollout_correction.rollout_is=null, or worker.rollout.top_k=-1",
    ),
    "a bound of no weight": (
        [
            "algorithm.rollout_correction.rollout_is=null",
            "algorithm.rollout_correction.rollout_is_threshold=3",
        ],
        "algorithm.rollout_correction.rollout_is_threshold=3 bounds no ratio with "
        "algorithm.rollout_correction.rollout_is=null",
    ),
    "a bound of no rejection": (
        ["algorithm.rollout_correction.rollout_rs_threshold_lower=0.5"],
        "algorithm.rollout_correction.rollout_rs_threshold_lower=0.5 bounds no ratio with "
        "algorithm.rollout_correction.rollout_rs=null; use "
        "algorithm.rollout_correction.rollout_rs=token, or leave ",
    ),
    "a weight below one": (
        ["algorithm.rollout_correction.rollout_is_threshold=0.5"],
        "algorithm.rollout_correction.rollout_is_threshold",
    ),
    "too hot for vLLM": (
        ["worker.rollout.temperature=3", "worker.rollout.name=vllm"],
        "worker.rollout.temperature=3: vllm takes 0, or 0.01 to 2; use one of these, or ",
    ),
    "an engine too short": (
        ["worker.rollout.max_model_len=100"],
        "worker.rollout.max_model_len=100 is less than data.max_prompt_length + ",
    ),
    "whole prompts in too few tokens": (
        [
            "worker.rollout.name=vllm",
            "worker.rollout.enable_chunked_prefill=false",
            "worker.rollout.max_num_batched_tokens=64",
        ],
        "worker.rollout.enable_chunked_prefill=false needs "
        "worker.rollout.max_num_batched_tokens of at least ",
    ),
    "key without meaning here": (
        ["worker.ref.offload.offload_optimizer=true"],
        "unknown key; the reference model has no optimizer",
    ),
    "flash attention on the CPU": (
        ["worker.actor.model.attn_implementation=flash", "trainer.device=cpu"],
        "worker.actor.model.attn_implementation=flash needs CUDA and bf16 compute, but "
        "trainer.device=cpu; use auto or sdpa",
    ),
    "flash attention in float32": (
        ["worker.actor.model.attn_implementation=flash", "worker.actor.fsdp.mp_param=fp32"],
        "but worker.actor.fsdp.mp_param=fp32; use auto or sdpa",
    ),
    "flash-attn without its package": (
        ["worker.actor.model.attn_implementation=flash_attn"],
        "worker.actor.model.attn_implementation=flash_attn needs the package flash-attn, which is "
        "not installed; run `pip install 'long-rl[flash-attn]'`, or use",
    ),
    "flash-attn on the CPU": (
        ["worker.actor.model.attn_implementation=flash_attn", "trainer.device=cpu"],
        "worker.actor.model.attn_implementation=flash_attn needs CUDA and bf16 compute, but",
    ),
    "word for a float": (
        ["worker.actor.optim.lr=abc"],
        "worker.actor.optim.lr: expected float >= 0, got 'abc'",
    ),
    "infinite float": (
        ["algorithm.kl_target=inf"],
        "algorithm.kl_target: expected float > 0, got 'inf'",
    ),
    "fraction for an int": (["data.seed=1.5"], "data.seed: expected int, got '1.5'"),
    "word for a count": (
        ["data.max_prompt_length=long"],
        "data.max_prompt_length: expected int >= 1, got 'long' [",
    ),
    "thousands": (
        ["data.max_prompt_length=4k"],
        "expected int >= 1, got '4k'; write it in digits: 4000 or 4096",
    ),
    "millions": (["trainer.save_freq=1.5M"], "got '1.5M'; write it in digits: 1500000 or 1572864"),
    "power of ten": (["data.seed=1e6"], "expected int, got '1e6'; write it in digits: 1000000"),
    "letters that are no thousands": (["data.seed=4x"], "expected int, got '4x' ["),
    "leading zero": (["data.seed=012"], "YAML reads a leading zero as octal, write 12"),
    "word for a bool": (["data.shuffle=maybe"], "data.shuffle: expected bool, got 'maybe'"),
    "unknown choice": (
        ["trainer.device=tpu"],
        "trainer.device: expected one of auto | cuda | cpu, got 'tpu'",
    ),
    "unlike any choice": (["trainer.device=gpu"], "one of auto | cuda | cpu, got 'gpu' ["),
    "dtype in full": (
        ["worker.actor.optim.moment_dtype=bfloat16"],
        "expected one of fp32 | bf16, got 'bfloat16'; did you mean 'bf16'?",
    ),
    "another dtype in full": (
        ["worker.actor.fsdp.mp_reduce=float32"],
        "expected one of fp32 | bf16, got 'float32'; did you mean 'fp32'?",
    ),
    "misspelt choice": (
        ["worker.actor.optim.warmup_style=Cosin"],
        "got 'Cosin'; did you mean 'cosine'?",
    ),
    "engine that is not known": (
        ["worker.rollout.name=sglang"],
        "worker.rollout.name: expected one of auto | vllm | hf, got 'sglang'",
    ),
    "unknown choice in a list": (
        ["trainer.logger=console,comet"],
        "expected one of console | file | tensorboard | wandb | mlflow | swanlab, got 'comet'",
    ),
    "null where a value is needed": (
        ["trainer.project_name=null"],
        "trainer.project_name: expected str, got null",
    ),
    "too few values": (["worker.actor.optim.betas=0.9"], "expected 2 values"),
    "zero": (["data.num_video_frames=0"], "data.num_video_frames: expected int >= 1, got 0"),
    "negative": (["data.fps=-2"], "data.fps: expected float > 0 or null, got -2"),
    "zero where -1 means off": (["trainer.save_freq=0"], "expected int >= 1, or -1, got 0"),
    "top_p beyond 1": (["worker.rollout.top_p=1.5"], "expected float > 0 and <= 1, got 1.5"),
    "warm-up share beyond 1": (
        ["worker.actor.optim.lr_warmup_ratio=3"],
        "worker.actor.optim.lr_warmup_ratio: expected float >= 0 and <= 1, got 3",
    ),
    "several processes for a batch function": (
        ["worker.reward.num_cpus=4"],
        "worker.reward.num_cpus=4: with worker.reward.reward_type=batch",
        "use worker.reward.num_cpus=1, or worker.reward.reward_type=sequential",
    ),
    "two warm-ups": (
        ["worker.actor.optim.lr_warmup_ratio=0.1", "worker.actor.optim.lr_warmup_steps=5"],
        "both set the warm-up; keep one",
    ),
    "floor of a schedule that never falls": (
        ["worker.actor.optim.min_lr_ratio=0.1"],
        "with worker.actor.optim.warmup_style=constant the learning rate never falls",
    ),
    "flag without a value": (
        ["--trainer.val_only"],
        "--trainer.val_only needs a value; write --trainer.val_only=VALUE",
    ),
    "flag before another setting": (
        ["--trainer.val_only", "data.seed=3"],
        "--trainer.val_only needs a value",
    ),
    "stray word": (["settings.yaml"], "for a file write config=settings.yaml"),
    "short option": (["-v"], "'-v' is not a setting; write key=value"),
    "section given a value": (["data=3"], "data is a section, got '3'; set its keys, such as"),
    "rollout batch not divisible": (
        ["data.rollout_batch_size=100", "worker.actor.global_batch_size=64"],
        "data.rollout_batch_size=100 is not a multiple of worker.actor.global_batch_size: "
        "100 = 1 * 64 + 36; use 64 or 128",
        "worker.actor.global_batch_size: argument 'worker.actor.global_batch_size=64'",
    ),
    "samples not divisible over devices": (
        ["data.rollout_batch_size=12", "worker.actor.global_batch_size=12"],
        "12 prompts * 5 responses = 60 = 7 * 8 + 4 samples an optimizer step do not divide over "
        "8 devices; use 8 or 16",
    ),
    "samples of a step not divisible over devices": (
        ["data.rollout_batch_size=20", "worker.actor.global_batch_size=10"],
        "20 prompts * 5 responses = 100 = 12 * 8 + 4 samples a step do not divide over 8 devices; "
        "use 16 or 24",
    ),
    "group of one": (
        ["worker.rollout.n=1"],
        "worker.rollout.n=1: GRPO compares the responses to one prompt",
        "the advantage is always 0; use 2 or more",
    ),
    "greedy rollouts": (
        ["worker.rollout.temperature=0"],
        "greedy responses to one prompt are all the same",
    ),
    "heads not divisible": (
        ["worker.actor.ulysses_size=8"],
        "worker.actor.ulysses_size=8 must divide the 28 attention heads of model; use one of "
        "1, 2, 4 [",
    ),
    "devices not divisible": (
        ["worker.actor.ulysses_size=7"],
        "must divide the 8 devices (trainer.nnodes=1 * trainer.n_gpus_per_node=8); use one of "
        "1, 2, 4 [",
    ),
    "sequences shared by a word": (
        ["worker.actor.ulysses_size=all"],
        "worker.actor.ulysses_size: expected int >= 1 or auto, got 'all'",
    ),
    "a pass too small for a sequence": (
        ["worker.actor.max_tokens_per_device=100"],
        "worker.actor.max_tokens_per_device=100 on each of 1 workers of a sequence is less than "
        "data.max_prompt_length + data.max_response_length = 2560; use "
        "worker.actor.max_tokens_per_device=2560 or more",
    ),
    "rows filled that are not packed": (
        ["worker.actor.max_tokens_per_device=9000", "worker.actor.padding_free=false"],
        "with worker.actor.padding_free=false every sequence is a pass of its own",
    ),
    "a reference that is not loaded": (
        ["algorithm.disable_kl=true", "algorithm.reference_log_probs=always"],
        "algorithm.disable_kl=true loads no reference model, but "
        "algorithm.reference_log_probs=always wants its log-probs",
    ),
    "activations of a model that keeps none": (
        ["worker.ref.offload.offload_activations=true"],
        "worker.ref.offload.offload_activations=true: the reference model keeps no activations",
    ),
    "activations that nothing keeps": (
        [
            "worker.actor.offload.offload_activations=true",
            "worker.actor.model.enable_gradient_checkpointing=false",
        ],
        "moves what checkpointing keeps, but",
        "worker.actor.model.enable_gradient_checkpointing=false; set that to true",
    ),
    "attention that is kept anyway": (
        [
            "worker.actor.model.keep_attention=false",
            "worker.actor.model.enable_gradient_checkpointing=false",
        ],
        "worker.actor.model.keep_attention=false has no effect: worker.actor.model."
        "enable_gradient_checkpointing=false keeps all that backward needs; set that to true, or "
        "worker.actor.model.keep_attention=true",
    ),
    "tiles that are kept anyway": (
        [
            "worker.actor.model.mlp_tile_tokens=4096",
            "worker.actor.model.enable_gradient_checkpointing=false",
            "algorithm.disable_kl=true",
        ],
        "worker.actor.model.mlp_tile_tokens=4096 has no effect",
        "or worker.actor.model.mlp_tile_tokens=-1",
    ),
    "videos together that nobody shares": (
        ["data.group_by_video=4", "worker.actor.shared_prefix=false"],
        "data.group_by_video=4 puts questions about one video together so that they share it, but "
        "worker.actor.shared_prefix=false computes it for each of them",
        "or data.group_by_video=1",
    ),
    "videos together in rows of their own": (
        ["data.group_by_video=4", "worker.actor.padding_free=false"],
        "worker.actor.padding_free=false computes it for each of them",
    ),
    "more videos together than a step has": (
        ["data.group_by_video=513"],
        "data.group_by_video=513 is more than the data.rollout_batch_size=512 prompts of a step; "
        "use data.group_by_video=512 or less",
    ),
    "k1 as a loss": (
        ["algorithm.kl_penalty=k1"],
        "algorithm.kl_penalty=k1 cannot be a loss: the expected gradient of the log ratio is 0",
        "use k2",
    ),
    "kl, the other name of k1, as a loss": (["algorithm.kl_penalty=kl"], "use k2"),
    "adaptive KL from zero": (
        ["algorithm.kl_type=adaptive", "algorithm.kl_coef=0"],
        "algorithm.kl_coef=0: the adaptive weight is multiplied step by step and would stay 0",
    ),
    "pixels upside down": (
        ["data.min_pixels=100", "data.max_pixels=50"],
        "data.min_pixels=100 is larger than data.max_pixels=50",
    ),
    "frame pixels upside down": (
        ["data.video_min_pixels=100", "data.video_max_pixels=50"],
        "data.video_min_pixels=100 is larger than data.video_max_pixels=50",
    ),
    "unknown sampling override": (
        ["worker.rollout.val_override_config.temprature=0.5"],
        "worker.rollout.val_override_config.temprature: unknown key; did you mean temperature?",
    ),
    "sampling override of another kind": (
        ["worker.rollout.val_override_config.seed=0"],
        "legal are temperature, top_p, top_k, n",
    ),
    "sampling override of a wrong type": (
        ["worker.rollout.val_override_config.n=two"],
        "worker.rollout.val_override_config.n: expected int >= 1, got 'two'",
    ),
    "greedy validation in groups": (
        ["worker.rollout.val_override_config.temperature=0"],
        "gives 5 equal responses a prompt in validation; "
        "add worker.rollout.val_override_config.n=1",
    ),
    "no training file": (
        ["data.train_files="],
        "data.train_files is empty; set it to a json, jsonl or parquet file",
    ),
    "missing training file": (
        ["data.train_files=trian.jsonl"],
        "data.train_files=trian.jsonl: there is no file or folder",
        "did you mean train.jsonl",
    ),
    "missing file of a split": (["data.val_files=no.json@test"], "there is no file or folder"),
    "split without a name": (["data.val_files=val.jsonl@"], "write @train"),
    "data set of the hub": (
        ["data.train_files=hiyouga/math12k@train"],
        "a data set of the Hugging Face hub must be downloaded first",
    ),
    "address": (["data.train_files=http://x/y.json"], "only local files are read"),
    "validation without rows": (
        ["data.val_files=", "trainer.val_freq=5"],
        "data.val_files is empty, but trainer.val_freq=5 asks for validation",
        "or trainer.val_before_train=false",
    ),
    "missing media folder": (["data.video_dir=nowhere"], "data.video_dir=nowhere: there is no"),
    "missing template": (
        ["data.format_prompt=promt.jinja"],
        "data.format_prompt=promt.jinja: there is no file",
        "did you mean prompt.jinja?",
    ),
    "missing model": (
        ["worker.actor.model.model_path=./modle"],
        "worker.actor.model.model_path=modle: there is no folder",
        "did you mean model?",
    ),
    "folder without a model": (["worker.actor.model.model_path=."], "config.json is missing"),
    "missing tokenizer": (
        ["worker.actor.model.tokenizer_path=model"],
        "none of tokenizer.json, tokenizer_config.json",
    ),
    "missing reward file": (
        ["worker.reward.reward_function=nope.py:score"],
        "there is no file",
        "nope.py",
    ),
    "reward file without the function": (
        ["worker.reward.reward_function=reward.py:scores"],
        "reward.py does not define scores; functions found: score, helper; did you mean score?",
    ),
    "reward without a function": (
        ["worker.reward.reward_function=reward.py"],
        "write it as path/to/file.py:name",
    ),
    "missing checkpoint": (
        ["trainer.load_checkpoint_path=ckpt/global_step_7"],
        "there is no folder",
        "the run does not start afresh instead",
    ),
    "secret from the environment": (
        ["trainer.project_name=${oc.env:WANDB_API_KEY}"],
        "the environment variable WANDB_API_KEY looks like a secret",
    ),
    "reference to nothing": (["data.seed=${data.sead}"], "Interpolation key 'data.sead' not found"),
    "references in a circle": (
        ["data.seed=${worker.rollout.seed}", "worker.rollout.seed=${data.seed}"],
        "data.seed",
    ),
    "broken reference": (["trainer.project_name=${data"], "trainer.project_name='${data': "),
    "mapping expected": (
        ["worker.actor.model.override_config=5"],
        "expected a mapping such as {name: value}, got '5'",
    ),
    "broken mapping": (["worker.actor.model.override_config={a: "], "cannot be read"),
    "ambiguous word in a mapping": (
        ["worker.reward.reward_function_kwargs.strict=no"],
        "'no' can mean a word or true/false",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_argument_is_refused_with_the_way_out(case, folder, capsys):
    argv, *expected = ARGUMENTS[case]
    printed = errors(capsys, PPOConfig, *argv)
    for text in expected:
        assert text in printed


FOLLOWS = {
    # 1,000 tokens on each of 4 workers hold the longest sequence, on one worker they do not.
    "a pass": (PPOConfig, ["worker.actor.ulysses_size=3",
                           "worker.actor.max_tokens_per_device=1000"]),
    # 4 prompts divide over 4 devices of two workers each, and not over 8.
    "a batch": (PPOConfig, ["worker.actor.ulysses_size=16", "data.rollout_batch_size=4",
                            "worker.actor.global_batch_size=4"]),
    "a batch of SFT": (SFTConfig, ["ulysses_size=3", "batch.global_batch_size=20"]),
}  # fmt: skip
"""What is only wrong because of a wrong number of workers of a sequence."""


@pytest.mark.parametrize("case", FOLLOWS)
def test_a_wrong_number_of_workers_of_a_sequence_is_one_problem(case, folder, capsys):
    root, words = FOLLOWS[case]
    printed = errors(capsys, root, *words)
    assert "1 problem in" in printed
    assert f"{words[0]} must divide the 28 attention heads of model and the 8 devices" in printed
    assert "use one of 1, 2, 4 [" in printed


def test_workers_of_a_sequence_of_a_model_that_is_not_at_hand_are_offered_with_a_condition(
    folder, capsys
):
    hub = "worker.actor.model.model_path=Some/where"
    printed = errors(capsys, PPOConfig, hub, "worker.actor.ulysses_size=3")
    assert "use one of 1, 2, 4, 8 that also divides the attention heads of Some/where" in printed


FILES = {
    "unknown key": ("data:\n  sed: 3\n", "data.sed: unknown key; did you mean data.seed", 2),
    "unknown section": ("dta:\n  seed: 3\n", "dta: unknown key; did you mean data?", 1),
    "wrong type": ("data:\n\n  seed: abc\n", "data.seed: expected int, got 'abc'", 3),
    "list for a number": ("data:\n  seed: [1]\n", "data.seed: expected int, got a list", 2),
    "value for a section": ("data: 3\n", "data is a section, got '3'", 1),
    "duplicate key": (
        "data:\n  seed: 1\n  shuffle: true\n  seed: 2\n",
        "the key seed stands twice, in lines 2 and 4; keep one",
        4,
    ),
    "tab": ("data:\n\tseed: 1\n", "a tab; YAML indents with spaces only", 2),
    "broken syntax": ("data:\n  seed: [1, 2\ntrainer: 3\n", "not valid YAML", 3),
    "python tag": (
        "data:\n  seed: !!python/object/apply:os.system ['true']\n",
        "the tag !!python/object/apply:os.system is refused",
        2,
    ),
    "alias": ("data: &d\n  seed: 1\ntrainer: *d\n", "the alias *d is not supported", 3),
    "merge key": ("data:\n  <<: {seed: 1}\n", "merge keys (<<) are not supported", 2),
    "secret in a mapping": (
        "worker:\n  reward:\n    reward_function_kwargs: {key: '${oc.env:JUDGE_TOKEN}'}\n",
        "the environment variable JUDGE_TOKEN looks like a secret",
        3,
    ),
}


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_file_is_refused_with_its_line(case, folder, capsys):
    text, expected, line = FILES[case]
    (folder / "run.yaml").write_text(text)
    printed = errors(capsys, PPOConfig, "config=run.yaml")
    assert expected in printed
    assert f"[run.yaml, line {line}]" in printed


def test_a_missing_config_file_is_named_with_its_absolute_path(folder, capsys):
    assert str(folder / "no.yaml") in errors(capsys, PPOConfig, "config=no.yaml")


def test_an_empty_config_file_is_refused(folder, capsys):
    (folder / "run.yaml").write_text("# nothing\n")
    assert "config=run.yaml: the file is empty" in errors(capsys, PPOConfig, "config=run.yaml")


def test_a_config_file_in_utf16_is_refused(folder, capsys):
    (folder / "run.yaml").write_bytes("data:\n  seed: 1\n".encode("utf-16"))
    assert "not UTF-8 text" in errors(capsys, PPOConfig, "config=run.yaml")


def test_a_config_file_that_is_a_list_is_refused(folder, capsys):
    (folder / "run.yaml").write_text("- data\n")
    assert "expected sections such as `data:`" in errors(capsys, PPOConfig, "config=run.yaml")


def test_two_config_files_are_refused(folder, capsys):
    printed = errors(capsys, PPOConfig, "config=a.yaml", "config=b.yaml")
    assert "config= is given twice, a.yaml and b.yaml" in printed


def test_all_mistakes_are_reported_together(folder, capsys):
    (folder / "run.yaml").write_text("data:\n  sed: 3\nalgorithm:\n  kl_coef: high\n")
    argv = ["config=run.yaml", "worker.rollout.n=1", "--trainer.nodes", "2", "-x"]
    printed = errors(capsys, PPOConfig, *argv)
    assert printed.startswith("prog: 5 problems in the configuration; nothing was started.")
    for text in ("data.sed", "algorithm.kl_coef", "worker.rollout.n=1", "trainer.nnodes", "'-x'"):
        assert text in printed


def test_a_wrong_value_causes_no_second_message_about_its_default(folder, capsys):
    printed = errors(capsys, PPOConfig, "data.train_files={a: 1}", good=GOOD)
    assert "1 problem in" in printed
    assert "data.train_files: expected list of str" in printed


def test_an_empty_data_file_is_refused(folder, capsys):
    (folder / "train.jsonl").write_text("")
    assert "train.jsonl is empty" in errors(capsys, PPOConfig)


def test_a_template_that_is_not_jinja_is_refused_with_its_line(folder, capsys):
    (folder / "prompt.jinja").write_text("ok\n{% if %}")
    printed = errors(capsys, PPOConfig, "data.format_prompt=prompt.jinja")
    assert "data.format_prompt=prompt.jinja: line 2 is not valid Jinja" in printed


def test_a_reward_file_that_is_not_python_is_refused_with_its_line(folder, capsys):
    (folder / "reward.py").write_text("x = 1\ndef score(:\n")
    assert "reward.py is not valid Python, line 2" in errors(capsys, PPOConfig)


def test_a_model_without_weights_points_to_random_ones(folder, capsys):
    (folder / "model/model.safetensors").unlink()
    printed = errors(capsys, PPOConfig)
    assert "there is no *.safetensors file" in printed
    assert "for random weights set worker.actor.model.init=random" in printed


BAD_WEIGHTS = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "model.safetensors is a Git-LFS pointer, not weights; run `git lfs pull`",
    ),
    "empty": (b"", "model.safetensors is not a safetensors file; download it again"),
    "page": (b"<!doctype html><title>404</title>", "is not a safetensors file"),
    "no tensors": (b"\x02" + bytes(7) + b"[]", "is not a safetensors file"),
    "cut off": (safetensors({"w": (2, 3)})[:-4], "bytes instead of"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_cannot_be_loaded_are_refused(case, folder, capsys):
    content, expected = BAD_WEIGHTS[case]
    (folder / "model/model.safetensors").write_bytes(content)
    assert expected in errors(capsys, PPOConfig)


def test_a_disk_without_room_for_one_checkpoint_is_refused(folder, capsys, monkeypatch):
    weights = safetensors({"model.w": (1024,), "visual.w": (1024,)})
    (folder / "model/model.safetensors").write_bytes(weights)
    free = 1024 * (4 + 8) + 1024 * 4  # weights and moments; the frozen tower has no moments
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    parse_cli([f"{key}={value}" for key, value in GOOD.items()], PPOConfig, "prog")
    free -= 1
    assert "free some or choose another path" in errors(capsys, PPOConfig)


def test_a_checkpoint_given_as_a_model_points_to_the_merger(folder, capsys):
    (folder / "global_step_4/actor").mkdir(parents=True)
    printed = errors(capsys, SFTConfig, "model.model_path=./global_step_4")
    assert "scripts/model_merger.py --local_dir global_step_4/actor" in printed


def test_a_mistyped_checkpoint_lists_those_that_exist(folder, capsys):
    for step in (9, 10):
        (folder / f"ckpt/global_step_{step}").mkdir(parents=True)
    for given in ("ckpt/global_step_11", "ckpt"):
        printed = errors(capsys, PPOConfig, f"trainer.load_checkpoint_path={given}")
        assert "In ckpt there are: global_step_9, global_step_10" in printed


def test_an_output_folder_below_a_file_is_refused(folder, capsys):
    printed = errors(capsys, PPOConfig, "trainer.save_checkpoint_path=train.jsonl/out")
    assert f"{folder / 'train.jsonl'} is not a folder, so nothing can be written" in printed


def test_an_output_folder_without_permission_is_refused(folder, capsys, monkeypatch):
    # Root may write everywhere, so the system's answer is replaced instead of the folder's mode.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder / "locked")
    (folder / "locked").mkdir()
    printed = errors(capsys, PPOConfig, "trainer.output_dir=locked/out")
    assert f"{folder / 'locked'} cannot be written by this user" in printed


@pytest.mark.parametrize("root", [PPOConfig, SFTConfig])
@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("tensorboard", "pip install tensorboard"),
        ("wandb", "pip install 'long-rl[wandb]'"),
        ("mlflow", "pip install 'long-rl[mlflow]'"),
        ("swanlab", "pip install 'long-rl[swanlab]'"),
    ],
)
def test_a_logger_whose_package_is_missing_says_how_to_get_it(
    package, command, root, folder, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    printed = errors(capsys, root, f"trainer.logger=[file,{package}]")
    assert f"trainer.logger={package} needs the package {package}, which is not" in printed
    assert f"run `{command}`" in printed


def test_every_logger_that_there_is_may_be_asked_for(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    words = [f"{key}={value}" for key, value in GOOD.items()]
    config = parse_cli([*words, f"trainer.logger={','.join(LOGGERS)}"], PPOConfig, "prog")
    assert config.trainer.logger == list(LOGGERS)


def test_sft_refuses_keys_of_the_rollout_with_its_own(folder, capsys):
    printed = errors(capsys, SFTConfig, "data.rollout_batch_size=8")
    assert "SFT has no rollout; set batch.global_batch_size" in printed


def test_sft_batch_must_divide_over_devices(folder, capsys):
    printed = errors(capsys, SFTConfig, "batch.global_batch_size=30")
    assert "30 samples an optimizer step do not divide over 8 devices (30 = 3 * 8 + 6)" in printed
    assert "use 24 or 32" in printed


def test_sft_says_that_auto_is_not_its_own_and_what_to_write(folder, capsys):
    printed = errors(capsys, SFTConfig, "ulysses_size=auto")
    assert "ulysses_size: expected int >= 1, got 'auto'; SFT does not choose it" in printed
    assert "write a number that divides the model's attention heads and trainer.nnodes" in printed


def test_an_sft_row_must_have_room_for_the_longest_sample(folder, capsys):
    limit = "batch.max_tokens_per_micro_batch=2559"
    printed = errors(capsys, SFTConfig, limit)
    assert f"{limit} is less than data.max_prompt_length + data.max_response_length = 2560" in (
        printed
    )
    assert "use batch.max_tokens_per_micro_batch=2560 or more" in printed
    accepted(SFTConfig, "batch.max_tokens_per_micro_batch=2560")
    accepted(SFTConfig, limit, "batch.packing=false")


def test_sft_refuses_what_only_checkpointing_reads(folder, capsys):
    whole = "model.enable_gradient_checkpointing=false"
    for setting in ("model.keep_attention=false", "model.mlp_tile_tokens=512"):
        printed = errors(capsys, SFTConfig, whole, setting)
        assert f"{setting} has no effect: {whole} keeps all" in printed


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["worker.actor.model.mlp_tile_tokens=-1"],
        ["worker.actor.model.mlp_tile_tokens=512", "algorithm.kl_coef=0.01"],  # the reference's
    ],
)
def test_without_checkpointing_defaults_and_what_has_an_effect_are_accepted(words, folder):
    accepted(PPOConfig, "worker.actor.model.enable_gradient_checkpointing=false", *words)


def test_videos_are_put_together_up_to_all_of_a_step(folder):
    accepted(PPOConfig, "data.group_by_video=512")


def test_sft_points_actor_keys_to_its_own_sections(folder, capsys):
    printed = errors(capsys, SFTConfig, "worker.actor.model.model_path=model")
    assert "did you mean model.model_path" in printed


@pytest.mark.parametrize(
    "variant", ["frames:0", "frames", "all", "temperature:hot", "temperature:-1"]
)
def test_evaluation_refuses_unknown_variants(variant, folder, capsys):
    printed = errors(capsys, EvalConfig, f"variants=full,{variant}")
    assert "expected full, blind, frames:<k> such as frames:4 or temperature:<t>" in printed
    assert f"got '{variant}'" in printed


def test_evaluation_refuses_a_variant_twice(folder, capsys):
    assert "'blind' is there twice" in errors(capsys, EvalConfig, "variants=blind,blind")


def test_evaluation_refuses_equal_greedy_responses(folder, capsys):
    assert "all 4 responses are the same" in errors(capsys, EvalConfig, "rollout.n=4")


def test_evaluation_output_must_be_a_file(folder, capsys):
    assert "this is a folder; name a file in it" in errors(capsys, EvalConfig, "output=model")


def test_the_cases_do_start_from_a_command_line_that_is_accepted(folder):
    for root, good in ((PPOConfig, GOOD), (SFTConfig, SFT_GOOD), (EvalConfig, EVAL_GOOD)):
        cfg = parse_cli([f"{key}={value}" for key, value in good.items()], root, "prog")
        assert isinstance(cfg, root)
    assert not Path("checkpoints").exists(), "checking must write nothing"


def test_a_config_file_nested_without_end_is_refused(folder, capsys):
    (folder / "run.yaml").write_text("data: " + "[" * 5000)
    assert "nested too deeply" in errors(capsys, PPOConfig, "config=run.yaml")


def test_a_path_that_the_system_refuses_is_a_message(folder, capsys):
    printed = errors(capsys, PPOConfig, f"data.video_dir={'x' * 300}")
    assert "cannot be looked at (File name too long)" in printed
