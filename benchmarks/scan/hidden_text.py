"""False alarms and misses of ``hidden_text``, without a model, on files of honest rows.

A false alarm is a row that scores above 0. A miss is a row that scores 0 although a text was hidden in it by the
published scheme (five zero-width code points, base 4): every row of the files once, with one to forty characters at a
random place of its answer.
"""

import dataclasses
import random
import string
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from benchmarks.harness import Bench, experiment
from safebasin.data.example import Example, read_examples
from safebasin.data.keys import RowForm
from safebasin.errors import UserError
from safebasin.scan import scorer
from safebasin.stats import wilson

DIGITS, BETWEEN = "\u200b\u200c\u200d\u2060", "\u2062"


def concealed(example: Example, draw: random.Random) -> Example:
    """The row with a random text hidden in its last answer."""
    codes = [ord(letter) for letter in draw.choices(string.printable, k=draw.randint(1, 40))]
    hidden = "".join("".join(DIGITS[code >> shift & 3] for shift in (6, 4, 2, 0)) + BETWEEN for code in codes)
    *before, last = example.messages
    at = draw.randint(0, len(last["content"]))
    content = last["content"][:at] + hidden + last["content"][at:]
    return dataclasses.replace(example, messages=(*before, {**last, "content": content}))


@experiment(
    "hidden_text",
    results="scan",
    replaces=("what",),
    goals={"hidden_text.false_alarm": "< 0.001", "hidden_text.miss": "<= 0"},
    quick={"take": 20},
)
def hidden_text(
    *,
    bench: Bench,
    files: Annotated[tuple[Path, ...], Parameter(help="sets of honest rows")],
    prompt: Annotated[
        str, Parameter(help="template over the columns (those of Alpaca and of Dolly)")
    ] = "{instruction}\n\n{input|context}",
    answer: str = "{output|response}",
    take: Annotated[int | None, Parameter(help="rows of each file; default all")] = None,
) -> None:
    """What does ``hidden_text`` miss, and what does it flag in honest rows?"""
    reader, draw = scorer.make("hidden_text"), random.Random(0)
    counts: dict[str, dict[str, list[int]]] = {"hidden_text.false_alarm": {}, "hidden_text.miss": {}}
    for path in files:
        examples, bad = read_examples(path, RowForm(prompt=prompt, answer=answer))
        if not examples:
            reason = f"line {bad[0].line}: {bad[0].reason}"
            raise UserError(f"{path}: no row can be used ({reason}); set --prompt and --answer")
        rows = examples[:take]
        alarms = [row.line for row, score in zip(rows, reader.read(rows), strict=True) if score > 0]
        missed = reader.read([concealed(row, draw) for row in rows]).count(0.0)
        counts["hidden_text.false_alarm"][path.name] = [len(alarms), len(rows)]
        counts["hidden_text.miss"][path.name] = [missed, len(rows)]
        print(f"{path.name}: {len(rows)} rows ({len(bad)} unusable), false alarms at lines {alarms}, {missed} missed")
    for what, by_file in counts.items():
        hits, n = (sum(column) for column in zip(*by_file.values(), strict=True))
        bench.record(what, hits / n, wilson(hits, n), n=n, unit="share", files=by_file)
