"""The verb that asks a model the user's own prompts: measure."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import rich.table
from cyclopts import Parameter

from safebasin.cli.options import Dtype, Model, cells, out, refuse_processes, start_torch


def measure_verb(
    *,
    out_: Annotated[Path, Parameter(name="--out", help="Folder for measurements.jsonl and answers.jsonl.")],
    prompts: Annotated[str, Parameter(help="CSV, JSONL, JSON or Parquet of prompts; or a built-in set.")],
    model: Model = "builtin:smollm2-aligned",
    dtype: Dtype = "auto",
    adapter: Annotated[str | None, Parameter(help="A PEFT adapter on top of the model.")] = None,
    suite: Annotated[str, Parameter(help="asr or over_refusal.")] = "asr",
    column: Annotated[str, Parameter(help="The column that holds the prompt.")] = "prompt",
    category: Annotated[str | None, Parameter(help="A column: rates by category.")] = None,
    take: Annotated[int | None, Parameter(help="Draw so many prompts.")] = None,
    judges: Annotated[tuple[str, ...], Parameter(name="--judge", help="keyword, prefix, classifier, guard.")] = (
        "keyword",
        "classifier",
    ),
    aligned: Annotated[str, Parameter(help="The model that the classifier judges with.")] = "builtin:smollm2-aligned",
    label: Annotated[tuple[str, ...], Parameter(help="An answer that is only this is off task.")] = (),
    system: Annotated[str | None, Parameter(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, Parameter(help="Tokens of an answer at most.")] = 96,
) -> int:
    """Ask a model your own prompts and judge its answers."""
    refuse_processes()
    start_torch()
    from safebasin.data.files import make_folder
    from safebasin.data.source import open_prompts
    from safebasin.data.tables import write_table
    from safebasin.measure import suite as suites
    from safebasin.measure.judging import check_judges, make_judges, needs_aligned
    from safebasin.measure.subject import Subject
    from safebasin.models.load import load

    fields: dict[str, Any] = {"prompts": prompts, "column": column, "category": category, "take": take}
    method = suites.make({suite: {**fields, "judges": list(judges), "max_new_tokens": max_new_tokens}})
    check_judges(judges, {})
    open_prompts(prompts, column, category, take)  # what is wrong with the file is said before a model is loaded
    loaded = load(model, dtype=dtype, adapter=adapter)
    make_folder(out_)
    reads = load(aligned, dtype=dtype) if needs_aligned(judges) else None
    subject = Subject(loaded, "model", make_judges(judges, reads, {}), label, system)
    measurements = [dataclasses.asdict(measurement) for measurement in method.measure(subject)]
    write_table(out_ / "answers.jsonl", [dataclasses.asdict(answer) for answer in subject.answers])
    write_table(out_ / "measurements.jsonl", measurements)
    table = rich.table.Table("what", "judge", "category", "value", "95 %", "n", "unscored", "off task")
    for row in measurements:
        value = "not scored" if row["value"] is None else f"{row['value']:.3f}"
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        counts = (str(row[name]) for name in ("n", "unscored", "off_task"))
        cells(table, row["what"], row["judge"], row["category"], value, interval, *counts)
    out.print(table)
    return 0
