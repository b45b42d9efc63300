"""Reads sentences that name an option: "the answer is C", "C is correct", an option's own words.

Used by `verl.utils.answers` on text that is more than an answer. A statement that is negated, asked
or conditional does not count, and one that names two options settles nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

UNUSABLE = ""
"""A statement was made, but of several options or of one that is not offered."""

_OPEN = r"[*_`\"'(\[$]{0,4}"
_ALONE = r"(?![\w'’-])(?!\.\w)"
_LETTER = rf"(?:the )?(?:option |choice |letter )?(?P<open>{_OPEN})(?P<letter>[A-Za-z]){_ALONE}"
_IS = r"(?: is| was| would be| should be| must be| has to be| seems to be| appears to be)"
_SURELY = (
    r"(?: clearly| definitely| therefore| thus| most likely| likely| probably| indeed| still)?"
)
_NOUN = r"(?:answer|option|choice|solution)"

_STATEMENTS = [
    re.compile(
        rf"\b{_NOUN}[*_\"']{{0,3}}(?:{_IS}{_SURELY} ?:?| ?[:=])[*_]{{0,2}}\s?{_LETTER}", re.I
    ),
    re.compile(rf"\b(?:final|correct|right|best) {_NOUN} {_LETTER}", re.I),
    re.compile(
        rf"\b(?:I|we)(?:'d|'ll| would| will| should)?(?: choose| chose| pick| picked| select"
        rf"| selected| go with| answer| say)(?: {_NOUN})? {_LETTER}",
        re.I,
    ),
    re.compile(
        r"(?<![\w'’.-])(?P<open>)(?P<letter>[A-Z])[)\]*\"']{0,3}(?: is| must be| would be)"
        r"(?: the| clearly| definitely| most| only){0,2} (?:correct|right|best|true|answer)"
        rf"(?: {_NOUN}| one)?(?= ?[*_)\"']{{0,3}}(?:\s?$|[.,;:!\n]| because| since| as| and| here))"
    ),
]
# Only where nothing above is said: "it" may be anything.
_WEAK_STATEMENT = re.compile(rf"\b(?:it is|it's|it must be|must be|should be) {_LETTER}", re.I)

_CLOSE = r"[)\]*_\"'`$]{0,4}"
_CLAUSE_END = re.compile(rf"{_CLOSE}(?:\s?$|[.,;\n])")
_QUESTION = re.compile(rf"{_CLOSE} ?\?")
_REJECTED = re.compile(
    rf"{_CLOSE} ?(?:(?:is|was|are|does|did|do|could|would|can|has)(?:n['’]t| not)\b"
    r"|cannot\b|never\b|(?:is|was|seems|looks|would be|must be|can be|could be) "
    r"(?:clearly |definitely |also )?"
    r"(?:wrong|incorrect|false|unlikely|impossible|ruled|eliminated|excluded|rejected|out)\b"
    rf"|[:-] ?{_OPEN}(?:wrong|incorrect)\b)",
    re.I,
)
_DOUBT_BEFORE = re.compile(
    r"(?:\bnot\b|n['’]t\b|\bneither\b|\bnor\b|\bnever\b|\bno\b(?! doubt| question)"
    r"|\bwithout\b(?! (?:a )?doubt)|\bcannot\b|\bif\b|\bwhether\b|\bunless\b|\bsuppos|\bassum"
    r"|\beither\b|\bunsure\b|\bunclear\b|(?<!\bno )\bdoubt|\btempting to\b|\binitially\b"
    r"|\boriginally\b|\b(?:he|she|they|you|one|some|someone|people|students?|others?|many) "
    r"(?:\w+ ){0,2}(?:say|said|think|thought|believe|claim|argue|guess|suggest)(?:e?s|e?d)?\b"
    # "He is not shown, so the answer is C", also without the comma.
    r")(?:(?!\b(?:so(?! that)|therefore|thus|hence)\b)[^.;:,!?\n]){0,40}$"
    r"|\bat first(?: glance| sight)?,? [^.;:!?\n]{0,40}$"
    r"|\b(?:correct|right) and $"
    # "The wrong answer is A", "one possible answer is A".
    r"|(?<!\bonly )(?<!\bmost )\b(?:wrong|incorrect|false|worst|unlikely|least \w+|common|popular"
    r"|tempting|possible|potential|plausible|other|another|first|second|next|initial|previous"
    r"|alternative|rejected|eliminated|excluded|their|his|her|your) $",
    re.I,
)
_RULED_OUT_BEFORE = re.compile(
    r"\b(?:rul(?:e|ed|es|ing) out|eliminat|exclud|reject|dismiss|discard|except|other than\b"
    r"|(?:apart|aside) from\b|(?:any|every)(?:thing|one|body)? but\b|all but\b|rather than\b"
    r"|instead of\b)"
    # "Having ruled out A and B the answer is C".
    r"(?:(?!\b(?:answer|option|choice) is\b)[^.;:,!?\n]){0,40}$",
    re.I,
)
_WITHDRAWAL = re.compile(
    r"(?:\A|[.!?…\n,;(—–-]) ?(?:oh,? |hmm?,? |but |well,? |oops,? )?"
    r"(?:(?:actually|correction|or rather|I mean|I meant|on second thoughts?)\b"
    r"|(?:no|wait|sorry|rather|oops|hold on)\b ?[,.:;!…—–-])(?P<clause>[^.!?\n]{0,80})",
    re.I,
)
_LABEL_END = re.compile(
    r"[)\]}*_\"'`$]{0,4} ?[.:,;=(–—-]{0,2}[\s*_\"'(\[]{0,4}(?:(?:the|an?) )?", re.I
)
_TEXT_END = re.compile(r"[\"'*_)\]$ ]{0,4}(?:[.,;!?\n]|\Z)")
_TAKEN_BACK = re.compile(
    r"(?:\A|[.!?…\n,]|\bno\b|\bbut\b)[ ,]*(?:oh,? |hmm?,? |actually,? )?(?:\bno,? |\bbut )?"
    r"(?:wait\b|scratch that\b|I was wrong\b|I made a mistake\b"
    r"|(?:that|this|it)(?:['’]s| is| was) (?:wrong|incorrect|not (?:right|correct|it))\b)"
    r"|\band (?-i:[A-Z]) is (?:correct|right|true)\b"
    r"|(?<![\w'’-])(?-i:[A-Z]) is also (?:correct|right|true)\b",
    re.I,
)
_OR = re.compile(
    rf"{_CLOSE} ?(?:[/|&+]|,? ?\bor\b)(?: maybe| possibly| perhaps| option)? ?{_OPEN}"
    r"(?P<letter>[A-Za-z])(?![\w'’-])(?P<noun> [a-z])?",
)
_AND = re.compile(
    rf"{_CLOSE} ?(?:[,;]|[.,;]? ?\b(?:[Aa]nd|as well as|plus|then)\b|(?= ))"
    # "C; A and B are wrong" names C alone.
    r"(?![^.;!?\n]{0,30}\b(?:is|are)(?:n['’]t| not| wrong| incorrect| false| ruled| eliminated)\b)"
    rf"(?: maybe| possibly| perhaps| option| also)? ?{_OPEN}"
    rf"(?P<letter>[A-Z])(?![\w'’-]){_CLOSE}(?: ?$|[.,;!\n]| or\b| and\b| are\b| both\b)",
)
# "A" and "I" are words too: letters only before one of these.
_AFTER_LETTER = (
    r"is|was|or|and|because|since|as|but|given|due|which|not|would|must|seems|looks|cannot|does"
)
_WORD = re.compile(rf" (?!(?:{_AFTER_LETTER})\b)[a-z]")
_NAMED = re.compile(r"(?<![\w'’.-])([A-Z])(?![\w'’-])(?!\.\w)")
_AGAINST = re.compile(
    r"\b(?:wrong|incorrect|false|unlikely|impossible|ruled out|eliminated?|excluded?|rejected"
    r"|not?|never|cannot|neither)\b|n['’]t\b|错|不|没|非",
    re.I,
)
_OF_OTHERS = re.compile(r"\b(?:others?|rest|remaining)\b|其他|其余|其它", re.I)
_CLAUSE = 80
_LAST = 100  # statements that are read, from the end: a text with more of them says nothing
_NUMERIC = re.compile(r"[-+$]?[\d.,:]+%?")
_COMMON = frozenset(
    ("yes", "no", "true", "false", "none", "all", "any", "both", "not")
    + ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
)


def stated_letter(text: str, letters: Mapping[str, str]) -> str | None:
    """The option that the last valid statement settles on, UNUSABLE, or None without one."""
    text = _single_spaces(text)
    said = _last_statement(text, letters, _STATEMENTS)
    said = said or _last_statement(text, letters, [_WEAK_STATEMENT])
    if said is None:
        return None
    letter, end = said
    if letter == UNUSABLE:
        return UNUSABLE
    rest = text[end:]
    later = _last_statement(rest, letters, [_WEAK_STATEMENT])
    if withdrawn(letter, rest, letters) or (later is not None and later[0] != letter):
        return UNUSABLE
    denied = [m for p in _STATEMENTS for m in p.finditer(rest) if m["letter"].upper() == letter]
    return UNUSABLE if denied else letter


def doubted(text: str, start: int, end: int) -> bool:
    """Whether what stands at [start, end) of a text is negated, ruled out, conditional or asked."""
    before = text[max(0, start - _CLAUSE) : start]
    return bool(
        _DOUBT_BEFORE.search(before)
        or _RULED_OUT_BEFORE.search(before)
        or _REJECTED.match(text, end)
        or _QUESTION.match(text, end)
    )


def withdrawn(letter: str, rest: str, letters: Mapping[str, str]) -> bool:
    """Whether what follows an answer takes it back: "wait", "A is wrong", "actually, C"."""
    if _taken_back(letter, rest):
        return True
    others = {k: text for k, text in letters.items() if k != letter}
    for found in islice(_WITHDRAWAL.finditer(rest), _LAST):
        clause = found["clause"]
        named = {m[1] for m in _NAMED.finditer(clause) if not _WORD.match(clause, m.end())}
        if named - {letter} or option_named(clause, others):
            return True
    return False


def text_differs(text: str, end: int, letter: str, letters: Mapping[str, str]) -> bool:
    """Whether the letter that ends at `end` stands before another option's words: "D) blue"."""
    label = _LABEL_END.match(text, end)
    start = label.end() if label else end
    words = {k: " ".join(t.casefold().split()).rstrip(" .") for k, t in letters.items()}
    longest = max(map(len, words.values()), default=0)
    said = " ".join(text[start : start + 2 * longest + 8].casefold().split(" "))
    if words.get(letter) and said.startswith(words[letter]):
        return False
    is_label = label is not None and any(sign in label[0] for sign in "):(")
    return any(
        own
        and said.startswith(own)
        and (_TEXT_END.match(said, len(own)) or (is_label and not said[len(own)].isalnum()))
        for k, own in words.items()
        if k != letter
    )


