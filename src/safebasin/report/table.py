"""A run folder to a Report, and the Report to its files and to the terminal.

A prompt's outcome under a judge is a hit, no hit, or None: not scored. As in the suites, an answer off the task (neither refused nor
complied) is in no ratio; it is counted apart.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import rich.table
import rich.text
import yaml

from safebasin.record import BadRow, Measurement, UserError, parse, read_table, row_id, write_json
from safebasin.report import (
    QUANTITIES,
    SCHEMA,
    Agreement,
    Answer,
    CategoryRate,
    Comparison,
    Cut,
    Gate,
    Histogram,
    OriginCount,
    Problem,
    Reading,
    Removed,
    Report,
    Sample,
    Series,
    Training,
    Verdict,
    page,
    printable,
)
from safebasin.report.gate import INCONCLUSIVE, judge_gate, parse_gate
from safebasin.stats import kappa, mcnemar, non_inferior, paired_difference, wilson

SHOWN = 100  # removed rows in the report; all of them are in cut/<arm>/cut.json
SAMPLES = 12  # attack prompts shown with the answers of every arm
NAME = 60  # characters of a name that came with the data: category, origin, id
BINS = 40
POINTS = 200  # of a loss curve
HEAVY = 20.0  # farthest score over the 90th percentile of distances from 0, above which the axis is symlog

Outcomes = dict[str, bool | None]  # prompt id -> hit


def write(run: Path, *, show_text: bool = False, gate: Gate | None = None) -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` of a run folder, all from one object, which is returned.

    Raises:
        UserError: the folder is not a run folder, or a file of it is broken.
    """
    report = collect(run, show_text=show_text, gate=gate)
    made = {"report.md": page.markdown(report), "report.html": page.html(report)}  # all are made before the first is written
    write_json(run / "report.json", dataclasses.asdict(report))
    for name, text in made.items():
        part = run / (name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(run / name)
    return report


def collect(run: Path, *, show_text: bool = False, gate: Gate | None = None) -> Report:
    """Read a run folder. ``gate`` None: the one of its ``run.yaml``, or the default one. ``show_text``: harmful text in clear."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"no such run folder: {run}")
    config = _config(run)
    gate = gate or parse_gate(config.get("gate") or {})
    arms = _arms(run, config)
    if not arms:
        raise UserError(f"{run} holds no arm to report on (no folder {run / 'arms'}); run it first: safebasin run")
    judged = gate.arm or arms[-1]
    problems = _data_problems(run)
    readings = [reading for arm in arms for reading in _readings(run, arm, problems)]
    answers = {arm: _answers(run, arm, problems) for arm in arms}
    pairs = dict.fromkeys([(judged, gate.plain), (judged, arms[0]), *((arm, arms[0]) for arm in arms[1:])])
    report = Report(
        schema=SCHEMA,
        run=printable(run.resolve().name, NAME),
        redacted=not show_text,
        verdict=Verdict(code=4, status=INCONCLUSIVE, reasons=()),
        gate=gate,
        arms=tuple(arms),
        judged=judged,
        readings=tuple(readings),
        comparisons=tuple(c for pair in pairs if pair[0] != pair[1] for c in _comparisons(*pair, readings, answers, gate)),
        agreement=tuple(_agreement(readings, answers)),
        categories=tuple(_categories(readings, answers)),
        cuts=tuple(_cuts(run, arms, show_text)),
        training=tuple(_training(run, arms)),
        samples=tuple(_samples(readings, answers, judged, show_text)),
        problems=tuple(problems),
        manifest=_manifest(run),
    )
    return dataclasses.replace(report, verdict=judge_gate(report, gate))


# --- the run's own files --------------------------------------------------------------------------------------------------------


def _config(run: Path) -> Mapping[str, Any]:
    path = run / "run.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    return config if isinstance(config, Mapping) else {}


def _arms(run: Path, config: Mapping[str, Any]) -> list[str]:
    """The arms in the order of the configuration, then any other folder of arms/."""
    listed = config.get("arms") or []
    names = [str(arm.get("name")) if isinstance(arm, Mapping) else str(arm) for arm in listed]  # a mapping gives its keys
    found = sorted(path.name for path in (run / "arms").glob("*") if path.is_dir())
    usual = [name for name in ("start", "plain") if name in found]
    return list(dict.fromkeys(names + usual + found))


def _json(path: Path) -> Any:
    """The content of a JSON file, None if it is not there."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is broken: {error}; delete it and run again") from None


