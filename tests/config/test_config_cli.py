"""Reading configurations: forms of arguments, precedence, types, references, --help, speed."""

import re
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

from verl.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    PPOConfig,
    RolloutConfig,
    SFTConfig,
    TrainerConfig,
    diff,
    fingerprint,
    from_dict,
    parse_cli,
    to_dict,
    to_yaml,
)
from verl.config.build import argument_assignments, build, file_assignments
from verl.config.docs import render_docs
from verl.config.legacy import HINTS, legacy_hint
from verl.config.render import NEUTRAL, REDACTED, sizes_text
from verl.config.schema import sections, settings
from verl.config.yaml_file import parse_yaml

ROOTS = [PPOConfig, SFTConfig, EvalConfig]
REPOSITORY = Path(__file__).parents[2]


def read(*words, text="", root=PPOConfig):
    """A configuration from YAML text and arguments; keys and types are checked, files are not."""
    entries = parse_yaml(text)[0] if text else []
    from_file, unknown = file_assignments(root, entries, "run.yaml")
    pairs = [(*word.split("=", 1), f"argument {word!r}") for word in words]
    from_arguments, also_unknown = argument_assignments(root, pairs)
    built = build(root, [*from_file, *from_arguments])
    if problems := [*unknown, *also_unknown, *built.problems]:
        raise ConfigError(problems)
    return built.config


