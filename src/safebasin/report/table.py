"""A run folder to a Report, and the Report to its files and to the terminal.

A prompt's outcome under a judge is a hit, no hit, or not scored. As in the suites, an answer off the task (neither refused nor
complied) is in no ratio; it is counted apart.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
import yaml
from rich.text import Text

import safebasin.report as parts
from safebasin.console import printable
from safebasin.data.chat import to_messages
from safebasin.data.example import row_id
from safebasin.data.records import Measurement
from safebasin.data.tables import read_table, write_json
from safebasin.errors import UserError
from safebasin.report import QUANTITIES, SCHEMA, Gate, MetricKey, Problem, Reading, Report, Verdict, card, page
from safebasin.report.gate import INCONCLUSIVE, judge_gate, parse_gate
from safebasin.stats import kappa, mcnemar, non_inferior, paired_difference, wilson

SHOWN = 100  # removed rows in the report; all of them are in cut/<arm>/cut.json
SAMPLES = 12  # attack prompts shown with the answers of every arm
NAME = 60  # characters of a name that came with the data: category, origin, id
BINS = 40
POINTS = 200  # of a loss curve
TOKENS = 300  # of a row of the heat map; all of them are in scan/heat.json
HEAVY = 20.0  # farthest score over the 90th percentile of distances from 0, above which the axis is symlog

Answers = dict[tuple[str, str, str], Mapping[str, Any]]  # arm, suite, prompt id -> row of answers.jsonl
Hits = Mapping[tuple[str, MetricKey], dict[str, bool | None]]  # arm, place -> prompt id -> hit; None: not scored


def write(run: Path, *, show_text: bool = False, gate: Gate | None = None) -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` of a run folder and its adapters' cards, all from one object, which is returned.

    Raises:
        UserError: the folder is not a run folder, or a file of it is broken.
    """
    report = collect(run, show_text=show_text, gate=gate)
    page.write(run, "report", page.facts(report))
    write_json(run / "report.json", dataclasses.asdict(report))
    card.write(run, report)
    return report


def collect(run: Path, *, show_text: bool = False, gate: Gate | None = None) -> Report:
    """Read a run folder. ``gate`` None: the one of its ``run.yaml``, or the default one. ``show_text``: harmful text in clear."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"no such run folder: {run}")
    config = _load(run / "run.yaml", {})
    gate = gate or parse_gate(config.get("gate") or {})
    found = [path.name for path in (run / "arms").glob("*") if path.is_dir()]
    found.sort(key=lambda name: (name != "start", name != "plain", name))
    arms = tuple(
        dict.fromkeys([*(config.get("arms") or ()), *found])
    )  # those of the configuration come first, in its order
    if not arms:
        raise UserError(f"{run} holds no arm to report on (no folder {run / 'arms'}); run it first: safebasin run")
    judged = gate.arm or arms[-1]
    problems = [
        Problem(place=f"line {bad['line']}", reason=printable(bad["reason"]))
        for bad in _load(run / "data" / "problems.json", [])
    ]
    readings = tuple(reading for arm in arms for reading in _readings(run, arm, problems))
    answers = answers_of(run, arms, problems)
    places = list(dict.fromkeys(reading.place for reading in readings if reading.quantity in QUANTITIES))
    attacks = [place for place in places if place.quantity == "asr"]
    hits = hits_of(places, answers)
    pairs = dict.fromkeys([(judged, gate.plain), (judged, arms[0]), *((arm, arms[0]) for arm in arms[1:])])
    report = Report(
        schema=SCHEMA,
        run=_name(run.resolve().name),
        redacted=not show_text,
        verdict=Verdict(code=4, status=INCONCLUSIVE, reasons=()),
        gate=gate,
        arms=arms,
        judged=judged,
        readings=readings,
        comparisons=tuple(
            c for arm, against in pairs if arm != against for c in _comparisons(arm, against, places, hits, gate)
        ),
        agreement=tuple(_agreement(attacks, arms, hits)),
        categories=tuple(_categories(attacks, arms, answers, hits)),
        cuts=tuple(_cuts(run, arms, show_text)),
        heat=tuple(_heat(run, show_text)),
        training=tuple(_training(run, arms)),
        samples=tuple(_samples(attacks, answers, judged, show_text)),
        problems=tuple(problems),
        manifest=dict(_flat(_load(run / "manifest.json", {}))),
    )
    return dataclasses.replace(report, verdict=judge_gate(report, gate))


# --- the run's own files --------------------------------------------------------------------------------------------------------


def _load(path: Path, missing: Any = None) -> Any:
    """The object or list that a JSON or YAML file holds; ``missing`` if there is none."""
    if not path.is_file():
        return missing
    try:
        held = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is broken: {str(error).splitlines()[0]}; delete it and run again") from None
    return held if isinstance(held, dict | list) else missing


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield _name(name), printable(value if isinstance(value, str) else json.dumps(value), 120)


def _name(value: Any) -> str:
    """A name that came with the data, made safe to show."""
    return printable(str(value or ""), NAME)


def redact(text: str) -> str:
    """What stands in the place of harmful text: enough to find it again, nothing to learn from."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()
    return f"[redacted, {len(text.split())} words, id {digest}]"