def another_named(text: str, end: int, letter: str, letters: Mapping[str, str]) -> bool:
    """Whether the letter that ends at `end` is joined to another offered one: "C or D"."""
    another = _OR.match(text, end)
    if another and another["letter"] in "AaIi" and another["noun"]:
        another = None
    another = another or _AND.match(text, end)
    other = another["letter"].upper() if another else letter
    return other != letter and other in letters


def rejects(clause: str) -> bool:
    """Whether a clause that explains an option speaks against it, and not against the others."""
    return bool(_AGAINST.search(clause)) and not _OF_OTHERS.search(clause)


def letters_named(text: str, letters: Mapping[str, str]) -> set[str]:
    """Offered capital letters that stand alone in a text; the words "A" and "I" do not count."""
    return {
        m[1]
        for m in _NAMED.finditer(text)
        if m[1] in letters and not (m[1] in "AI" and _WORD.match(text, m.end()))
    }


def option_named(text: str, letters: Mapping[str, str], *, doubtful: bool = False) -> str | None:
    """The one option whose own words occur in a text, as whole words and not negated.

    Words inside of a longer option's words belong to that one; words of up to three characters and
    numbers must stand alone between punctuation. None when several options or another option's
    letter are named. With `doubtful`, any mention of any option counts, negated or not.
    """
    low = " ".join(text.casefold().split())
    mentions = list(_mentions(low, letters))
    if doubtful:
        return mentions[0].letter if mentions else None
    cues = {m.end() for m in _CUE.finditer(low)}
    stated = [m for m in mentions if m.start in cues]
    if not stated and _small_words_differ(low, mentions, letters):
        return None
    if stated and any(
        m.letter != stated[-1].letter and _JOINED.fullmatch(low, stated[-1].end, m.start)
        for m in mentions
    ):
        return None
    if stated and any(
        m.letter != stated[-1].letter and _withdraws(low[stated[-1].end : m.start])
        for m in mentions
        if m.start > stated[-1].end
    ):
        return None
    named: set[str] = set()
    for mention in stated[-1:] or mentions:
        if mention.letter not in named and not _negated(mention, low):
            named.add(mention.letter)
    return named.pop() if len(named) == 1 and letters_named(text, letters) <= named else None