@pytest.fixture
def small_eval(tmp_path):
    """Arguments of an evaluation that passes every check."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    (tmp_path / "val.json").write_text("[]")
    return [f"model_path={tmp_path}", f"data.val_files={tmp_path / 'val.json'}"]


@pytest.mark.parametrize(
    "words",
    [["data.seed=7"], ["--data.seed=7"], ["--data.seed", "7"], ["data.seed=3", "data.seed=7"]],
)
def test_every_form_of_argument_sets_a_key(words, small_eval):
    words = [word.replace("data.seed", "rollout.seed") for word in words]
    assert parse_cli([*small_eval, *words], EvalConfig, "prog").rollout.seed == 7


def test_a_negative_number_may_follow_a_flag(small_eval):
    cfg = parse_cli([*small_eval, "--rollout.top_k", "-1"], EvalConfig, "prog")
    assert cfg.rollout.top_k == -1


def test_a_value_may_hold_an_equals_sign(small_eval):
    assert parse_cli([*small_eval, "--name", "a=b c"], EvalConfig, "prog").name == "a=b c"


def test_arguments_win_over_the_file(tmp_path, small_eval):
    file = tmp_path / "run.yaml"
    file.write_text("rollout:\n  seed: 1\n  top_p: 0.5\n")
    cfg = parse_cli(["rollout.seed=2", f"config={file}", *small_eval], EvalConfig, "prog")
    assert (cfg.rollout.seed, cfg.rollout.top_p) == (2, 0.5)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    text = "worker: {actor: {optim: {lr: 1e-6, betas: [.9, 9.9e-1]}}, rollout: {temperature: 1}}"
    cfg = read(text=text)
    assert cfg.worker.actor.optim.lr == 1e-6
    assert cfg.worker.actor.optim.betas == (0.9, 0.99)
    assert isinstance(cfg.worker.rollout.temperature, float)


def test_words_that_yaml_takes_for_something_else_stay_words():
    text = "trainer: {project_name: no, experiment_name: 1:30}\ndata: {video_dir: 012}"
    cfg = read(text=text)
    assert (cfg.trainer.project_name, cfg.trainer.experiment_name) == ("no", "1:30")
    assert cfg.data.video_dir == "012"


@pytest.mark.parametrize("word", ["true", "True", "yes", "on"])
def test_booleans_are_read_in_every_spelling(word):
    assert read(f"trainer.val_only={word}").trainer.val_only is True


@pytest.mark.parametrize("word", ["null", "None", "~", ""])
def test_optional_settings_are_cleared(word):
    assert read("data.fps=2", f"data.fps={word}").data.fps is None


def test_quoted_null_is_text():
    assert read(text="data: {video_dir: 'null'}").data.video_dir == "null"


@pytest.mark.parametrize(
    "given", ["a.json,b.json@test", "[a.json, b.json@test]", " a.json , b.json@test "]
)
def test_lists_are_read_with_and_without_brackets(given):
    assert read(f"data.train_files={given}").data.train_files == ["a.json", "b.json@test"]


def test_lists_in_a_file_may_be_text_or_a_list():
    for text in ("data: {train_files: 'a,b'}", "data:\n  train_files:\n  - a\n  - b\n"):
        assert read(text=text).data.train_files == ["a", "b"]


def test_an_empty_section_in_a_file_changes_nothing():
    assert read(text="data:\nalgorithm: null\n") == PPOConfig()


@pytest.mark.parametrize(
    ("alias", "meaning"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3"), ("abs", "abs")]
)
def test_kl_names_of_easyr1_are_understood(alias, meaning):
    assert read(f"algorithm.kl_penalty={alias}").algorithm.kl_penalty == meaning


def test_arguments_reach_into_mappings_of_the_file():
    text = "worker: {reward: {reward_function_kwargs: {a: 1, b: {c: 2}}}}"
    key = "worker.reward.reward_function_kwargs"
    kwargs = read(f"{key}.b.d=x", f"{key}.e=[1, 2.5]", text=text).worker.reward
    assert kwargs.reward_function_kwargs == {"a": 1, "b": {"c": 2, "d": "x"}, "e": [1, 2.5]}


def test_validation_sampling_replaces_only_what_it_names():
    rollout = read("worker.rollout.val_override_config={temperature: 0, n: 1}").worker.rollout
    assert rollout.for_validation() == replace(rollout, temperature=0, n=1, val_override_config={})


def test_settings_may_refer_to_others_and_to_the_environment(monkeypatch):
    monkeypatch.setenv("RUN_SEED", "11")
    cfg = read(
        text="data: {seed: '${oc.env:RUN_SEED}'}\ntrainer: {experiment_name: 's${data.seed}'}\n"
        "worker: {rollout: {seed: '${data.seed}', top_p: '${worker.actor.optim.lr}'}}"
    )
    assert (cfg.data.seed, cfg.worker.rollout.seed) == (11, 11)
    assert cfg.trainer.experiment_name == "s11"
    assert cfg.worker.rollout.top_p == 1e-6


def test_help_lists_every_key_with_type_default_and_docstring(capsys):
    for root in ROOTS:
        with pytest.raises(SystemExit) as stop:
            parse_cli(["--help", "no.such=key"], root, "prog")
        printed = capsys.readouterr().out
        assert stop.value.code == 0
        for key, setting in settings(root).items():
            assert f"  {key}  (" in printed
            assert f"      {setting.doc}\n" in printed
    assert "rollout.temperature  (float >= 0, default 0.0)" in printed


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_and_section_is_documented(root):
    undocumented = [key for key, setting in settings(root).items() if len(setting.doc) < 10]
    assert not undocumented
    assert all(len(text) > 10 for text in sections(root).values())


def test_print_config_shows_a_file_that_reads_back_and_the_derived_sizes(
    small_eval, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        parse_cli([*small_eval, "--print-config", "name=012"], EvalConfig, "prog")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "#   samples per prompt" in printed
    (tmp_path / "again.yaml").write_text(printed)
    again = parse_cli([f"config={tmp_path / 'again.yaml'}"], EvalConfig, "prog")
    assert again == parse_cli([*small_eval, "name=012"], EvalConfig, "prog")


def test_derived_sizes_of_an_rl_run():
    cfg = read(
        *("data.rollout_batch_size=16", "worker.rollout.n=4", "worker.actor.global_batch_size=8"),
        *("worker.actor.ppo_epochs=3", "trainer.nnodes=2", "trainer.n_gpus_per_node=2"),
        "worker.actor.micro_batch_size_per_device_for_update=3",
    )
    sizes = cfg.derived()
    assert sizes.prompts_per_step == 16
    assert sizes.samples_per_step == 64
    assert sizes.optimizer_steps_per_rollout_batch == 6
    assert sizes.samples_per_optimizer_step == 32
    assert sizes.samples_per_device == 8
    assert sizes.micro_batches_per_device == 4  # two groups of 4, each by 3 and 1
    assert cfg.derived(world_size=2).samples_per_device == 16
    assert "samples per step                   64  = data.rollout_batch_size" in sizes_text(cfg)


@pytest.mark.parametrize("key", ["worker.actor.max_tokens_per_device", "data.group_by_video"])
def test_micro_batches_that_only_the_data_tell_are_unknown(key):
    cfg = read(f"{key}=4000")
    assert cfg.derived().micro_batches_per_device is None
    (line,) = [li for li in sizes_text(cfg).splitlines() if li.startswith("micro batches")]
    assert re.match(r"micro batches per device +unknown  = .* only from the data with", line)


def test_derived_sizes_of_an_sft_run():
    cfg = read("batch.global_batch_size=32", "trainer.n_gpus_per_node=2", root=SFTConfig)
    sizes = cfg.derived()
    assert (sizes.samples_per_optimizer_step, sizes.samples_per_device) == (32, 16)
    assert sizes.longest_sample_tokens == 2048 + 512
    assert sizes.most_micro_batches_per_device == 6  # three samples of 2560 tokens in 8192
    alone = replace(cfg, batch=replace(cfg.batch, packing=False))
    assert alone.derived().most_micro_batches_per_device == 16


@pytest.mark.parametrize("root", ROOTS)
def test_yaml_and_dict_read_back_to_an_equal_configuration(root):
    cfg = root()
    assert from_dict(root, to_dict(cfg)) == cfg
    assert read(text=to_yaml(cfg), root=root) == cfg
    assert yaml.safe_load(to_yaml(cfg)) == to_dict(cfg), "other YAML readers see the same"


def test_text_that_looks_like_something_else_survives_the_round_trip():
    values = {"a": "1e-6", "b": "no", "c": "${x}", "d": "", "e": 1e-7, "f": ["null", None, True]}
    cfg = from_dict(PPOConfig, {"worker": {"reward": {"reward_function_kwargs": {}}}})
    reward = replace(cfg.worker.reward, reward_function_kwargs=values)
    cfg = replace(cfg, worker=replace(cfg.worker, reward=reward))
    assert read(text=to_yaml(cfg)) == cfg


def test_secrets_in_mappings_are_not_printed():
    cfg = read("worker.reward.reward_function_kwargs={api_key: hunter2, pad_token_id: 5}")
    assert "hunter2" not in to_yaml(cfg)
    kwargs = to_dict(cfg)["worker"]["reward"]["reward_function_kwargs"]
    assert kwargs == {"api_key": REDACTED, "pad_token_id": 5}


def test_from_dict_names_unknown_keys_and_wrong_types():
    with pytest.raises(ConfigError) as error:
        from_dict(PPOConfig, {"data": {"sed": 1, "seed": "x"}})
    assert len(error.value.problems) == 2
    assert "did you mean data.seed" in str(error.value)


def test_fingerprint_follows_what_changes_results_only():
    base = fingerprint(PPOConfig())
    for word in (
        "worker.actor.optim.lr=1e-5",
        "data.seed=2",
        "data.train_files=a",
        "trainer.max_steps=3",
    ):
        assert fingerprint(read(word)) != base
    for word in ("trainer.output_dir=x", "trainer.logger=wandb", "trainer.n_gpus_per_node=2",
                 "worker.actor.micro_batch_size_per_device_for_update=1"):  # fmt: skip
        assert fingerprint(read(word)) == base
    longer = read("trainer.max_steps=3")
    assert fingerprint(longer, ignore=[*NEUTRAL, "trainer.max_steps"]) == fingerprint(
        PPOConfig(), ignore=[*NEUTRAL, "trainer.max_steps"]
    )


@pytest.mark.parametrize("pattern", NEUTRAL)
def test_every_neutral_pattern_names_a_key(pattern):
    from fnmatch import fnmatchcase

    keys = [*settings(PPOConfig), *settings(SFTConfig)]
    assert any(fnmatchcase(key, pattern) for key in keys)


def test_diff_lists_keys_with_old_and_new_values():
    old, new = to_dict(PPOConfig()), to_dict(read("data.seed=2", "trainer.logger=file"))
    assert diff(old, new) == [
        ("data.seed", 1, 2),
        ("trainer.logger", ["console", "file"], ["file"]),
    ]
    del old["data"]["seed"]
    assert diff(old, new)[-1] == ("data.seed", None, 2)


def test_no_legal_key_is_called_a_legacy_one():
    for root in ROOTS:
        assert not [key for key in settings(root) if legacy_hint(key)]
    assert all(hint for hint in HINTS.values())


def test_configurations_cannot_be_written_to():
    with pytest.raises(FrozenInstanceError):
        PPOConfig().data.seed = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        DataConfig(["a.json"])  # type: ignore[call-arg]


def test_paths_have_their_defaults_filled_in():
    trainer = TrainerConfig(project_name="p", experiment_name="e")
    assert trainer.checkpoint_dir == Path("checkpoints/p/e") == trainer.resolved_output_dir
    assert replace(trainer, save_checkpoint_path="x").resolved_output_dir == Path("x")


def test_a_model_of_the_hub_is_accepted_without_being_there(small_eval):
    words = [*small_eval, "model_path=Qwen/Qwen2.5-VL-3B-Instruct"]
    assert parse_cli(words, EvalConfig, "prog").model_path == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_the_documentation_page_is_up_to_date():
    page = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == render_docs(), "run: python3 -m verl.config.docs > docs/configuration.md"


def test_checking_takes_under_three_seconds_and_imports_nothing_heavy(tmp_path):
    program = """
import sys
from verl.config import PPOConfig, parse_cli
try:
    parse_cli(sys.argv[1:], PPOConfig, "prog")
finally:
    heavy = {"torch", "transformers", "ray", "numpy", "datasets"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""
    (tmp_path / "p.jinja").write_text("{{ problem }}")
    words = ["data.seed=${worker.rollout.seed}", f"data.format_prompt={tmp_path / 'p.jinja'}"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert time.monotonic() - start < 3
    assert done.returncode == 2, done.stderr
    assert "heavy: []" in done.stdout


def test_room_for_one_whole_group_is_made_unless_the_engine_is_told_how_much():
    assert RolloutConfig(n=8).tokens_at_once(100_000, 1_000) == 108_000
    assert RolloutConfig(n=8).tokens_at_once(2_000, 500) == 16_384
    assert RolloutConfig(n=8, max_num_batched_tokens=64).tokens_at_once(2_000, 500) == 64
