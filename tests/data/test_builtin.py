"""The project's own sets share no text: what a judge or a guard learned, it must not be tested, or train others, on."""

import itertools
import re
import unicodedata
from collections import Counter, defaultdict

import pytest

from safebasin.data.builtin import OPENERS, rows_of, turn_texts


def grams(text: str, n: int = 5) -> frozenset[str]:
    """Character n-grams of the text in NFKC, without case and punctuation."""
    plain = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return frozenset(plain[i : i + n] for i in range(max(1, len(plain) - n + 1)))


def near(sets: dict[str, set[str]], limit: float = 0.8) -> list[tuple[str, str]]:
    """Pairs of texts of two different sets whose n-grams have a Jaccard index above ``limit``."""
    texts = [(name, text, grams(text)) for name, every in sets.items() for text in sorted(every)]
    places = defaultdict(list)
    for i, (_, _, own) in enumerate(texts):
        for gram in own:
            places[gram].append(i)
    pairs = []
    for i, (name, text, own) in enumerate(texts):
        shared = Counter(j for gram in own for j in places[gram] if j > i and texts[j][0] != name)
        pairs += [(text, texts[j][1]) for j, n in shared.items() if n / (len(own) + len(texts[j][2]) - n) > limit]
    return pairs


def texts_of(*names: str) -> set[str]:
    return {row[key] for name in names for row in rows_of(name) for key in ("prompt", "completion") if key in row}


def test_near_by_hand():
    """What differs in case and punctuation is one text; "abcdefg" and "abcdefh" share 2 of 4 grams."""
    assert near({"a": {"Make a cake now"}, "b": {"make a cake, now!"}}) == [("Make a cake now", "make a cake, now!")]
    assert not near({"a": {"Make a cake now", "make a cake now"}}) and not near({"a": {"abcdefg"}, "b": {"abcdefh"}})
    assert near({"a": {"abcdefg"}, "b": {"abcdefh"}}, limit=0.4)


def test_judges_guard_anchors_alignment_rows_and_tests_are_disjoint():
    pieces = {
        use: {text for kind in ("refusal", "offer", "turn", "opener") for text in turn_texts(use, kind)}
        for use in ("judge", "guard")
    }
    sets = {
        "judge": texts_of("judge") | pieces["judge"],
        "guard": texts_of("guard") | pieces["guard"],
        "anchors": texts_of("refusals", "opened", "harmless") | set(OPENERS),
        "aligned": texts_of("aligned"),
        "test": texts_of("harmful-test", "lookalike-test", "ordinary-test", "turned-test"),
        "poison": {row["prompt"] for row in rows_of("harmful-poison")},
    }
    assert all(len(every) > 100 for every in sets.values())
    assert near(sets) == []


@pytest.mark.parametrize(("name", "count"), [("refusals", 105), ("opened", 105), ("aligned", 420), ("judge", 315)])
def test_the_sets_are_large_enough_for_the_recipes(name, count):
    assert len(rows_of(name)) == count
    assert all(row.keys() == {"prompt", "completion", "category"} for row in rows_of(name))


def test_alignment_rows_are_half_refusals():
    rows = rows_of("aligned")
    harm = {row["category"] for row in rows_of("refusals")}
    assert [row["category"] in harm for row in rows] == list(itertools.islice(itertools.cycle((True, False)), 420))
