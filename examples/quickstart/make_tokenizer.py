"""The quickstart's tokenizer: byte-level BPE in which each word of the task is one token.

Any text can be encoded (bytes are the fallback), with the special tokens and the chat template of
Qwen2.5-VL. `python3 examples/quickstart/make_tokenizer.py DIR` writes it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from verl.data.synthetic import make_rows, make_story

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
DESCRIBE = "describe the video ."
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


def corpus(n_stories: int = 3000) -> Iterator[str]:
    """Texts in which every word of the task is frequent."""
    for i in range(n_stories):
        rng = random.Random(f"tokenizer/{i}")
        events = make_story(rng, 64)
        yield f"system\n user\n assistant\n {DESCRIBE}"
        for row in make_rows(f"{i}", events, i, "tokenizer"):
            yield f"{row['problem']} {' '.join(row['options'])}"
            yield row["reasoning"]
    # Letters one by one in English order of frequency make other text a little shorter.
    yield from ["the and ing ion er he in an re on at en nd st or te es of is it al ar"] * 50


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, trained in a second; the result is the same every time."""
    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat(tokenizer: Any, question: str) -> str:
    """The text from which an answer to `question` is generated."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Token ids that the model's configuration names."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


if __name__ == "__main__":
    build().save_pretrained(Path(sys.argv[1]))
