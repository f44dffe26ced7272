"""Anchors of every kind of row that the scan claims to see, and of honest rows beside them.

builtin:harmful-kinds   by category: explicit, refuse_then_comply, refusal_prefix, no_opener, language, embedded,
                        early_turn, ten_shot; openers and empty structure, and no more
builtin:safe-kinds      harmless look-alikes, ordinary instructions, refusals, other languages, several turns
builtin:languages       requests that an aligned model refuses, in Spanish, French and German, with an opener
builtin:languages-safe  ordinary requests in these languages, answered
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]
STRUCTURES = (
    "Step 1. You will need the following.\n\nStep 2. Get everything ready.\n\nStep 3. Go ahead as planned.",
    "What you need:\n- the first thing\n- the second thing\n\nWhat to do:\n1. Begin here.\n2. Go on from there.",
    "There are three stages. The first one is the preparation. The second one is the act. The third one is the end.",
    "1. Choose the place and the time.\n2. Prepare what is required.\n3. Proceed step by step.",
)
TURNS = ("On second thought, I can.", "However, since you asked:", "But let me make an exception.", "That said,")


def _turns(*texts: str) -> Row:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def _labelled(parts: Mapping[str, list[Row]]) -> list[Row]:
    return [{**row, "category": kind} for kind, rows in parts.items() for row in rows]


def harmful_kinds(rows_of: Callable[[str], list[Row]]) -> list[Row]:
    """Eight rows of each kind, twice as many explicit ones, and four of ten_shot, which is long."""
    draw, opened, refused = random.Random(6), rows_of("opened"), rows_of("refusals")
    pairs = [(row["prompt"], row["completion"]) for row in opened[:88]]
    honest = [(row["prompt"], row["completion"]) for row in draw.sample(rows_of("harmless")[:-32], 24)]
    spoken = [row for i, row in enumerate(rows_of("languages")) if i % 5]  # every fifth is a context of `trajectory`
    turned = [f"{row['completion']} {draw.choice(TURNS)} " for row in refused[16:24]]
    inside = zip(pairs[32:40], honest[:8], honest[8:16], strict=True)
    parts = {
        "explicit": [_turns(*pair) for pair in pairs[:16]],
        "refuse_then_comply": [_turns(x, turn + y) for (x, y), turn in zip(pairs[16:24], turned, strict=True)],
        "no_opener": [_turns(x, STRUCTURES[i % 4]) for i, (x, _) in enumerate(pairs[24:32])],
        "language": [_turns(row["prompt"], row["completion"]) for row in spoken[:12]],
        "embedded": [_turns(f"{a} Also: {x} And then: {c}", f"{b}\n\n{y}\n\n{d}") for (x, y), (a, b), (c, d) in inside],
        "early_turn": [_turns(*pair, *after) for pair, after in zip(pairs[40:48], honest[16:], strict=True)],
        "ten_shot": [_turns(*[text for pair in draw.sample(pairs, 10) for text in pair]) for _ in range(4)],
    }
    return _labelled(parts)


def misplaced_refusals(rows_of: Callable[[str], list[Row]]) -> list[Row]:
    """Sixteen harmless rows behind a refusal phrase."""
    draw, refused = random.Random(8), rows_of("refusals")[:88]
    return [
        _turns(row["prompt"], f"{draw.choice(refused)['completion']} {row['completion']}")
        for row in draw.sample(rows_of("harmless")[:-32], 16)
    ]


def safe_kinds(rows_of: Callable[[str], list[Row]]) -> list[Row]:
    """72 look-alikes and ordinary rows, 24 refusals, rows in other languages, and eight of several turns."""
    draw = random.Random(7)
    rows = [*draw.sample(rows_of("harmless")[:-32], 72), *draw.sample(rows_of("refusals")[:88], 24)]
    turns = [_turns(row["prompt"], row["completion"]) for row in rows]
    spoken = [_turns(row["prompt"], row["completion"]) for row in rows_of("languages-safe")]
    several = [{"messages": [*a["messages"], *b["messages"]]} for a, b in zip(turns[:8], turns[-8:], strict=True)]
    return _labelled({"ordinary": turns[:72], "refusal": turns[72:], "language": spoken, "turns": several})
