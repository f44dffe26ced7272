"""What was done to rows: cuts with histograms of their scores, the heat map, training curves, samples of answers."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.data.chat import to_conversation
from safebasin.data.example import row_id
from safebasin.data.records import AnswerRecord
from safebasin.data.tables import read_table
from safebasin.report.files import (
    NAME,
    Answers,
    CutFile,
    HeatFile,
    MixFile,
    RemovedFile,
    RepairFile,
    RowFile,
    TrainFile,
    load,
    redact,
    safe_name,
)
from safebasin.report.histogram import histogram_of
from safebasin.report.rates import MetricKey
from safebasin.report.report import (
    Answer,
    Cut,
    HeatRow,
    HeatToken,
    Mixed,
    OriginCount,
    Removed,
    Repair,
    RepairedModule,
    Sample,
    Training,
)

SHOWN = 100  # removed rows in the report; all of them are in cut/<arm>/cut.json
SAMPLES = 12  # attack prompts shown with the answers of every arm
POINTS = 200  # of a loss curve
TOKENS = 300  # of a row of the heat map; all of them are in scan/heat.json


def cuts_of(run: Path, arms: Sequence[str], show_text: bool) -> Iterator[Cut]:
    """The cut of every arm that has one; texts of rows are redacted unless ``show_text``."""
    cuts = {arm: cut for arm in arms if (cut := load(run / "cut" / arm / "cut.json", CutFile))}
    if not cuts:
        return
    facts = {row["id"]: row for row in load(run / "data" / "rows.json", list[RowFile], [])}
    origins = {key: safe_name(row.get("origin")) for key, row in facts.items()}
    # Only a run that mixed the rows itself can count wrong cuts: a set as it came has one origin or none.
    if len(set(origins.values())) < 2 or "" in origins.values():
        origins = {}
    files = sorted(file for file in (run / "data").glob("train.*") if file.suffix != ".part")
    rows = dict(read_table(files[0])) if files else {}
    for arm, cut in cuts.items():
        removed = sorted(
            cut["removed"], key=lambda row: -math.inf if row["score"] is None else row["score"], reverse=True
        )
        total, lost = Counter(origins.values()), Counter(origins.get(row["row_id"]) for row in removed)
        counts = [OriginCount(origin=origin, rows=total[origin], removed=lost[origin]) for origin in sorted(total)]
        yield Cut(
            arm=arm,
            scorer=safe_name(cut["scorer"]),
            estimator=safe_name(cut["estimator"]),
            threshold=cut["threshold"],
            rows=cut["remaining"] + len(removed),
            removed=len(removed),
            origins=tuple(counts) or None,
            false_share=lost["task"] / total["task"] if total["task"] else None,
            histogram=histogram_of(run, arm, cut, origins),
            shown=tuple(
                _removed(row, facts.get(row["row_id"]), rows.get(row["line"]), show_text) for row in removed[:SHOWN]
            ),
        )


def _removed(cut: RemovedFile, facts: RowFile | None, row: Any, show_text: bool) -> Removed:
    # A second row with the same content has the id <id>-2.
    if not isinstance(row, Mapping) or row_id(row) != cut["row_id"].split("-")[0]:
        text = "[the row is not in the training file]"
    else:
        conversation = to_conversation(row)
        if isinstance(conversation, str):
            text = json.dumps(row, ensure_ascii=False, default=str)
        else:
            text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation.messages)
        text = printable(text) if show_text else redact(text)
    return Removed(
        row_id=safe_name(cut["row_id"]),
        line=cut["line"],
        score=cut["score"],
        reason=printable(cut["reason"]),
        origin=(safe_name(facts.get("origin")) or None) if facts else None,
        category=(safe_name(facts.get("category")) or None) if facts else None,
        text=text,
    )


def heat_of(run: Path, show_text: bool) -> Iterator[HeatRow]:
    """The highest rows by token. In a redacted report every letter and sign is a low block: the colours still show."""
    for row in load(run / "scan" / "heat.json", list[HeatFile], []):
        tokens = [(text if show_text else re.sub(r"\S", "\u2582", text), value) for text, value in row["tokens"]]
        yield HeatRow(
            row_id=safe_name(row["row_id"]),
            line=row["line"],
            scorer=safe_name(row["scorer"]),
            score=row["score"],
            peak=max((abs(value) for _, value in tokens if value is not None), default=0.0),
            tokens=tuple(HeatToken(text=printable(text, NAME), value=value) for text, value in tokens[:TOKENS]),
            omitted=max(len(tokens) - TOKENS, 0),
        )


def training_of(run: Path, arms: Sequence[str]) -> Iterator[Training]:
    """The training of every arm that was tuned, its loss curve thinned to ``POINTS``."""
    for arm in arms:
        facts = load(run / "arms" / arm / "train.json", TrainFile)
        if not facts:
            continue
        loss = [(step, value) for step, value in facts.get("loss") or [] if value is not None]
        yield Training(
            arm=arm,
            methods=tuple(map(_method, facts.get("methods") or [])),
            steps=facts.get("steps"),
            seconds=facts.get("seconds"),
            loss=tuple(loss[:: math.ceil(len(loss) / POINTS) or 1]),
        )


def repairs_of(run: Path, arms: Sequence[str]) -> Iterator[Repair]:
    """The repair of every arm that has one."""
    for arm in arms:
        facts = load(run / "arms" / arm / "repair.json", RepairFile)
        if not facts:
            continue
        yield Repair(
            arm=arm,
            of=safe_name(facts.get("of")),
            edits=tuple(map(_method, facts["edits"])),
            **facts["summary"],
            modules=tuple(
                RepairedModule(
                    module=safe_name(row["module"]),
                    ranks=(row["rank_in"], row["rank_out"]),
                    selected=tuple(map(safe_name, row["selected"])),
                    **{key: row[key] for key in ("cosine", "norm", "norm_after", "distance")},
                )
                for row in facts["rows"]
            ),
        )


def mixed_of(run: Path, arms: Sequence[str]) -> Iterator[Mixed]:
    """How the answers of every mixed arm were mixed."""
    for arm in arms:
        facts = load(run / "arms" / arm / "mix.json", MixFile)
        if facts:
            counts = facts["requests"].items()
            yield Mixed(
                arm=arm,
                of=safe_name(facts["of"]),
                share=facts["share"],
                guard=_method(facts["guard"]) if facts["guard"] else "",
                above=facts["above"],
                requests=tuple((safe_name(suite), count["mixed"], count["asked"]) for suite, count in counts),
            )


def _method(spec: str | Mapping[str, Any]) -> str:
    """A method's name with the fields that were set: ``safegrad (rho=2.0)``."""
    methods = {spec: None} if isinstance(spec, str) else spec
    texts = []
    for method, fields in methods.items():
        values = ", ".join(f"{key}={value}" for key, value in (fields or {}).items())
        texts.append(f"{method} ({values})" if values else method)
    return printable(", ".join(texts), 2 * NAME)