def _single_spaces(text: str) -> str:
    """Runs of spaces as one space, and as one line break where they hold one."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


# --- pieces --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mention:
    letter: str
    start: int
    end: int


_REPORTED = re.compile(
    r"\b(?:say|said|says|saying|repl(?:y|ies|ied)|answers?|answered|responds?|responded|shouts?"
    r"|shouted|asks?|asked|tells?|told|nods?|nodded)[:,]? [\"'*]{0,2}$"
)
_JOINED = re.compile(r"[\"'*_) ]{0,4}(?:[,;/&]|,? ?(?:and|or)) ?(?:the |an? )?")
_CUE = re.compile(rf"\b{_NOUN}(?:{_IS}| ?:)[\"'*_ (]{{0,4}}(?:(?:the|an?) )?")


def _last_statement(
    text: str, letters: Mapping[str, str], patterns: Sequence[re.Pattern[str]]
) -> tuple[str, int] | None:
    """Letter or UNUSABLE of the last statement that counts, and where it ends."""
    found = sorted((m for p in patterns for m in p.finditer(text)), key=lambda m: m.start("letter"))
    for match in reversed(found[-_LAST:]):
        letter = _letter_of(match, text, letters)
        if letter is not None:
            return letter, match.end("letter")
    return None


def _taken_back(letter: str, rest: str) -> bool:
    """Whether the text after a statement withdraws it: "wait", "that is wrong", "A is wrong"."""
    denial = rf"(?:\bnot|n['’]t) (?:option )?{_OPEN}{letter}{_ALONE}"
    if _TAKEN_BACK.search(rest) or re.search(denial, rest):
        return True
    return any(_REJECTED.match(rest, m.end()) for m in _NAMED.finditer(rest) if m[1] == letter)


def _letter_of(match: re.Match[str], text: str, letters: Mapping[str, str]) -> str | None:
    """What one statement says: a letter, UNUSABLE, or None when it does not count."""
    letter, end = match["letter"], match.end("letter")
    before = text[max(0, match.start() - _CLAUSE) : match.start()]
    # In lower case it is mostly a word; "answer is (a)" and "answer is c." are meant as letters.
    meant = match["open"] or (letter not in "ai" and _CLAUSE_END.match(text, end))
    if letter.islower() and not meant:
        return None
    if letter in "AI" and _WORD.match(text, end):
        return None
    if _QUESTION.match(text, end) or _REJECTED.match(text, end) or _DOUBT_BEFORE.search(before):
        return None
    letter = letter.upper()
    if another_named(text, end, letter, letters) or text_differs(text, end, letter, letters):
        return UNUSABLE
    return letter if letter in letters else UNUSABLE


def _mentions(low: str, letters: Mapping[str, str]) -> Iterator[_Mention]:
    """Places of options' words in a text of lower case, none inside of a longer one's, in order."""
    owners: dict[str, str] = {}
    for letter, option in letters.items():
        words = " ".join(option.casefold().split()).rstrip(".")
        if words:
            # Two options of the same words name neither.
            owners[words] = UNUSABLE if words in owners else letter
    if not owners:
        return
    # Alternatives are tried in order: the longest first.
    longest_first = sorted(owners, key=len, reverse=True)
    pattern = "|".join(_standing_alone(words) for words in longest_first)
    for match in re.finditer(pattern, low):
        if letter := owners[match[0]]:
            yield _Mention(letter, match.start(), match.end())


def _standing_alone(words: str) -> str:
    """Pattern of whole words; of words that mean little by themselves, a whole clause."""
    body = re.escape(words)
    if words in _COMMON or len(words) <= 2 or _NUMERIC.fullmatch(words):
        start, end = (
            r"(?:(?<=[.!?:;,*\"] )|(?<= is )|(?<![^*\"(]))",
            r"[*\")]{0,3}(?:[.!?,;] |[.!?,;]?$)",
        )
        return rf"{start}{body}(?={end})"
    return rf"(?<!\w){body}(?!\w)"


def _negated(mention: _Mention, low: str) -> bool:
    before = low[max(0, mention.start - _CLAUSE) : mention.start]
    reported = low[mention.start : mention.end] in _COMMON and _REPORTED.search(before)
    return bool(reported) or doubted(low, mention.start, mention.end)


def _withdraws(between: str) -> bool:
    """Whether what stands between two options' words withdraws the first: ". Actually, "."""
    found = _WITHDRAWAL.search(between[-_CLAUSE:])
    return found is not None


def _small_words_differ(low: str, mentions: Sequence[_Mention], letters: Mapping[str, str]) -> bool:
    """Whether another small word than the one mentioned ends a clause: "No, he said yes"."""
    small = {k: words for k, text in letters.items() if (words := text.casefold()) in _COMMON}
    said = {m.letter for m in mentions}
    return any(
        re.search(rf"(?<!\w){words}[\"'*)]{{0,3}}(?:[.!?,;]|$)", low)
        for letter, words in small.items()
        if said and letter not in said
    )
