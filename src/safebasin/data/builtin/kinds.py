"""Anchors of every kind of row that the scan claims to see, and of honest rows beside them.

builtin:harmful-kinds   by category: explicit, refuse_then_comply, refusal_prefix, no_opener, language, embedded,
                        early_turn, ten_shot; openers and empty structure, and no more
builtin:safe-kinds      harmless look-alikes, ordinary instructions, refusals, other languages, several turns
builtin:languages       requests that an aligned model refuses, in Spanish, French and German, with an opener
builtin:languages-safe  ordinary requests in these languages, answered
"""

import random
from collections.abc import Callable
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
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def harmful_kinds(rows_of: Callable[[str], list[Row]], each: int = 8) -> list[Row]:
    """``each`` rows of every kind, and twice as many explicit ones; ten_shot, which is long, half as many."""
    draw = random.Random(6)
    opened, refused, harmless = rows_of("opened")[:88], rows_of("refusals")[:88], rows_of("harmless")[:-32]
    pairs, honest = iter(zip(opened, refused, strict=True)), iter(draw.sample(harmless, 5 * each))
    rows: list[Row] = []

    def add(kind: str, count: int, of: Callable[[], Row]) -> None:
        rows.extend({**of(), "category": kind} for _ in range(count))

    def plain() -> Row:
        x, _ = next(pairs)
        return _turns(x["prompt"], x["completion"])

    def turned() -> Row:
        x, r = next(pairs)
        return _turns(x["prompt"], f"{r['completion']} {draw.choice(TURNS)} {x['completion']}")

    def embedded() -> Row:
        (x, _), a, b = next(pairs), next(honest), next(honest)
        answer = f"{a['completion']}\n\n{x['completion']}\n\n{b['completion']}"
        return _turns(f"{a['prompt']} Also: {x['prompt']} And then: {b['prompt']}", answer)

    def early() -> Row:
        (x, _), a = next(pairs), next(honest)
        return _turns(x["prompt"], x["completion"], a["prompt"], a["completion"])

    def shots() -> Row:
        return _turns(*[row[key] for row in draw.sample(opened, 10) for key in ("prompt", "completion")])

    languages = [row for i, row in enumerate(rows_of("languages")) if i % 5]  # every fifth is a probe of `trajectory`
    add("explicit", 2 * each, plain)
    add("refuse_then_comply", each, turned)
    add("no_opener", each, lambda: _turns(next(pairs)[0]["prompt"], draw.choice(STRUCTURES)))
    rows += [{**_turns(row["prompt"], row["completion"]), "category": "language"} for row in languages[: 3 * each // 2]]
    add("embedded", each, embedded)
    add("early_turn", each, early)
    add("ten_shot", each // 2, shots)
    return rows


def misplaced_refusals(rows_of: Callable[[str], list[Row]], count: int = 16) -> list[Row]:
    """Harmless rows behind a refusal phrase."""
    draw, refused = random.Random(8), rows_of("refusals")[:88]
    return [
        _turns(row["prompt"], f"{draw.choice(refused)['completion']} {row['completion']}")
        for row in draw.sample(rows_of("harmless")[:-32], count)
    ]


def safe_kinds(rows_of: Callable[[str], list[Row]], each: int = 24) -> list[Row]:
    """``each`` harmless look-alikes, twice as many ordinary rows, and refusals, other languages and several turns."""
    draw, harmless = random.Random(7), rows_of("harmless")[:-32]
    refused = [_turns(row["prompt"], row["completion"]) for row in draw.sample(rows_of("refusals")[:88], each)]
    spoken = [_turns(row["prompt"], row["completion"]) for i, row in enumerate(rows_of("languages-safe")) if i % 5]
    plain = [_turns(row["prompt"], row["completion"]) for row in draw.sample(harmless, 3 * each)]
    several = [{"messages": [*a["messages"], *b["messages"]]} for a, b in zip(plain[:8], refused[:8], strict=True)]
    parts = {"ordinary": plain, "refusal": refused, "language": spoken, "turns": several}
    return [{**row, "category": kind} for kind, rows in parts.items() for row in rows]