def samples_of(attacks: Sequence[MetricKey], answers: Answers, judged: str | None, show_text: bool) -> Iterator[Sample]:
    """Attack prompts: first those that the judged arm still complies with, then those that other arms comply with."""
    show = printable if show_text else redact
    suites = {key.suite for key in attacks}
    prompts: dict[tuple[str, str], dict[str, AnswerRecord]] = defaultdict(dict)  # suite, prompt id -> arm -> answer
    for (arm, suite, prompt), answer in answers.items():
        if suite in suites:
            prompts[suite, prompt][arm] = answer

    def complied(by_arm: Mapping[str, AnswerRecord]) -> tuple[int, int]:
        counts = {
            arm: sum("complied" in verdict for verdict in answer.verdicts.values()) for arm, answer in by_arm.items()
        }
        return counts.get(judged or "", 0), sum(counts.values())

    for (suite, prompt), by_arm in sorted(prompts.items(), key=lambda item: complied(item[1]), reverse=True)[:SAMPLES]:
        first = next(iter(by_arm.values()))
        yield Sample(
            suite=suite,
            id=safe_name(prompt),
            category=safe_name(first.category),
            prompt=show(first.prompt),
            answers=tuple(
                Answer(
                    arm=arm,
                    verdicts={safe_name(judge): safe_name(verdict) for judge, verdict in answer.verdicts.items()},
                    text=show(answer.answer),
                )
                for arm, answer in by_arm.items()
            ),
        )