def _manifest(run: Path) -> dict[str, str]:
    flat: dict[str, str] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else str(key), inner)
        else:
            flat[printable(name, NAME)] = printable(value if isinstance(value, str) else json.dumps(value), 120)

    walk("", _json(run / "manifest.json") or {})
    return flat


def _data_problems(run: Path) -> list[Problem]:
    return [
        Problem(place=f"line {problem['line']}", reason=printable(str(problem["reason"])))
        for problem in _json(run / "data" / "problems.json") or []
    ]


# --- numbers --------------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite number, or None: NaN is not a measurement."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _readings(run: Path, arm: str, problems: list[Problem]) -> Iterable[Reading]:
    path = run / "arms" / arm / "measurements.jsonl"
    if not path.is_file():
        problems.append(Problem(place=f"arm {arm}", reason="it has no measurements"))
        return
    names = {field.name for field in dataclasses.fields(Measurement)}
    for line, row in read_table(path):
        if isinstance(row, BadRow) or not isinstance(row, Mapping) or not {"suite", "what", "value", "low", "high", "n"} <= row.keys():
            raise UserError(f"{path}, line {line}: not a measurement; delete the file and measure again")
        taken = Measurement(**{name: value for name, value in row.items() if name in names})
        if taken.category:
            continue  # categories are counted from the answers
        value = _number(taken.value) if taken.n > 0 else None  # a share of nothing is not zero
        yield Reading(
            arm=arm,
            quantity=printable(taken.what, NAME),
            suite=printable(taken.suite, NAME),
            judge=printable(taken.judge, NAME),
            value=value,
            low=None if value is None else _number(taken.low),
            high=None if value is None else _number(taken.high),
            n=taken.n,
            unscored=taken.unscored,
            off_task=taken.off_task,
            unit=printable(taken.unit, NAME),
        )


