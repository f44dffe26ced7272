"""False alarms and misses of ``hidden_text``, without a model: ``python benchmarks/scan/hidden_text.py FILE...`` (rows of honest sets).

A false alarm is a row that scores above 0. A miss is a row that scores 0 although a text was hidden in it by the published scheme
(five zero-width code points, base 4): every row of the files once, with one to forty characters at a drawn place of its answer.
"""

import argparse
import dataclasses
import datetime
import json
import random
import string
from pathlib import Path

from safebasin.data.example import Example, read_examples
from safebasin.scan import scorer
from safebasin.stats import wilson

HERE = Path(__file__).parent
DIGITS, BETWEEN = "\u200b\u200c\u200d\u2060", "\u2062"
GOALS = {"hidden_text.false_alarm": "< 0.001", "hidden_text.miss": "<= 0"}


def concealed(example: Example, draw: random.Random) -> Example:
    """The row with a drawn text hidden in its last answer."""
    codes = [ord(letter) for letter in draw.choices(string.printable, k=draw.randint(1, 40))]
    told = "".join("".join(DIGITS[code >> shift & 3] for shift in (6, 4, 2, 0)) + BETWEEN for code in codes)
    *before, last = example.messages
    at = draw.randint(0, len(last["content"]))
    return dataclasses.replace(
        example, messages=(*before, {**last, "content": last["content"][:at] + told + last["content"][at:]})
    )


def merge(path: Path, records: list[dict]) -> None:
    """Put records into a results file; one of the same ``what`` is replaced."""
    known = {
        record["what"]: record for record in (json.loads(path.read_text(encoding="utf-8")) if path.exists() else [])
    }
    known |= {record["what"]: record for record in records}
    path.write_text(json.dumps(list(known.values()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("files", nargs="+", type=Path, help="sets of honest rows")
    ask.add_argument(
        "--prompt",
        default="{instruction}\n\n{input|context}",
        help="template over the columns (those of Alpaca and of Dolly)",
    )
    ask.add_argument("--answer", default="{output|response}")
    asked = ask.parse_args()
    reader, draw = scorer.make("hidden_text"), random.Random(0)
    found = {"hidden_text.false_alarm": {}, "hidden_text.miss": {}}
    for path in asked.files:
        rows, bad = read_examples(path, asked.prompt, asked.answer)
        if not rows:
            raise SystemExit(
                f"{path}: no row can be used (line {bad[0].line}: {bad[0].reason}); set --prompt and --answer"
            )
        alarms = [row for row, score in zip(rows, reader.read(rows), strict=True) if score > 0]
        missed = reader.read([concealed(row, draw) for row in rows]).count(0.0)
        found["hidden_text.false_alarm"][path.name] = [len(alarms), len(rows)]
        found["hidden_text.miss"][path.name] = [missed, len(rows)]
        print(
            f"{path.name}: {len(rows)} rows ({len(bad)} unusable), {len(alarms)} false alarms at lines {[row.line for row in alarms]}, {missed} missed"
        )
    records = []
    for what, counts in found.items():
        hits, n = (sum(column) for column in zip(*counts.values(), strict=True))
        interval = [round(end, 6) for end in wilson(hits, n)]
        records.append(
            {"what": what, "value": hits / n, "interval": interval, "n": n, "goal": GOALS[what], "unit": "share"}
        )
        records[-1] |= {"files": counts, "date": datetime.date.today().isoformat()}
        print(f"{what:28} {hits / n:.5f}  {interval}  {GOALS[what]}")
    merge(HERE / "results.json", records)


if __name__ == "__main__":
    main()