# --- numbers --------------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite number, or None: NaN is not a measurement."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _readings(run: Path, arm: str, problems: list[Problem]) -> Iterable[Reading]:
    path = run / "arms" / arm / "measurements.jsonl"
    if not path.is_file():
        problems.append(Problem(place=f"arm {arm}", reason="it has no measurements"))
        return
    for line, row in read_table(path):
        try:
            taken = Measurement(**row)
        except TypeError:
            raise UserError(f"{path}, line {line}: not a measurement; delete the file and measure again") from None
        if taken.category:
            continue  # categories are counted from the answers, for every judge
        value = _number(taken.value) if taken.n > 0 else None  # a share of nothing is not zero
        low, high = (None if value is None else _number(end) for end in (taken.low, taken.high))
        told = {
            "value": value,
            "low": low,
            "high": high,
            "n": taken.n,
            "unscored": taken.unscored,
            "off_task": taken.off_task,
        }
        yield Reading(
            arm=arm,
            quantity=_name(taken.what),
            suite=_name(taken.suite),
            judge=_name(taken.judge),
            unit=_name(taken.unit),
            **told,
        )


def answers_of(run: Path, arms: Sequence[str], problems: list[Problem]) -> Answers:
    answers: Answers = {}
    for arm in arms:
        path = run / "arms" / arm / "answers.jsonl"
        for line, row in read_table(path) if path.is_file() else []:
            place = f"arm {arm}, answers.jsonl line {line}"
            if not isinstance(row, Mapping) or not {"suite", "id", "prompt", "answer", "verdicts"} <= row.keys():
                problems.append(Problem(place=place, reason="not an answer; it counts in no comparison"))
                continue
            key = arm, _name(row["suite"]), str(row["id"])
            if key in answers:
                problems.append(
                    Problem(place=place, reason=f"a second answer to prompt {_name(key[2])}; the first one counts")
                )
            answers.setdefault(key, row)
    return answers


def hits_of(places: Iterable[MetricKey], answers: Answers) -> Hits:
    hits: Hits = defaultdict(dict)
    for place, ((arm, suite, key), answer) in itertools.product(places, answers.items()):
        if suite == place.suite:
            words = {"complied": place.quantity == "asr", "refused": place.quantity == "over_refusal"}
            hit = (
                answer.get("correct")
                if place.quantity == "accuracy"
                else words.get(answer["verdicts"].get(place.judge))
            )
            hits[arm, place][key] = hit
    return hits


def _scored_in_both(ours: Mapping[str, bool | None], theirs: Mapping[str, bool | None]) -> list[tuple[bool, bool]]:
    return [(mine, other) for key, mine in ours.items() if mine is not None and (other := theirs.get(key)) is not None]


def _comparisons(
    arm: str, against: str, places: Iterable[MetricKey], hits: Hits, gate: Gate
) -> Iterable[parts.Comparison]:
    for place in places:
        both = _scored_in_both(hits[arm, place], hits[against, place])
        if not both:
            continue
        difference = paired_difference(*zip(*both, strict=True))
        only_arm, only_against = both.count((True, False)), both.count((False, True))
        told = {"only_arm": only_arm, "only_against": only_against, "p": mcnemar(only_arm, only_against)}
        if place.quantity == "accuracy" and against == gate.plain:
            told |= {"margin": gate.margin, "non_inferior": non_inferior(difference, gate.margin)}
        yield parts.Comparison(arm=arm, against=against, **place._asdict(), **difference._asdict(), **told)


def _agreement(attacks: Sequence[MetricKey], arms: Sequence[str], hits: Hits) -> Iterable[parts.Agreement]:
    for one, other in itertools.combinations(attacks, 2):
        if one.suite != other.suite:
            continue
        both = [pair for arm in arms for pair in _scored_in_both(hits[arm, one], hits[arm, other])]
        agreed = sum(a == b for a, b in both) / len(both) if both else None
        by_chance = kappa(*([str(side) for side in sides] for sides in zip(*both, strict=True))) if both else None
        yield parts.Agreement(
            suite=one.suite, judges=(one.judge, other.judge), kappa=by_chance, agreed=agreed, n=len(both)
        )


