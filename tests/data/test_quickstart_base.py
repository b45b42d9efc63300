"""What ships in examples/quickstart/base: a tokenizer for any text and a model that can see."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from verl.config import DataConfig, ModelConfig
from verl.data.dataset import PromptDataset
from verl.data.media import decode_media, pixels
from verl.data.synthetic import QUESTIONS, generate, make_rows, make_story
from verl.models.loader import build_model, load_adapter, load_tokenizer
from verl.rollout import RolloutRequest, SamplingParams
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, register_attention

BASE = Path(__file__).parents[2] / "examples" / "quickstart" / "base"
MODEL = ModelConfig(model_path=str(BASE))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


def test_every_word_of_the_task_is_one_token(tokenizer: Any):
    rows = [
        row
        for i in range(50)
        for row in make_rows("v", make_story(random.Random(i), 64), i, "test")
    ]
    texts = [row["reasoning"] for row in rows]
    texts += [" " + " ".join(row["options"]) for row in rows]
    texts += [" " + question.split(" ", 1)[1] for question in QUESTIONS.values()]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split()), tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    "text",
    [
        "Which of these four characters is seen first in the film?",
        "two  spaces,\ttabs\nand lines",
        "naïve café: 東京 🐇 <think>",
        "",
    ],
)
def test_any_text_comes_back_as_it_was(tokenizer: Any, text: str):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_control_tokens_are_single_and_in_the_configuration(tokenizer: Any):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(BASE)
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config.video_token_id
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) <= config.text_config.vocab_size <= 640
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_loads_the_base_without_project_code():
    from transformers import Qwen2_5_VLForConditionalGeneration

    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        BASE, dtype=torch.float32, output_loading_info=True
    )
    hf, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert 1_000_000 < sum(p.numel() for p in hf.parameters()) < 1_500_000
    assert hf.generation_config.eos_token_id[0] == hf.config.text_config.eos_token_id


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    generate(folder, 14, 64, 99, {}, 1)
    return folder


def said_by_base(clips: Path, template: Path, tokenizer: Any) -> list[tuple[str, str]]:
    """What the base says of each clip, and what happens in it."""
    settings = DataConfig(
        train_files=[str(clips / "train_rl.jsonl")],
        video_dir=str(clips / "videos"),
        format_prompt=str(template),
        num_video_frames=64,
        video_min_pixels=3136,
        video_max_pixels=3136,
    )
    register_attention()
    hf = build_model(MODEL, dtype=torch.float32, attention=ATTENTION, materialize=True)
    adapter = load_adapter(MODEL)
    assert adapter.vision is not None
    data = PromptDataset(settings, tokenizer, adapter)
    requests, wanted = [], []
    for i in range(0, len(data), len(QUESTIONS)):
        sample = data.sample(i)
        values, grid = pixels(decode_media(sample.media[0].ref), adapter.vision)
        with torch.no_grad():
            features = adapter.encode(hf, values, [grid])
        ids = torch.tensor(sample.prompt_ids)
        positions = adapter.positions(ids, sample.media)
        requests.append(RolloutRequest(ids, positions, features, (0,)))
        events = [" ".join(event[2:]) for event in sample.extra["events"]]
        wanted.append(" ".join(f"{i} {event}" for i, event in enumerate(events, 1)))
    params = SamplingParams(max_tokens=40, temperature=0.0, stop_ids=(tokenizer.eos_token_id,))
    outputs = HFRollout(hf, adapter, torch.device("cpu"), 8192).generate(requests, params)
    texts = [tokenizer.decode(o[0].token_ids, skip_special_tokens=True) for o in outputs]
    return list(zip(texts, wanted, strict=True))


def test_base_describes_video_files(clips: Path, tmp_path: Path, tokenizer: Any):
    template = tmp_path / "describe.jinja"
    template.write_text('describe the video . {{ problem }} {{ options | join(" ") }}')
    pairs = said_by_base(clips, template, tokenizer)
    right = [text.strip() == f"<think> {events} </think>" for text, events in pairs]
    assert len(right) > 3 and sum(right) >= 0.8 * len(right), pairs


def test_base_does_not_look_when_it_is_asked_a_question(clips: Path, tokenizer: Any):
    for text, _ in said_by_base(clips, BASE.parent / "prompt.jinja", tokenizer):
        assert text.strip().startswith("<think> so "), text
