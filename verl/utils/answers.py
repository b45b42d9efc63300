"""The one answer extractor, shared by rewards, validation and evaluation. Imports no torch.

Layers are tried in order, and the first that yields an offered option wins; the layer is kept. What
stands inside `<think>` is never read, and an answer is never guessed: a response that says nothing
has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
THINK_OPEN = re.compile(r"<think>", re.IGNORECASE)
THINK_CLOSE = re.compile(r"</think>", re.IGNORECASE)
OPTION = re.compile(r"(?:^|\s)\(?([A-Z])\s*[.):](?:\s+|(?=\S))([^\n]*?)(?=\s+\(?[A-Z]\s*[.):]|\s*$)", re.M)
LABEL = re.compile(r"^\s*\(?([A-Za-z])\s*[.):]\s*(.*)$", re.DOTALL)
LONE_LETTER = re.compile(r"^[\s*_`\"'(\[]*([A-Za-z])[\s*_`\"')\].,:;!]*$")
STATED = re.compile(
    r"\b(?:answer|option|choice)\b\s*(?:is|:|=)?\s*(?:option\s+)?[*_`\"'(\[]*([A-Z])\b(?!')", re.IGNORECASE
)
NOUN = re.compile(r"\s+(?!because|since|as\b|and\b|or\b)[a-z]")
NEGATED = re.compile(r"(?:\bnot\b|n't|\bneither\b|\bnor\b)[^.;,\n]{0,20}$", re.IGNORECASE)


@dataclass(frozen=True)
class Extraction:
    """An answer and where it was found."""

    answer: str | None
    """An offered letter, or free text where no options are offered; None when nothing was found."""
    layer: str
    """answer_tag, boxed, after_think, stated, option_text, truncated or none."""


@dataclass(frozen=True)
class AnswerScore:
    """Whether a response is right."""

    extracted: str | None
    correct: bool
    """By any layer."""
    strict: bool
    """The `<answer>` span is exactly the gold answer."""
    layer: str


def option_letters(options: Sequence[str], question: str = "") -> dict[str, str]:
    """Offered letters with their texts, from a list of options or else from the question.

    An option may carry its letter (`A. cat`, `(A) cat`, `A:cat`); otherwise letters count from A.
    """
    if options:
        labelled = [LABEL.match(o) for o in options]
        expected = [chr(ord("A") + i) for i in range(len(options))]
        if all(m and m.group(1).upper() == e for m, e in zip(labelled, expected, strict=True)):
            return {m.group(1).upper(): m.group(2).strip() for m in labelled if m}
        return dict(zip(expected, (o.strip() for o in options), strict=True))
    found: dict[str, str] = {}
    for letter, text in OPTION.findall(question):
        if letter == chr(ord("A") + len(found)):
            found[letter] = text.strip()
    return found if len(found) > 1 else {}


def extract_answer(response: str, letters: dict[str, str]) -> Extraction:
    """The answer that a response gives; with `letters`, one of them or none."""
    spans = ANSWER.findall(after_thinking(response) or "")
    if spans:
        found = _read(spans[-1], letters)
        if found:
            return Extraction(found, "answer_tag")
    rest = after_thinking(response)
    if rest is None:
        return Extraction(None, "truncated")
    boxed = BOXED.findall(rest)
    if boxed and (found := _read(boxed[-1], letters)):
        return Extraction(found, "boxed")
    if not letters:
        text = ANSWER.sub("", rest).strip()
        return Extraction(text, "after_think") if text and not spans else Extraction(None, "none")
    if found := _read(rest, letters):
        return Extraction(found, "after_think")
    if found := _stated(rest, letters):
        return Extraction(found, "stated")
    if found := _unique_option_text(rest, letters):
        return Extraction(found, "option_text")
    return Extraction(None, "none")


def after_thinking(response: str) -> str | None:
    """What follows the last `</think>`; None when thinking was opened and never closed."""
    closes = list(THINK_CLOSE.finditer(response))
    opens = list(THINK_OPEN.finditer(response))
    last_close = closes[-1].end() if closes else 0
    if opens and opens[-1].start() >= last_close:
        return None
    return response[last_close:]


def score_answer(
    response: str, gold: str, options: Sequence[str] = (), question: str = ""
) -> AnswerScore:
    """Scores a response against a gold letter, or gold text where no options are offered."""
    letters = option_letters(options, question)
    gold_letter = _read(gold, letters) if letters else None
    if gold_letter is None:
        letters = {}
    wanted = gold_letter or normalise(gold)
    found = extract_answer(response, letters)
    given = found.answer if letters or found.answer is None else normalise(found.answer)
    rest = after_thinking(response)
    spans = ANSWER.findall(rest) if rest is not None else []
    exact = bool(spans) and spans[-1].strip() == (gold_letter or gold.strip())
    correct = given is not None and given == wanted
    return AnswerScore(found.answer, correct, exact and correct, found.layer)


def normalise(text: str) -> str:
    """Lower case, single spaces, no articles, no punctuation at the ends; numbers as numbers."""
    text = re.sub(r"\s+", " ", text.strip().lower()).strip(" .,:;!?\"'*`()[]")
    text = re.sub(r"^(?:the|a|an) ", "", text)
    number = re.fullmatch(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return f"{float(text.replace(',', '')):g}" if number else text


def strip_answer_tags(text: str) -> str:
    """The content of the last `<answer>` span, over any number of lines; else the text itself."""
    spans = ANSWER.findall(text)
    return (spans[-1] if spans else text).strip()


def _read(span: str, letters: dict[str, str]) -> str | None:
    """A span that is nothing but an answer: a letter, `C. text`, `C:text`, or an option's text."""
    text = span.strip()
    if not letters:
        return text or None
    if (lone := LONE_LETTER.match(text)) and lone.group(1).upper() in letters:
        return lone.group(1).upper()
    label = LABEL.match(text)
    if label and label.group(1).upper() in letters:
        letter = label.group(1).upper()
        if normalise(label.group(2)) in ("", normalise(letters[letter])):
            return letter
        if not _mentions_other(label.group(2), letter, letters):
            return letter
        return None
    same = [k for k, v in letters.items() if v and normalise(v) == normalise(text)]
    return same[0] if len(same) == 1 else None


def _mentions_other(text: str, letter: str, letters: dict[str, str]) -> bool:
    """True when the text behind a letter names another option, by letter or by its text."""
    if any(re.search(rf"(?<![\w']){k}(?![\w'])", text) for k in letters if k not in (letter, "A")):
        return True
    low = normalise(text)
    return any(v and normalise(v) == low for k, v in letters.items() if k != letter)


def _stated(text: str, letters: dict[str, str]) -> str | None:
    """The last "answer is X" that is not negated."""
    for match in reversed(list(STATED.finditer(text))):
        letter, rest = match.group(1), text[match.end(1) :]
        # A lower-case letter is an article or a word; so is "A" before a noun ("is A man").
        if letter not in letters or (letter == "A" and NOUN.match(rest)):
            continue
        if not NEGATED.search(text[: match.start(1)]):
            return letter
    return None


def _unique_option_text(text: str, letters: dict[str, str]) -> str | None:
    """The one option whose text occurs in the response as whole words."""
    low = " ".join(text.lower().split())
    hits = []
    for letter, option in letters.items():
        words = re.escape(" ".join(option.lower().split()))
        for match in re.finditer(rf"(?<!\w){words}(?!\w)", low) if option else ():
            if NEGATED.search(low[: match.start()]):
                return None
            hits.append(letter)
    return hits[0] if len(set(hits)) == 1 else None
