"""Conversations with a loss mask for supervised fine-tuning, and their packing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from verl.data.dataset import MediaProbe, RowDataset, check_gold_answer, check_length
from verl.data.media import MediaItem
from verl.data.prompts import Message, PromptBuilder, PromptFormat
from verl.data.rows import BadSample, Row
from verl.data.sources import DataError

if TYPE_CHECKING:
    from verl.config import DataConfig

MESSAGES, RESPONSE = "messages", "response"
"""Columns that give the target as it is, when a row has them."""
_ROLES = ("system", "user", "assistant", "tool")
_THOUGHT = re.compile(r"<think>((?:(?!</?think>).)*)</think>(.*)", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
_ANSWER = re.compile(r"<answer>\s*[^<\s].*</answer>", re.DOTALL)


@dataclass(frozen=True)
class SFTSample:
    """Token ids of a conversation, and which of them are learnt."""

    uid: str
    input_ids: list[int]
    """Visual placeholders expanded; ends with the last token that is learnt."""
    loss_mask: list[int]
    """1 where the token itself is a target: assistant text and its end-of-turn token; else 0."""
    media: tuple[MediaItem, ...]
    problem_type: str
    text: str = field(repr=False)
    """The conversation as text, each piece of media as one placeholder."""


class SFTDataset(RowDataset[SFTSample]):
    """Rows with a written answer.

    The conversation is the row's `messages`, or the same prompt that RL would use followed by the
    `response` column, or by `<think>reasoning</think> <answer>answer</answer>` made from the
    reasoning and answer columns (reasoning that starts with such tags is kept as it is).
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        fmt: PromptFormat,
        *,
        files: Sequence[str] | None = None,
    ) -> None:
        """`files` defaults to `data.train_files`. Raises DataError.

        Rows that would teach an answer that is none of their options are rejected here.
        """
        super().__init__(config, config.train_files if files is None else files, _required)
        for row in self.rows:
            if row.columns.get(MESSAGES) or row.columns.get(RESPONSE):
                continue  # The answer column is no target of theirs.
            try:
                check_gold_answer(row)
            except BadSample as bad:
                self.reject(bad)
        self._prompts = PromptBuilder(config, tokenizer, fmt)
        self._media = MediaProbe(config, fmt.vision)
        self._special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def sample(self, index: int) -> SFTSample:
        row = self.rows[index]
        turns, slots = self._prompts.place_media(row, self._turns(row))
        turns = self._prompts.with_system(turns)
        text, spans = self._render(row, turns)
        media = self._media.items(row, slots)
        ids, mask = self._tokens(row, text, spans, media)
        check_length(row, "prompt", len(mask) - sum(mask), self._data.max_prompt_length, media)
        check_length(row, "response", sum(mask), self._data.max_response_length, ())
        return SFTSample(row.uid, ids, mask, media, row.problem_type, text)

    def _turns(self, row: Row) -> list[Message]:
        messages = row.columns.get(MESSAGES)
        if messages:
            turns = [_as_message(row, message) for message in messages]
            roles = [turn["role"] for turn in turns]
            if roles[-1] != "assistant" or "user" not in roles:
                raise BadSample(
                    "no_target",
                    row,
                    f"the turns are {roles}; a conversation has a user turn and ends with an "
                    "assistant turn",
                )
            return turns
        return [
            {"role": "user", "content": self._prompts.user_text(row)},
            {"role": "assistant", "content": target_text(row)},
        ]

    def _render(self, row: Row, turns: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and where assistant turns stand in it.

        A span starts where generation would start, and ends behind the end-of-turn token. That the
        chat template renders a conversation as a continuation of its beginning is checked, since
        some templates rewrite earlier turns.
        """
        text = self._prompts.chat(turns, add_generation_prompt=False).rstrip()
        spans = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._prompts.chat(turns[:i], add_generation_prompt=True)
            after = self._prompts.chat(turns[: i + 1], add_generation_prompt=False).rstrip()
            if not (after.startswith(before) and text.startswith(after)):
                raise BadSample(
                    "chat_template",
                    row,
                    f"the chat template renders turn {i} differently within the conversation; "
                    "split it into rows of one answer each, or use another template",
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _tokens(
        self, row: Row, text: str, spans: Sequence[tuple[int, int]], media: Sequence[MediaItem]
    ) -> tuple[list[int], list[int]]:
        """Expanded ids and mask. Each span's tokens are those that tokenising its prefix gives."""
        whole = self._prompts.tokenise(text)
        ids: list[int] = []
        mask: list[int] = []
        n_done = n_media = start = 0
        for begin, end in spans:
            n_begin = self._n_prefix(row, whole, text[:begin])
            n_end = self._n_prefix(row, whole, text[:end])
            if whole[n_end - 1] not in self._special_ids:
                raise DataError(
                    f"{row.where}: the chat template ends an assistant turn without a special "
                    "token, so a model trained on it would not learn to stop; use a template that "
                    "ends turns with one"
                )
            n_here = self._prompts.count_placeholders(text[start:begin])
            here = media[n_media : n_media + n_here]
            context = self._prompts.expand(row, whole[n_done:n_begin], here)
            ids += context + whole[n_begin:n_end]
            mask += [0] * len(context) + [1] * (n_end - n_begin)
            n_done, n_media, start = n_end, n_media + n_here, end
        return ids, mask

    def _n_prefix(self, row: Row, whole: list[int], prefix: str) -> int:
        ids = self._prompts.tokenise(prefix)
        if whole[: len(ids)] != ids:
            raise BadSample(
                "token_boundary",
                row,
                f"the tokenizer joins text across {prefix[-20:]!r} and what follows, so training "
                "would not see the tokens that generation sees; start the target with another word",
            )
        return len(ids)


def target_text(row: Row) -> str:
    """What the assistant is to say: the `response` column, or reasoning and answer with tags.

    Reasoning that starts with one closed `<think>` is wrapped already; a tag that is never closed
    is only text. Raises BadSample for a `</think>` that would end the thinking too early.
    """
    response = row.columns.get(RESPONSE)
    if response:
        return str(response).strip()
    wrapped = _THOUGHT.fullmatch(row.reasoning)
    if wrapped and not _THINK_TAG.search(wrapped[2]):
        whole = _ANSWER.search(wrapped[2])
        return row.reasoning if whole else f"{row.reasoning} <answer>{row.answer}</answer>"
    thought = row.reasoning.removeprefix("<think>").removesuffix("</think>").strip()
    if "</think>" in thought:
        raise BadSample(
            "bad_reasoning",
            row,
            "its tags do not match, so that thinking would end in the middle of it; write "
            "<think>reasoning</think>, or the reasoning without tags",
        )
    return f"<think>{thought}</think> <answer>{row.answer}</answer>"


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of samples grouped into micro-batches of at most `max_tokens` tokens.

    First-fit decreasing: deterministic, and at most 22% more groups than the optimum (Johnson
    1974). A sample longer than `max_tokens` gets a group of its own, so that it still runs.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((g for g, free in enumerate(room) if lengths[i] <= free), None)
        if fits is None:
            groups.append([i])
            room.append(max_tokens - lengths[i])
        else:
            groups[fits].append(i)
            room[fits] -= lengths[i]
    return [sorted(group) for group in groups]


def _required(columns: Mapping[str, Any]) -> Sequence[str]:
    if columns.get(MESSAGES):
        return ()
    if columns.get(RESPONSE):
        return ("problem",)
    return ("problem", "answer", "reasoning")


def _as_message(row: Row, message: Any) -> Message:
    """One entry of `messages`; content is a text or a list of text, image and video parts."""
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(_part_text(row, part) for part in content)
    if role not in _ROLES or not isinstance(content, str):
        raise BadSample(
            "bad_message",
            row,
            f"{str(message)[:80]!r} is no turn; write {{'role': 'user', 'content': 'text'}} with "
            f"one of the roles {', '.join(_ROLES)}",
        )
    return {"role": role, "content": content.strip() if role == "assistant" else content}


def _part_text(row: Row, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "video"):
        return f"<{kind}>"
    raise BadSample("bad_message", row, f"{str(part)[:80]!r} is no text, image or video part")
