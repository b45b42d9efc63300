"""The one answer extractor, shared by rewards, validation and evaluation. Imports no torch.

Layers are tried in order, and the first that yields an offered option wins; its name is kept. What
stands inside `<think>`, or a tag of that meaning, is never read, and an answer is never guessed: a
response that says nothing, or names two options, has none. Every step takes time linear in the
response, whatever a model writes: see `tests/utils/test_answers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from verl.utils import answer_chinese
from verl.utils.answer_chinese import western
from verl.utils.answer_statements import (
    UNUSABLE,
    another_named,
    doubted,
    letters_named,
    option_named,
    rejects,
    stated_letter,
    text_differs,
    withdrawn,
)

# Not only what our prompts ask for: a base model brings the tags that it was trained on.
THINK = re.compile(
    r"(?:<\s{0,3}|◁|\[(?=/?think\]))(/?)\s{0,3}(?:think|thinking|thoughts?|reasoning|analysis|思考)"
    r"\s{0,3}[>▷\]]",
    re.IGNORECASE,
)
TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
SPECIAL_TOKEN = re.compile(r"<\|[^<>|\s]{1,40}\|>|</s>")
BRACE = re.compile(r"\\boxed\s{0,4}\{|\\.|[{}]", re.DOTALL)
LATEX = re.compile(r"\\(?:boxed|text\w{0,2}|math\w{2})\s{0,4}\{(.*)\}", re.DOTALL)
LABEL = re.compile(r"\(?([A-Za-z])\s?[.):]\s*(.*)", re.DOTALL)
LEADING_LABEL = re.compile(r"\(?([A-Z])(?:[.):]{1,2}[^\S\n]|[.):]{0,2}\s{0,4}\n)\s*(.*)", re.DOTALL)
FIRST_CLAUSE = re.compile(
    r"[\s.,;:!*-]*((?:(?!\b(?:because|since|as)\b)[^.,;!\n])*)", re.IGNORECASE
)
UNFINISHED = re.compile(
    r"(?:\b(?:not|or|and|nor|if|no)|n['’]t|[,/+&]) ?:?$"
    r"|\b(?:wrong|incorrect|false|eliminated?|excluded?|ruled out)\b[^.!?\n]{0,40}:$",
    re.IGNORECASE,
)
BOX_UNFINISHED = re.compile(
    r"(?:\b(?:not|nor|or|except)|n['’]t)[\s:$*(\[]{0,8}$|\b(?:wrong|incorrect|false)\b[^.!?\n]{0,40}:"
    r"[\s$*]{0,8}$"
    r"|\b(?:wrong|incorrect|false|worst|unlikely|least likely|rejected|eliminated|excluded)"
    r" (?:answer|option|choice)s?\b[^.!?\n]{0,20}$"
    r"|(?<![\w'’-])(?-i:[A-Z])[)$*]{0,3} ?(?:and|,|/|&) ?[$*]{0,3}$",
    re.IGNORECASE,
)
LONE_LETTER = re.compile(r"[*_`\"'(\[$]*([A-Za-z])[\s*_`\"')\].,:;!$]*")
NAMED_LETTER = re.compile(
    r"(?:option|choice|answer|选项|答案)\s?:?\s?\(?([A-Za-z])\)?\.?\s?", re.IGNORECASE
)
BOLD_LETTER = re.compile(r"\*\*\(?([A-Z])\)?[.:]?\*\*")
MARKER = re.compile(r"(?:^|(?<=\s))\(?([A-Z])\s?[.):](?!\w\.)", re.MULTILINE)
LINE_LABEL = re.compile(r"^[ \t]*\(?[A-Z][.):]", re.MULTILINE)
NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
EDGES = " ,:;!?\"'*`()[]$，。！？；：、"
LEADING = re.compile(rf"(?:(?:the|an?) |[{re.escape(EDGES)}])+")


@dataclass(frozen=True)
class Extraction:
    """An answer and where it was found."""

    answer: str | None
    """An offered letter, or free text where no options are offered; None when nothing was found."""
    layer: str
    """answer_tag, open_tag (never closed), boxed, after_think (nothing else is said), stated ("the
    answer is C"), final_line, option_text, truncated (in its thinking) or none."""


@dataclass(frozen=True)
class AnswerScore:
    """Whether a response is right."""

    extracted: str | None
    correct: bool
    """By any layer."""
    strict: bool
    """The last `<answer>` span is exactly the gold answer."""
    layer: str


def score_answer(
    response: str, gold: str, options: Sequence[str] = (), question: str = ""
) -> AnswerScore:
    """Scores a response against a gold letter, or gold text where no options are offered.

    Options that only stand in the question count when the gold answer is one of them.
    """
    letters = option_letters(options, question)
    gold = _last_filled(_tagged(gold)[0]) or gold.strip()
    gold_letter = gold_option(gold, letters)
    if gold_letter is None and not options:
        letters = {}
    found = extract_answer(response, letters)
    if letters:
        correct = found.answer is not None and found.answer == gold_letter
    else:
        correct = found.answer is not None and same_text(found.answer, gold)
    span = _last_filled(_tagged(after_thinking(response) or "")[0])
    strict = correct and span == (gold_letter or gold)
    return AnswerScore(found.answer, correct, strict, found.layer)


def extract_answer(response: str, letters: dict[str, str]) -> Extraction:
    """The answer that a response gives; with `letters`, one of them or none."""
    rest = after_thinking(response)
    if rest is None:
        return Extraction(None, "truncated")
    if letters:
        rest, letters = western(rest), {k: western(text) for k, text in letters.items()}
    spans, opened, outside = _tagged(SPECIAL_TOKEN.sub(" ", rest))
    boxed = last_boxed(outside)
    if letters and boxed and _box_doubted(outside, letters):
        # What is said of the box is read like any other text.
        boxed, outside = "", _without_boxes(outside)[0]
    tagged = {"answer_tag": _last_filled(spans), "open_tag": opened, "boxed": boxed}
    if not letters:
        text = outside.strip() if not any(spans) and not opened else ""
        said = {**tagged, "after_think": text}
        return next((Extraction(t.strip(), k) for k, t in said.items() if t.strip()), _NONE)
    for layer, text in tagged.items():
        if found := _exact(text, letters):
            return Extraction(found, layer)
        if LONE_LETTER.fullmatch(text.strip()):
            return _NONE  # it names an option that is not offered; nothing else outweighs that
        if found := _said(text, letters)[0]:
            return Extraction(found, layer)
    if found := _exact(outside, letters):
        return Extraction(found, "after_think")
    found, layer = _said(outside, letters)
    return Extraction(found, layer) if found else _NONE


_NONE = Extraction(None, "none")


def gold_option(gold: str, letters: dict[str, str]) -> str | None:
    """The letter of a gold answer that is an offered letter or an option's text; None otherwise."""
    return _exact(western(gold), {k: western(text) for k, text in letters.items()})


def after_thinking(response: str) -> str | None:
    """What follows the last `</think>`; None when thinking was opened and never closed."""
    end, thinking = 0, False
    for tag in THINK.finditer(response):
        thinking = not tag[1]
        if not thinking:
            end = tag.end()
    return None if thinking else response[end:]


def last_boxed(text: str) -> str:
    """Content of the last `\\boxed{...}`, with braces nested to any depth; empty without one."""
    boxes = _boxes(text)
    if not boxes:
        return ""
    last = max(boxes)  # of boxes in boxes, the innermost
    return text[last[0] : last[1]]


def option_letters(options: Sequence[str], question: str = "") -> dict[str, str]:
    """Offered letters with their texts, from a list of options or else from the question.

    Options may carry their letters (`A. cat`, `(A) cat`, `A:cat`), in any order, or in rising order
    with gaps (A, C, D); otherwise letters count from A. Beyond 26 options there are none, and
    answers are compared as text.
    """
    if not options:
        return _letters_in(question)
    texts = [o.strip() for o in options]
    if len(texts) > 26:
        return {}
    labels = [LABEL.fullmatch(t) for t in texts]
    labelled = {m[1].upper(): m[2].strip() for m in labels if m}
    if _are_labels(list(labelled), len(texts)):
        return labelled
    bare = [t.upper() for t in texts]
    if _are_labels(bare, len(texts)):
        return dict.fromkeys(bare, "")
    return {chr(ord("A") + i): text for i, text in enumerate(texts)}


def normalise(text: str) -> str:
    """Lower case, single spaces, no article, no punctuation at the ends; numbers as numbers."""
    text = " ".join(text.casefold().replace("\u2212", "-").split())
    text = text.rstrip(EDGES + ".")
    leading = LEADING.match(text)
    text = text[leading.end() :] if leading else text
    number = NUMBER.fullmatch(text)
    if not number:
        return text
    whole = number[2].replace(",", "").lstrip("0") or "0"
    fraction = (number[3] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if number[1] == "-" and value != "0" else value


def same_text(given: str, wanted: str) -> bool:
    """True when two texts are equal once normalised; of signs alone, when they are the same."""
    return normalise(given) == normalise(wanted) if normalise(wanted) else given.strip() == wanted


# --- pieces --------------------------------------------------------------------------------------


def _tagged(text: str) -> tuple[list[str], str, str]:
    """Contents of closed innermost `<answer>` spans, of a last unclosed one, and text outside."""
    spans, outside, start, end = [], [], None, 0
    for tag in TAG.finditer(text):
        if tag[1] and start is not None:
            spans.append(text[start : tag.start()])
            start = None
        elif start is None:
            outside.append(text[end : tag.start()])
        if not tag[1]:
            start = tag.end()
        end = tag.end()
    opened = text[start:].strip() if start is not None else ""
    return spans, opened, "\n".join([*outside, text[end:] if start is None else ""])


def _boxes(text: str) -> list[tuple[int, int]]:
    """Where the contents of all `\\boxed{...}` start and end, in the order of their ends."""
    opened: list[tuple[bool, int]] = []
    boxes = []
    for brace in BRACE.finditer(text):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append((len(brace[0]) > 1, brace.end()))
        elif brace[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                boxes.append((start, brace.start()))
    return boxes


def _without_boxes(text: str) -> tuple[str, int, int]:
    """The text with innermost boxes replaced by their contents, and where the last of them is."""
    pieces, done, length, start = [], 0, 0, 0
    for begin, end in sorted(_boxes(text)):
        opening = text.rfind("\\boxed", done, begin)
        if opening < 0:
            continue  # It closes inside of the box before.
        content = LATEX.sub(r"\1", text[begin:end])
        pieces += [text[done:opening], content]
        start = length + opening - done
        length, done = start + len(content), end + 1
    return "".join([*pieces, text[done:]]), start, length


def _box_doubted(text: str, letters: dict[str, str]) -> bool:
    """Whether the last box is negated, ruled out, withdrawn, or one of several answers."""
    text, start, end = _without_boxes(text)
    before = text[max(0, start - 80) : start]
    if doubted(text, start, end) or BOX_UNFINISHED.search(before):
        return True
    letter = _exact(text[start:end], letters)
    if letter is None:
        return False
    return (
        another_named(text, end, letter, letters)
        or text_differs(text, end, letter, letters)
        or withdrawn(letter, text[end:], letters)
    )


def _last_filled(spans: Sequence[str]) -> str:
    return next((s.strip() for s in reversed(spans) if s.strip()), "")


def _exact(text: str, letters: dict[str, str]) -> str | None:
    """The letter of a text that is nothing but an option: `C`, `(c)`, `C. red`, `red`."""
    text = text.strip()
    for _ in range(3):
        text = text.strip("$*_` \n")
        if not (inner := LATEX.fullmatch(text)):
            break
        text = inner[1]
    lone = LONE_LETTER.fullmatch(text) or NAMED_LETTER.fullmatch(text)
    if lone:
        return lone[1].upper() if lone[1].upper() in letters else None
    label = LABEL.fullmatch(text)
    if label and (own := letters.get(label[1].upper())) and same_text(label[2], own):
        return label[1].upper()
    same = [k for k, own in letters.items() if own and same_text(text, own)]
    return same[0] if len(same) == 1 else None


def _said(text: str, letters: dict[str, str]) -> tuple[str | None, str]:
    """The letter that a text of several words settles on, and by which layer."""
    if (found := _stated(text, letters)) is not None:
        return (None if found == UNUSABLE else found), "stated"
    if found := _final_line(text, letters):
        return found, "final_line"
    bold = list(BOLD_LETTER.finditer(text))
    if bold and len({m[1] for m in bold}) == 1 and bold[0][1] in letters:
        unsure = any(
            doubted(text, m.start(), m.end())
            or another_named(text, m.end(1), m[1], letters)
            or text_differs(text, m.end(), m[1], letters)
            for m in bold[-100:]
        )
        unsure = unsure or withdrawn(bold[0][1], text[bold[-1].end() :], letters)
        return (None if unsure else bold[0][1]), "final_line"
    label = LEADING_LABEL.fullmatch(text.strip())
    if label and (found := _labelled(label, letters)) is not None:
        return (None if found == UNUSABLE else found), "after_think"
    return option_named(text, letters), "option_text"


def _stated(text: str, letters: dict[str, str]) -> str | None:
    """What sentences in English or Chinese settle on; UNUSABLE when they differ."""
    found = {stated_letter(text, letters), answer_chinese.stated_letter(text, letters)} - {None}
    if found:
        return found.pop() if len(found) == 1 else UNUSABLE
    words = answer_chinese.stated_text(text)
    return None if LONE_LETTER.fullmatch(words) else _exact(words, letters)


def _final_line(text: str, letters: dict[str, str]) -> str | None:
    """An option alone on the last line, unless the line before it is one too or goes on with it."""
    before, newline, last = text.strip().rpartition("\n")
    before = before.rstrip()
    if not newline or LINE_LABEL.search(before) or UNFINISHED.search(before[-80:]):
        return None
    found = _exact(last, letters)
    return found if _exact(before.rpartition("\n")[2], letters) in (None, found) else None


def _labelled(label: re.Match[str], letters: dict[str, str]) -> str | None:
    """`C. because ...`: a leading label; None when another option is named, too.

    UNUSABLE when it is not offered, whatever words follow it, and when they speak against it.
    """
    if label[1] not in letters:
        return UNUSABLE
    own, rest = letters[label[1]].rstrip(" ."), label[2]
    if own and rest.casefold().startswith(own.casefold()):
        rest = rest[len(own) :]
    clause = FIRST_CLAUSE.match(rest)
    if rest.lstrip(" *").startswith("?") or (clause and rejects(clause[1])):
        return UNUSABLE
    others = {k: v for k, v in letters.items() if k != label[1]}
    if letters_named(rest, others) or option_named(rest, others, doubtful=True):
        return None
    return label[1]


def _are_labels(found: Sequence[str], n: int) -> bool:
    """Whether letters found in n options label them, and are not initials: "I. Newton"."""
    ranks = [ord(letter) - ord("A") for letter in found if re.fullmatch(r"[A-Z]", letter)]
    if len(set(ranks)) != n:
        return False
    return sorted(ranks) == list(range(n)) or (ranks == sorted(ranks) and ranks[-1] < 2 * n)


def _letters_in(question: str) -> dict[str, str]:
    """Options that stand in a question, at the start of lines or one after another."""
    chain: list[re.Match[str]] = []
    for marker in MARKER.finditer(question):
        if marker[1] == "A" and len(chain) < 2:
            chain = [marker]
        elif chain and marker[1] == chr(ord("A") + len(chain)):
            chain.append(marker)
    if len(chain) < 2:
        return {}
    texts = [question[m.end() : n.start()] for m, n in pairwise(chain)]
    texts.append(question[chain[-1].end() :].partition("\n")[0])
    return {m[1]: text.strip() for m, text in zip(chain, texts, strict=True)}