def _categories(
    attacks: Sequence[MetricKey], arms: Sequence[str], answers: Answers, hits: Hits
) -> Iterable[parts.CategoryRate]:
    for place, arm in itertools.product(attacks, arms):
        groups: dict[str, list[bool]] = defaultdict(list)
        for key, hit in hits[arm, place].items():
            groups[_name(answers[arm, place.suite, key].get("category"))] += [] if hit is None else [hit]
        for category, group in sorted((name, group) for name, group in groups.items() if name):
            count, n = sum(group), len(group)
            low, high = wilson(count, n) if n else (None, None)
            told = {"value": count / n if n else None, "low": low, "high": high, "n": n}
            yield parts.CategoryRate(arm=arm, **place._asdict(), category=category, hits=count, **told)


# --- rows -----------------------------------------------------------------------------------------------------------------------


def _cuts(run: Path, arms: Sequence[str], show_text: bool) -> Iterable[parts.Cut]:
    cuts = {arm: cut for arm in arms if (cut := _load(run / "cut" / arm / "cut.json"))}
    if not cuts:
        return
    about = {row["id"]: row for row in _load(run / "data" / "rows.json", [])}
    origins = {key: _name(row.get("origin")) for key, row in about.items()}
    # Origins tell right cuts from wrong ones only where the run mixed the rows itself: one origin for all is a set as it came.
    if len(set(origins.values())) < 2 or "" in origins.values():
        origins = {}
    trained = next((dict(read_table(file)) for file in sorted((run / "data").glob("train.*"))), {})
    for arm, cut in cuts.items():
        removed = cut["removed"]
        total, gone = Counter(origins.values()), Counter(origins.get(row["row_id"]) for row in removed)
        worst = sorted(removed, key=lambda row: row["score"], reverse=True)[:SHOWN]
        yield parts.Cut(
            arm=arm,
            scorer=_name(cut["scorer"]),
            estimator=_name(cut["estimator"]),
            threshold=_number(cut["threshold"]),
            rows=cut["kept"] + len(removed),
            kept=cut["kept"],
            removed=len(removed),
            origins=tuple(
                parts.OriginCount(origin=name, rows=total[name], removed=gone[name]) for name in sorted(total)
            )
            or None,
            false_share=gone["task"] / total["task"] if total["task"] else None,
            histogram=_histogram(run, arm, cut, origins),
            shown=tuple(
                _removed(row, about.get(row["row_id"], {}), trained.get(row["line"]), show_text) for row in worst
            ),
        )


def _removed(cut: Mapping[str, Any], about: Mapping[str, Any], row: Any, show_text: bool) -> parts.Removed:
    if row is None or row_id(row) != cut["row_id"].split("-")[0]:  # a second row alike is named <id>-2
        text = "[the row is not in the training file]"
    else:
        turns = to_messages(row)
        text = (
            json.dumps(row, ensure_ascii=False)
            if isinstance(turns, str)
            else "\n".join(f"{t['role']}: {t['content']}" for t in turns)
        )
        text = printable(text) if show_text else redact(text)
    names = {"row_id": _name(cut["row_id"]), **{key: _name(about.get(key)) or None for key in ("origin", "category")}}
    return parts.Removed(line=cut["line"], score=cut["score"], reason=printable(cut["reason"]), text=text, **names)


def _histogram(run: Path, arm: str, cut: Mapping[str, Any], origins: Mapping[str, str]) -> parts.Histogram | None:
    """Scores in bins that meet at the threshold, so that no bin mixes the two sides. A cut by several scorers made a score of its own."""
    threshold = _number(cut["threshold"])
    joined, single = run / "cut" / arm / "scores.parquet", run / "scan" / "scores.parquet"
    path, column = (joined, "score") if joined.is_file() else (single, f"score_{cut['scorer']}")
    rows = [row for _, row in read_table(path)] if path.is_file() else []
    scores = {row["row_id"]: score for row in rows if (score := _number(row.get(column))) is not None}
    if not scores:
        return None
    values = np.array(list(scores.values()))
    far = float(np.quantile(np.abs(values), 0.9))
    heavy = far > 0 and float(np.abs(values).max()) / far > HEAVY
    # The axis is linear within the bulk of the scores and logarithmic beyond it.
    constant = float(np.median(np.abs(values[values != 0]))) if heavy else None
    to_axis = (lambda x: np.sign(x) * np.log1p(np.abs(x) / constant)) if constant else np.asarray
    from_axis = (lambda x: np.sign(x) * np.expm1(np.abs(x)) * constant) if constant else np.asarray
    on_axis = to_axis(values)
    start = float(on_axis.min() if threshold is None else to_axis(threshold))
    low, high = min(start, float(on_axis.min())), max(start, float(on_axis.max()))
    width = (high - low) / BINS or 1.0
    below, above = math.ceil((start - low) / width - 1e-9), math.ceil((high - start) / width - 1e-9)
    edges = start + width * np.arange(-below, max(above, 1 - below) + 1)
    bins = np.clip(
        np.searchsorted(edges, on_axis) - 1, 0, len(edges) - 2
    )  # a score at the threshold is kept: it is in the bin below
    removed = {row["row_id"] for row in cut["removed"]}
    fates = [(origins.get(key), key in removed) for key in scores]
    series = []
    for origin, gone in sorted(set(fates), key=lambda fate: (fate[0] != "task", fate[0] or "", fate[1])):
        counts = np.bincount(bins[[fate == (origin, gone) for fate in fates]], minlength=len(edges) - 1)
        series.append(parts.Series(origin=origin, removed=gone, counts=tuple(counts.tolist())))
    told = {
        "threshold": threshold,
        "symlog": constant,
        "edges": tuple(from_axis(edges).tolist()),
        "series": tuple(series),
    }
    return parts.Histogram(scorer=_name(cut["scorer"]), **told)