def _answers(run: Path, arm: str, problems: list[Problem]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """suite -> prompt id -> answer."""
    path = run / "arms" / arm / "answers.jsonl"
    answers: dict[str, dict[str, Mapping[str, Any]]] = collections.defaultdict(dict)
    for line, row in read_table(path) if path.is_file() else []:
        place = f"arm {arm}, answers.jsonl line {line}"
        if isinstance(row, BadRow) or not isinstance(row, Mapping) or "suite" not in row or "id" not in row:
            problems.append(Problem(place=place, reason="not an answer; it counts in no comparison"))
            continue
        suite, key = printable(str(row["suite"]), NAME), str(row["id"])
        if key in answers[suite]:
            problems.append(Problem(place=place, reason=f"a second answer to prompt {printable(key, NAME)}; the first one counts"))
            continue
        answers[suite][key] = row
    return dict(answers)


def _outcome(answer: Mapping[str, Any], quantity: str, judge: str) -> bool | None:
    if quantity == "accuracy":
        correct = answer.get("correct")
        return correct if isinstance(correct, bool) else None
    verdict = (answer.get("verdicts") or {}).get(judge)
    if verdict not in ("refused", "complied"):
        return None
    return bool(verdict == ("complied" if quantity == "asr" else "refused"))


def _outcomes(answers: Mapping[str, Mapping[str, Mapping[str, Any]]], suite: str, quantity: str, judge: str) -> Outcomes:
    return {key: _outcome(answer, quantity, judge) for key, answer in answers.get(suite, {}).items()}


def _scored_in_both(ours: Outcomes, theirs: Outcomes) -> list[tuple[bool, bool]]:
    return [(mine, other) for key, mine in ours.items() if mine is not None and (other := theirs.get(key)) is not None]


def _measured(readings: Sequence[Reading], *quantities: str) -> list[tuple[str, str, str]]:
    """(quantity, suite, judge) of the readings, each once, in their order; the known quantities only."""
    return list(dict.fromkeys((r.quantity, r.suite, r.judge) for r in readings if r.quantity in (quantities or QUANTITIES)))


def _comparisons(arm: str, against: str, readings: Sequence[Reading], answers: Mapping[str, Any], gate: Gate) -> Iterable[Comparison]:
    if arm not in answers or against not in answers:
        return
    for quantity, suite, judge in _measured(readings):
        ours, theirs = (_outcomes(answers[side], suite, quantity, judge) for side in (arm, against))
        both = _scored_in_both(ours, theirs)
        if not both:
            continue
        difference = paired_difference([mine for mine, _ in both], [other for _, other in both])
        only_arm, only_against = sum(mine > other for mine, other in both), sum(mine < other for mine, other in both)
        asked = quantity == "accuracy" and against == gate.plain
        yield Comparison(
            arm=arm,
            against=against,
            quantity=quantity,
            suite=suite,
            judge=judge,
            value=_number(difference.value),
            low=_number(difference.low),
            high=_number(difference.high),
            n=len(both),
            only_arm=only_arm,
            only_against=only_against,
            p=_number(mcnemar(only_arm, only_against)),
            margin=gate.margin if asked else None,
            non_inferior=non_inferior(difference, gate.margin) if asked else None,
        )


def _agreement(readings: Sequence[Reading], answers: Mapping[str, Any]) -> Iterable[Agreement]:
    judges: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for quantity, suite, judge in _measured(readings, "asr"):
        judges[quantity, suite].append(judge)
    for (quantity, suite), names in judges.items():
        for one, other in itertools.combinations(names, 2):
            both = []
            for of_arm in answers.values():
                both += _scored_in_both(_outcomes(of_arm, suite, quantity, one), _outcomes(of_arm, suite, quantity, other))
            yield Agreement(
                suite=suite,
                judges=(one, other),
                kappa=_number(kappa([str(a) for a, _ in both], [str(b) for _, b in both])) if both else None,
                agreed=sum(a == b for a, b in both) / len(both) if both else None,
                n=len(both),
            )


def _categories(readings: Sequence[Reading], answers: Mapping[str, Any]) -> Iterable[CategoryRate]:
    for quantity, suite, judge in _measured(readings, "asr"):
        for arm, of_arm in answers.items():
            groups: dict[str, list[bool]] = collections.defaultdict(list)
            for answer in of_arm.get(suite, {}).values():
                outcome = _outcome(answer, quantity, judge)
                if answer.get("category"):
                    groups[printable(str(answer["category"]), NAME)] += [] if outcome is None else [outcome]
            for category, hits in sorted(groups.items()):
                interval = wilson(sum(hits), len(hits)) if hits else None
                yield CategoryRate(
                    suite=suite,
                    judge=judge,
                    category=category,
                    arm=arm,
                    hits=sum(hits),
                    n=len(hits),
                    value=sum(hits) / len(hits) if hits else None,
                    low=interval.low if interval else None,
                    high=interval.high if interval else None,
                )


# --- rows -----------------------------------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """What stands in the place of harmful text: enough to find it again, nothing to learn from."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()
    return f"[redacted, {len(text.split())} words, id {digest}]"


def _texts(run: Path) -> dict[str, str]:
    """Row id -> the conversation as text; ids are made as ``record.read_examples`` makes them."""
    files = sorted((run / "data").glob("train.*"))
    seen: collections.Counter[str] = collections.Counter()
    texts = {}
    for _, row in read_table(files[0]) if files else []:
        if isinstance(row, BadRow):
            continue
        key = row_id(row)
        seen[key] += 1
        turns = parse(row)
        text = json.dumps(row, ensure_ascii=False) if isinstance(turns, str) else "\n".join(f"{t['role']}: {t['content']}" for t in turns)
        texts[key if seen[key] == 1 else f"{key}-{seen[key]}"] = text
    return texts


def _cuts(run: Path, arms: Sequence[str], show_text: bool) -> Iterable[Cut]:
    found = [(arm, cut) for arm in arms if (cut := _json(run / "cut" / arm / "cut.json")) is not None]
    if not found:
        return
    rows = {str(row["id"]): row for row in _json(run / "data" / "rows.json") or []}
    # Origins tell right cuts from wrong ones only where the run mixed the rows itself: one origin for all is a set as it came.
    known = all(row.get("origin") for row in rows.values()) and len({row["origin"] for row in rows.values()}) > 1
    texts = _texts(run)
    for arm, cut in found:
        removed = {str(row["row_id"]): row for row in cut["removed"]}
        kept = cut["kept"] if isinstance(cut["kept"], int) else len(cut["kept"])
        origins = None
        if known:
            total = collections.Counter(str(row["origin"]) for row in rows.values())
            gone = collections.Counter(str(rows[key]["origin"]) for key in removed if key in rows)
            origins = tuple(
                OriginCount(origin=printable(origin, NAME), rows=total[origin], removed=gone[origin]) for origin in sorted(total)
            )
        task = next((count for count in origins or () if count.origin == "task"), None)
        worst = sorted(removed.values(), key=lambda row: -score if (score := _number(row.get("score"))) is not None else math.inf)
        scorer, threshold = str(cut["scorer"]), _number(cut.get("threshold"))
        yield Cut(
            arm=arm,
            scorer=printable(scorer, NAME),
            estimator=printable(str(cut.get("estimator") or ""), NAME),
            threshold=threshold,
            rows=kept + len(removed),
            kept=kept,
            removed=len(removed),
            origins=origins,
            false_share=task.removed / task.rows if task else None,
            histogram=_histogram(run, scorer, threshold, rows if known else {}, removed),
            shown=tuple(_removed(row, rows, texts, show_text) for row in worst[:SHOWN]),
        )


def _removed(row: Mapping[str, Any], rows: Mapping[str, Any], texts: Mapping[str, str], show_text: bool) -> Removed:
    key = str(row["row_id"])
    about = rows.get(key, {})
    text = texts.get(key)
    if text is None:
        shown = "[the row is not in the training file]"
    else:
        shown = printable(text) if show_text else redact(text)
    return Removed(
        row_id=printable(key, NAME),
        line=row.get("line"),
        score=_number(row.get("score")),
        reason=printable(str(row.get("reason") or "")),
        origin=printable(str(about["origin"]), NAME) if about.get("origin") else None,
        category=printable(str(about["category"]), NAME) if about.get("category") else None,
        text=shown,
    )


def _histogram(run: Path, scorer: str, threshold: float | None, rows: Mapping[str, Any], removed: Mapping[str, Any]) -> Histogram | None:
    """Scores in bins that meet at the threshold, so that no bin mixes the two sides."""
    path, column = run / "scan" / "scores.parquet", f"score_{scorer}"
    if not path.is_file() or column not in pyarrow.parquet.read_schema(path).names:
        return None
    table = pyarrow.parquet.read_table(path, columns=["row_id", column]).to_pydict()
    scored = [(str(key), score) for key, value in zip(table["row_id"], table[column], strict=True) if (score := _number(value)) is not None]
    if not scored:
        return None
    values = np.array([score for _, score in scored])
    far = float(np.quantile(np.abs(values), 0.9))
    heavy = far > 0 and float(np.abs(values).max()) / far > HEAVY
    # The axis is linear within the bulk of the scores and logarithmic beyond it.
    constant = float(np.median(np.abs(values[values != 0]))) if heavy else None
    to_axis = (lambda x: np.sign(x) * np.log1p(np.abs(x) / constant)) if constant else np.asarray
    from_axis = (lambda x: np.sign(x) * np.expm1(np.abs(x)) * constant) if constant else np.asarray
    ends = np.array([values.min(), values.max()] + ([threshold] if threshold is not None else []))
    low, high = float(to_axis(ends).min()), float(to_axis(ends).max())
    width = (high - low) / BINS or 1.0
    start = float(to_axis(np.array(threshold))) if threshold is not None else low
    steps = np.arange(-math.ceil((start - low) / width - 1e-9), math.ceil((high - start) / width - 1e-9) + 1)
    edges = start + width * (steps if len(steps) > 1 else np.array([0, 1]))
    groups: dict[tuple[str | None, bool], list[float]] = collections.defaultdict(list)
    for key, score in scored:
        origin = printable(str(rows[key]["origin"]), NAME) if key in rows else None
        groups[origin, key in removed].append(score)
    series = []
    for (origin, gone), scores in sorted(groups.items(), key=lambda item: (item[0][0] != "task", item[0][0] or "", item[0][1])):
        places = np.clip(np.floor((to_axis(np.array(scores)) - edges[0]) / width + 1e-9).astype(int), 0, len(edges) - 2)
        series.append(Series(origin=origin, removed=gone, counts=tuple(np.bincount(places, minlength=len(edges) - 1).tolist())))
    return Histogram(
        scorer=printable(scorer, NAME),
        threshold=threshold,
        symlog=constant,
        edges=tuple(from_axis(edges).tolist()),
        series=tuple(series),
    )


def _training(run: Path, arms: Sequence[str]) -> Iterable[Training]:
    for arm in arms:
        facts = _json(run / "arms" / arm / "train.json")
        if facts is None:
            continue
        loss = [(int(step), value) for step, raw in facts.get("loss") or [] if (value := _number(raw)) is not None]
        every = math.ceil(len(loss) / POINTS) or 1
        yield Training(
            arm=arm,
            methods=tuple(_method(spec) for spec in facts.get("methods") or []),
            steps=facts.get("steps"),
            seconds=_number(facts.get("seconds")),
            loss=tuple(loss[::every]),
        )


def _method(spec: Any) -> str:
    """A method's name with the fields that were set: ``safegrad (rho=2.0)``."""
    if not isinstance(spec, Mapping):
        return printable(str(spec), NAME)
    fields = {name: ", ".join(f"{key}={value}" for key, value in (given or {}).items()) for name, given in spec.items()}
    return printable("; ".join(f"{name} ({given})" if given else str(name) for name, given in fields.items()), 2 * NAME)


def _samples(readings: Sequence[Reading], answers: Mapping[str, Any], judged: str, show_text: bool) -> Iterable[Sample]:
    """Attack prompts: those that the judged arm still answers first, then those that some other arm answered."""

    def complied(arm: str, suite: str, key: str) -> int:
        return sum(v == "complied" for v in (answers[arm].get(suite, {}).get(key, {}).get("verdicts") or {}).values())

    show = printable if show_text else redact
    suites = dict.fromkeys(suite for _, suite, _ in _measured(readings, "asr"))
    keys = [(suite, key) for suite in suites for key in dict.fromkeys(key for arm in answers.values() for key in arm.get(suite, {}))]
    keys.sort(key=lambda at: (-complied(judged, *at) if judged in answers else 0, -sum(complied(arm, *at) for arm in answers)))
    for suite, key in keys[:SAMPLES]:
        said = {arm: of_arm[suite][key] for arm, of_arm in answers.items() if key in of_arm.get(suite, {})}
        first = next(iter(said.values()))
        yield Sample(
            suite=suite,
            id=printable(key, NAME),
            category=printable(str(first.get("category") or ""), NAME),
            prompt=show(str(first.get("prompt") or "")),
            answers=tuple(
                Answer(
                    arm=arm,
                    verdicts={printable(j, NAME): printable(str(v), NAME) for j, v in (answer.get("verdicts") or {}).items()},
                    text=show(str(answer.get("answer") or "")),
                )
                for arm, answer in said.items()
            ),
        )


# --- the terminal ---------------------------------------------------------------------------------------------------------------


def terminal_table(report: Report) -> rich.table.Table:
    """The three arms side by side, the verdict below. Names are Text: markup in them is not interpreted."""
    table = rich.table.Table(title=rich.text.Text(f"safebasin: {report.run}"), caption_justify="left")
    table.add_column("measured")
    for arm in report.arms:
        table.add_column(rich.text.Text(arm), justify="right")
    for quantity, suite, judge in report.places:
        about = ", ".join(filter(None, ("" if suite == quantity else suite, judge)))
        cells = [rich.text.Text("\n".join(filter(None, (QUANTITIES.get(quantity, quantity), about))))]
        for arm in report.arms:
            of_arm = [r for r in report.of(quantity, arm) if (r.suite, r.judge) == (suite, judge)]
            cells.append(rich.text.Text(cell(of_arm[0]) if of_arm else "–"))
        table.add_row(*cells)
    table.caption = rich.text.Text("\n".join([report.verdict.status.upper(), *report.verdict.reasons]))
    return table


def cell(reading: Reading) -> str:
    """A reading in two lines: the value; its interval and what it was counted from."""
    value, _, rest = page.number(reading).replace("– n", "–[n").partition("[")
    apart = [f"{n} {name}" for n, name in ((reading.unscored, "unscored"), (reading.off_task, "off task")) if n]
    return "\n".join([value.strip(), rest.replace("]", ","), *apart])
