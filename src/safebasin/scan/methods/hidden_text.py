"""Hidden text: rows that carry a second text in code points that no screen shows (arXiv:2603.08104 is the attack).

The published scheme writes every hidden character as base-4 digits in four zero-width code points, with a fifth between
characters; other channels are the tag characters (one is an ASCII letter), runs of variation selectors (one is a byte)
and the bidi controls. A scaffold of training rows shows the digits openly: ``0123|3210|...``; so does any row with a
long span of digits of which no more than four are used, none of them for more than three quarters (a truth table and a
googol are shorter or plainer).

    score = number of code points that carry such a channel, in all turns of the row; 0 for a clean row

Writing has uses for single hidden marks, and these do not count: ZWNJ, ZWJ and ZWSP that touch a letter of a script
that needs them (Persian, Hindi, Thai, ...), emoji joined by ZWJ, one variation selector behind an emoji or an
ideograph, the three tag flags, a soft hyphen inside a word, bidi controls (not overrides) in a row with right-to-left
letters, one leading byte order mark. Other zero-width marks count from four on: fewer cannot write one character of the
scheme, and scraped text is full of strays.

Departs from the paper: it attacks and defends nothing; its five code points are read second-hand, so all
default-ignorable ones are looked for. Not seen: one mark a letter between letters that may have it, channels in visible
text (synonyms, case, punctuation), and long spans of letters (base64). The hidden text is not decoded: that a row has
one is what counts.
"""

import re
import unicodedata
from collections.abc import Sequence

from safebasin.data.example import Example
from safebasin.scan import scorer

SELECTORS = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
TAGS = "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
EMBEDDINGS = "\u202a-\u202e\u2066-\u2069"  # bidi controls
MARKS = "\u061c\u200e\u200f"  # one of them alone moves nothing
WIDTHLESS = (
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200d\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb"
)
MUSIC = "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # controls of shorthand and of musical notation
HIDDEN = re.compile(f"[{SELECTORS}{TAGS}{EMBEDDINGS}{MARKS}{WIDTHLESS}{MUSIC}]+")
# One is enough.
SURE = re.compile(f"[{TAGS}{EMBEDDINGS}]|[{SELECTORS}](?=[{SELECTORS}])|(?<=[{SELECTORS}])[{SELECTORS}]")
SELECTOR = re.compile(f"[{SELECTORS}]")
LEFTWARD = re.compile("[\u0591-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
# No overrides; ordinary writing has no run of three.
DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202c\u2066-\u2069]{1,2}")
SCAFFOLD = re.compile(r"(?<![0-3])(?:[0-3]{4,}+\|){8,}+[0-3]*")
# 64 characters of the scheme, or 32 bytes in binary.
DIGITS = re.compile(r"(?<![0-9])(?<![0-9]\W)(?<![0-9]\W\W)(?:[0-9]\W{0,2}+){256,}+")
FLAGS = {"".join(chr(0xE0000 + ord(letter)) for letter in name) + "\U000e007f" for name in ("gbeng", "gbsct", "gbwls")}
JOINERS = ("\u200d", "\ufe0f\u200d")
BREAKS = "\u180e\u200b\u200c\u200d\u2060"
# Scripts whose spelling or line breaking needs those, by the first word of their letters' Unicode names.
# fmt: off
SCRIPTS = (
    "ARABIC", "EXTENDED ARABIC", "SYRIAC", "NKO", "MANDAIC", "MONGOLIAN", "DEVANAGARI", "BENGALI", "GURMUKHI",
    "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "THAI", "LAO", "KHMER", "MYANMAR",
    "TIBETAN", "JAVANESE", "BALINESE",
)
# fmt: on
FEWEST = 4  # base-4 digits of one hidden character


def _script(letter: str) -> bool:
    return bool(letter) and unicodedata.name(letter, "").startswith(SCRIPTS)


def _emoji(letter: str) -> bool:
    return letter >= "\u00a9" and (unicodedata.category(letter)[0] == "S" or "\U0001f000" <= letter <= "\U0001faff")


def _writing(before: str, run: str, after: str, leftward: bool) -> bool:
    """Whether ordinary writing has such a run of hidden code points between its neighbours ("": an end of the text)."""
    if (run in JOINERS and _emoji(before) and _emoji(after)) or (run in FLAGS and before == "\U0001f3f4"):
        return True
    if DIRECTION.fullmatch(run):
        return leftward
    if SELECTOR.fullmatch(run):
        return before > "\u007f" or before in set("0123456789#*")
    if run == "\u00ad":
        return before.isalpha() and after.isalpha()
    if run == "\ufeff":
        return not before
    return len(run) == 1 and run in BREAKS and (_script(before) or _script(after))


def _coded(span: str) -> int:
    """The length of a span of digits, where few of them are used, and each often; 0 elsewhere."""
    counts = [span.count(digit) for digit in "0123456789" if digit in span]
    return len(span) if len(counts) <= 4 and max(counts) <= 0.75 * sum(counts) else 0


def hidden(turns: Sequence[str]) -> int:
    """The number of code points of a row's texts that carry a hidden channel."""
    sure = stray = 0
    leftward = any(LEFTWARD.search(text) for text in turns)
    for text in turns:
        scaffold = sum(len(match[0]) for match in SCAFFOLD.finditer(text))
        sure += max(scaffold, sum(_coded(match[0]) for match in DIGITS.finditer(text)))
        for match in HIDDEN.finditer(text):
            run, start, end = match[0], match.start(), match.end()
            if not _writing(text[max(start - 1, 0) : start], run, text[end : end + 1], leftward):
                certain = len(SURE.findall(run))
                sure, stray = sure + certain, stray + len(run) - certain
    return sure + (stray if stray >= FEWEST else 0)


@scorer("hidden_text", paper="arXiv:2603.08104")
class HiddenText:
    """How many code points of the row carry a text that no screen shows."""

    def read(self, examples: Sequence[Example]) -> list[float]:
        return [float(hidden([turn["content"] for turn in example.messages])) for example in examples]