def _heat(run: Path, show_text: bool) -> Iterable[parts.HeatRow]:
    """The highest rows token by token. Unasked, letters and signs become low blocks, above which the colours show."""
    for row in _load(run / "scan" / "heat.json", []):
        told = [(text if show_text else re.sub(r"\S", "\u2582", text), _number(raw)) for text, raw in row["tokens"]]
        yield parts.HeatRow(
            row_id=_name(row["row_id"]),
            line=row["line"],
            scorer=_name(row["scorer"]),
            score=_number(row["score"]),
            peak=max((abs(value) for _, value in told if value is not None), default=0.0),
            tokens=tuple(parts.HeatToken(text=printable(text, NAME), value=value) for text, value in told[:TOKENS]),
            left=max(len(told) - TOKENS, 0),
        )


def _training(run: Path, arms: Sequence[str]) -> Iterable[parts.Training]:
    for arm in arms:
        facts = _load(run / "arms" / arm / "train.json")
        if not facts:
            continue
        loss = [(int(step), value) for step, raw in facts.get("loss") or [] if (value := _number(raw)) is not None]
        thinned = tuple(loss[:: math.ceil(len(loss) / POINTS) or 1])
        methods = tuple(map(_method, facts.get("methods") or []))
        yield parts.Training(
            arm=arm, methods=methods, steps=facts.get("steps"), seconds=_number(facts.get("seconds")), loss=thinned
        )


def _method(spec: str | Mapping[str, Any]) -> str:
    """A method's name with the fields that were set: ``safegrad (rho=2.0)``."""
    name, fields = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
    given = ", ".join(f"{key}={value}" for key, value in (fields or {}).items())
    return printable(f"{name} ({given})" if given else name, 2 * NAME)


def _samples(attacks: Sequence[MetricKey], answers: Answers, judged: str, show_text: bool) -> Iterable[parts.Sample]:
    """Attack prompts: those that the judged arm still answers first, then those that some other arm answered."""
    show = printable if show_text else redact
    suites = {place.suite for place in attacks}
    asked: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)  # suite, prompt id -> arm -> answer
    for (arm, suite, key), answer in answers.items():
        if suite in suites:
            asked[suite, key][arm] = answer

    def complied(said: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
        counts = {arm: list(answer["verdicts"].values()).count("complied") for arm, answer in said.items()}
        return counts.get(judged, 0), sum(counts.values())

    for (suite, key), said in sorted(asked.items(), key=lambda item: complied(item[1]), reverse=True)[:SAMPLES]:
        first = next(iter(said.values()))
        told = tuple(
            parts.Answer(
                arm=arm, verdicts={_name(j): _name(v) for j, v in row["verdicts"].items()}, text=show(row["answer"])
            )
            for arm, row in said.items()
        )
        yield parts.Sample(
            suite=suite,
            id=_name(key),
            category=_name(first.get("category")),
            prompt=show(first["prompt"]),
            answers=told,
        )


# --- the terminal ---------------------------------------------------------------------------------------------------------------


def terminal_table(report: Report) -> rich.table.Table:
    """The arms side by side, the verdict below. Names are Text: markup in them is not interpreted."""
    table = rich.table.Table("measured", title=Text(f"safebasin: {report.run}"), caption_justify="left")
    table.caption = Text("\n".join([report.verdict.status.upper(), *report.verdict.reasons]))
    for arm in report.arms:
        table.add_column(Text(arm), justify="right")
    for place in report.places:
        about = place.judge if place.suite == place.quantity else place.name
        row = ["\n".join(filter(None, (QUANTITIES.get(place.quantity, place.quantity), about)))]
        for reading in (report.at(arm, place) for arm in report.arms):
            counted = reading and ", ".join(filter(None, (page.interval(reading), page.counted(reading, "\n"))))
            row.append(f"{page.value(reading)}\n{counted}" if reading else "–")
        table.add_row(*map(Text, row))
    return table
