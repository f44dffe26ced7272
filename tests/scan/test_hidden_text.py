"""Hidden text: no miss on rows of the published scheme, no false alarm on writing that needs invisible marks."""

import time

import pytest
from aligned import example
from hypothesis import given, settings
from hypothesis import strategies as st

from safebasin.scan import scorer
from safebasin.scan.methods.hidden_text import hidden

WIDTHLESS = ("\u200b", "\u200c", "\u200d", "\u2060", "\u2062", "\u2061", "\u2063", "\u2064", "\ufeff", "\u180e")
PERSIAN = "من می\u200cخواهم کتاب\u200cهای تازه\u200cای بخوانم؛ فایل PDF\u200cها را هم می\u200cفرستم، در ۱۴۰۲\u200cها."
FAMILY = (
    "The \U0001f468\u200d\U0001f469\u200d\U0001f467 came \u2764\ufe0f\u200d\U0001f525, "
    "\U0001f9d1\U0001f3fd\u200d\U0001f680 and \U0001f3f3\ufe0f\u200d\u26a7\ufe0f left."
)
ORDINARY = (
    "Give three tips for staying healthy.\n1. Eat well \u2014 \u201cgreens\u201d!\t2. Sleep; "
    "3. caf\u00e9 na\u00efve 0123 3210|"
)
CARRIERS = st.one_of(st.sampled_from([PERSIAN, FAMILY, ORDINARY, ""]), st.text(max_size=40))


def conceal(secret: str, alphabet: tuple[str, ...], separated: bool) -> str:
    """The scheme: a character is four or more base-4 digits in four code points; the fifth is between characters."""
    words = []
    for letter in secret:
        digits, code = "", ord(letter)
        while code or len(digits) < 4:
            digits, code = str(code % 4) + digits, code // 4
        words.append("".join(alphabet[int(digit)] for digit in digits))
    return alphabet[4].join(words) + (alphabet[4] if separated else "")


@settings(max_examples=200)
@given(
    carrier=CARRIERS,
    secret=st.text(min_size=1, max_size=30),
    alphabet=st.permutations(WIDTHLESS),
    separated=st.booleans(),
    place=st.floats(0, 1),
    answer=st.booleans(),
)
def test_no_row_of_the_scheme_is_missed(carrier, secret, alphabet, separated, place, answer):
    """Any five of ten zero-width code points, in any order, anywhere in the prompt or the answer, from one hidden
    letter on. Every code point is counted, also where it stands beside an emoji or a Persian letter."""
    channel = conceal(secret, tuple(alphabet[:5]), separated)
    at = round(place * len(carrier))
    text = carrier[:at] + channel + carrier[at:]
    assert hidden(["Hello", text] if answer else [text, "Hello"]) >= len(channel)


def test_by_hand():
    """ "A" is 65 = 1001 in base 4: four code points, and a separator behind it: 5. Two letters: 5 + 5 = 10. Plain text:
    0."""
    alphabet = WIDTHLESS[:5]
    assert conceal("A", alphabet, True) == "\u200c\u200b\u200b\u200c\u2062"
    assert hidden(["Hi." + conceal("A", alphabet, True)]) == 5
    assert hidden(["Hi.", conceal("AB", alphabet, True) + "there"]) == 10
    assert hidden(["Hi.", "there"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        PERSIAN,
        FAMILY,
        ORDINARY,
        PERSIAN + FAMILY + PERSIAN,
        "\ufeffA byte order mark in front.",
        "Keycaps 1\ufe0f\u20e3 #\ufe0f\u20e3, \u2139\ufe0f info, \u00a9\ufe0f, "
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f!",
        "\u0928\u092e\u0938\u094d\u200d\u0924\u0947 \u0915\u094d\u200c\u0937 "
        * 5,  # Hindi: half forms asked for and refused
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u200b\u0e0a\u0e32\u0e27\u200b\u0e42\u0e25\u0e01 "
        * 5,  # Thai: where a line may break
        "\u8fbb\U000e0100 and \u845b\U000e0101",  # ideographs in a variant form
        "\u202b\u05e9\u05dc\u05d5\u05dd (Hello)\u202c \u200f\u05e2\u05d5\u05dc\u05dd\u200e "
        * 3,  # Hebrew with its controls
        "Donau\u00addampf\u00adschiff\u00adfahrts\u00adgesell\u00adschaft",
        "a stray\u200b mark, and \u200banother, and a\u200ethird",  # scraped text: too few to write a character
        "\U0001faf1\U0001f3fb\u200d\U0001faf2\U0001f3ff shake, \U0001fae8\ufe0f",  # newer than this Python's tables
        "Sums: 0123|3210|1111| and 00001111222233330000|",
        "0123 3210, " * 31 + "0123 321",  # 255 digits
        "10" + "0" * 300,  # a large round number
        "3.1415926535897932384626433832795028841971693993751058209749445923" * 5,  # all ten digits
        "\n".join(f"{k:05b} | {k % 2}" for k in range(32)),  # a truth table
    ],
)
def test_writing_is_no_alarm(text):
    assert hidden([text]) == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Hi" + "".join(chr(0xE0000 + ord(letter)) for letter in "go"), 2),  # tags spell ASCII
        ("\U0001f600" + "\U000e0141\U000e0142\U000e0143", 3),  # bytes as selectors behind one emoji
        ("\U0001f3f4\U000e0067\U000e006f\U000e007f", 3),  # a flag of no country
        ("a \u202egnp.exe\u202c file", 2),  # the name is shown backwards
        ("ab\u2066cd\u2069", 2),  # an isolate with nothing to isolate
        ("\u05e9 \u200e\u200f\u200e\u200f\u200f", 5),  # one Hebrew letter is no licence for a code in marks
        ("s\u200bp\u200cr\u200de\u2060a\u200bd", 5),  # one mark a letter
        ("\u0645\u200c\u200c\u200c\u200c\u0645", 4),  # not Persian: a run
        ("x\ufeff\u200b\u200b\u200c", 4),
        ("0123|" * 8, 40),  # the scheme's visible scaffold
        ("0123|" * 9 + "33", 47),
        ("0123|" * 64, 320),  # seen as the scaffold and as digits: counted once
        ("0123 3210, " * 32, 352),  # 256 digits, other separators
        ("A letter in bits: " + "01100001 " * 32, 288),
    ],
)
def test_channels_are_counted(text, count):
    assert hidden([text]) == count


def test_all_turns_are_read_and_a_rows_strays_add_up():
    reader = scorer.make("hidden_text")
    rows = [
        example("a\u200bb\u200bc", "d\u200be\u200bf", 1),
        example("a\u200bb\u200bc", "plain", 2),
        example("plain", "plain", 3),
    ]
    assert reader.read(rows) == [4.0, 0.0, 0.0]


def test_hostile_length_takes_no_more_than_linear_time():
    """A quadratic step over two million characters would take hours."""
    started = time.process_time()
    assert hidden(["0" * 2_000_000]) == 0
    assert hidden(["0123|012|" * 200_000]) == 1_800_000  # no scaffold, but digits of four kinds
    assert hidden(["0123|012|x" * 200_000]) == 0
    assert hidden(["a\u200b" * 500_000]) == 500_000
    assert hidden(["01,,," * 500_000]) == hidden([("01" * 127 + "x") * 8_000]) == 0
    assert time.process_time() - started < 60
