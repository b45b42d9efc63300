"""Reads Chinese sentences that name an option: "答案是C", "故选C", "C是正确的".

The same rules as in `verl.utils.answer_statements`: what is negated, asked or conditional does not
count, and what names two options settles nothing. Texts come through `western` first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from verl.utils.answer_statements import UNUSABLE, text_differs

_WESTERN = str.maketrans(
    {
        **{"。": ". ", "．": ". ", "，": ", ", "、": ", ", "：": ": ", "；": "; "},
        **{
            "！": "! ",
            "？": "? ",
            "（": "(",
            "）": ")",
            "【": "[",
            "】": "]",
            "「": '"',
            "」": '"',
        },
        **{"\u201c": '"', "\u201d": '"', "\u3000": " "},
        **{chr(0xFF21 + i): chr(ord("A") + i) for i in range(26)},
        **{chr(0xFF41 + i): chr(ord("a") + i) for i in range(26)},
    }
)

_OPEN = r"[*_`\"'(\[$]{0,4}"
_CLOSE = r"[*_`\"')\]$]{0,4}"
_LETTER = rf"\s?{_OPEN}(?P<letter>[A-Za-z])(?![A-Za-z0-9'’-])"
_SURELY = r"(?:应该|应当|应|就|显然|确实|只能)?"
# A letter may begin a name (C罗): only these may follow it without a space.
_GOES_ON = (
    rf"(?={_CLOSE}\s?(?:\Z|[.,;:!?\n/|&+]|选项|项|因为|由于|所以|而|吗|么|和|或|与|及|以及|还是|才|是"
    r"|不|错))"
)
_STATEMENTS = [
    re.compile(
        rf"(?:答案|正确选项|正确的选项)\s?{_SURELY}(?:是|为|选)?\s?:?\s?(?:选项|选)?{_LETTER}{_GOES_ON}"
    ),
    re.compile(rf"选(?:择|的是)?(?!项)\s?:?{_LETTER}{_GOES_ON}"),
    re.compile(
        r"(?:\A|(?<=[\s.,;:!?(\[\"'*])|(?<=选项)|(?<=只有)|(?<=所以)|(?<=因此)|(?<=[而故则]))"
        rf"(?P<letter>[A-Z]){_CLOSE}\s?(?:选项|项)?\s?(?:才|{_SURELY})是?"
        rf"(?:最)?(?:正确|对)的?(?:答案|选项)?(?={_CLOSE}\s?(?:\Z|[.,;!\n]))"
    ),
]
_TEXT = re.compile(rf"答案\s?{_SURELY}(?:是|为|:)\s?:?\s?([^.,;!?\n]{{1,200}})(?=[.,;!\n]|\Z)")
_DOUBT_BEFORE = re.compile(
    r"(?:不|非|没|未|别|勿|误|错|如果|假如|假设|若|是否|要么|难道|排除|怀疑|可|备|候|他|她|有人|人们|同学|学生)[^.,;:!?\n]{0,12}\Z"
)
_REJECTED = re.compile(
    rf"{_CLOSE}\s?(?:选项|项)?(?:是|显然|明显)?(?:错|不|误|有误|\?|吗|么)|{_CLOSE}\s?\?"
)
_TAKEN_BACK = re.compile(
    r"[.,;!?\n]\s{0,2}[哦噢嗯]?,?\s?(?:不,|不对|不是(?!\s?[A-Z])|等等|等一下|我错|说错)"
    r"|[.,;!?\n]\s{0,2}(?:其实|实际上|更正|纠正|抱歉)[^.!?\n]{0,12}?(?<![A-Za-z])[A-Z](?![A-Za-z])"
)
_JOIN = r"(?:,? ?(?:或者|或|还是|和|与|及|以及)|[,/|&+])"
_ANOTHER = re.compile(
    rf"{_CLOSE}\s?{_JOIN}\s?(?:可能是?|也许是?)?(?:选项)?\s?{_OPEN}(?P<letter>[A-Za-z])"
    rf"(?![A-Za-z0-9])(?={_CLOSE}\s?(?:\Z|[.,;!?\n/|&+]|或|和|与|及|都|两|均))"
)
_ANOTHER_BEFORE = re.compile(rf"(?<![A-Za-z0-9])([A-Z]){_CLOSE}\s?{_JOIN}\s?{_OPEN}\Z")
_LAST = 100  # statements that are read, from the end
_CLAUSE = 80


def western(text: str) -> str:
    """The text with ASCII letters, brackets and punctuation in place of full-width ones."""
    return text if text.isascii() else text.translate(_WESTERN)


def stated_letter(text: str, letters: Mapping[str, str]) -> str | None:
    """The option that the last valid statement settles on, UNUSABLE, or None without one."""
    if text.isascii():
        return None
    found = sorted(
        (m for p in _STATEMENTS for m in p.finditer(text)), key=lambda m: m.start("letter")
    )
    for match in reversed(found[-_LAST:]):
        letter, end = match["letter"].upper(), match.end("letter")
        before = text[max(0, match.start() - _CLAUSE) : match.start()]
        if _DOUBT_BEFORE.search(before) or _REJECTED.match(text, end):
            continue
        before = text[max(0, match.start("letter") - _CLAUSE) : match.start("letter")]
        another = _ANOTHER.match(text, end)
        other = another["letter"] if another else None
        if earlier := _ANOTHER_BEFORE.search(before):
            other = earlier[1]
        if other and other.upper() in letters and other.upper() != letter:
            return UNUSABLE
        if text_differs(text, end, letter, letters):
            return UNUSABLE
        if _TAKEN_BACK.search(text, end) or _denied(letter, text[end:]):
            return UNUSABLE
        return letter if letter in letters else UNUSABLE
    return None


def _denied(letter: str, rest: str) -> bool:
    """Whether the text after a statement says that its letter is wrong."""
    own = rf"(?<![A-Za-z0-9]){letter}(?![A-Za-z0-9])"
    pattern = rf"{own}\s?(?:选项|项)?是?(?:错|不)|不(?:是|选)\s?{own}"
    return re.search(pattern, rest) is not None


def stated_text(text: str) -> str:
    """What follows the last "答案是", up to the end of the clause; empty when there is doubt."""
    found = [] if text.isascii() else list(_TEXT.finditer(text))
    if not found or _DOUBT_BEFORE.search(
        text[max(0, found[-1].start() - _CLAUSE) : found[-1].start()]
    ):
        return ""
    return found[-1][1].strip()
