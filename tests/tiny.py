"""Tiny models of real architectures, with a word-level tokenizer, made from a config."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2Config

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = [
    "system",
    "user",
    "assistant",
    "what",
    "is",
    "the",
    "answer",
    "?",
    "A",
    "B",
    "C",
    "D",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "first",
    "last",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "1",
    "2",
    "3",
    "yes",
    "no",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
IMAGE_ID, VIDEO_ID = SPECIAL.index("<|image_pad|>"), SPECIAL.index("<|video_pad|>")
EOS_ID = SPECIAL.index("<|im_end|>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(SPECIAL + ["[UNK]"] + WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(*, tie: bool = True, width: int = 32) -> Qwen2_5_VLConfig:
    """`width` is the language model's, of four heads; vLLM's kernels want 128 or more."""
    sections = [width // 32, width // 32, width // 8 - 2 * (width // 32)]
    text = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tie,
        "initializer_range": 0.2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": sections,
        },
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": EOS_ID,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "in_channels": 3,
        "initializer_range": 0.2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        tie_word_embeddings=tie,
    )


def write_tiny_model(folder: Path, *, tie: bool = True, width: int = 32) -> Path:
    """Config and tokenizer only; weights come from `init=random`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_config(tie=tie, width=width).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_text_config(
    family: str = "llama", *, tie: bool = True, head_dim: int = 8
) -> LlamaConfig | Qwen2Config:
    """A model of text alone with SmolLM2's nine heads and three key-value heads.

    vLLM's kernels want heads of 32 or more; those of the published model have 64.
    """
    cls = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return cls(
        vocab_size=64,
        hidden_size=9 * head_dim,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=EOS_ID,
    )


def write_tiny_text_model(
    folder: Path, family: str = "llama", *, tie: bool = True, head_dim: int = 8
) -> Path:
    """Config and tokenizer only; weights come from `init=random`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_text_config(family, tie=tie, head_dim=head_dim).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
