"""The stages joined by files: rows -> scores -> cut -> adapter -> measurements -> report. Each arrow is one function.

data/train.*   scan/scores.parquet   cut/<arm>/   arms/<arm>/adapter/   arms/<arm>/measurements.jsonl   report.*
"""

import dataclasses
import functools
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from safebasin.attack import attack
from safebasin.attack.craft import Row, Score, conversation, poison
from safebasin.console import console, steps
from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.source import Source, check_file, open_examples, open_rows, open_table
from safebasin.data.tables import BadRow, file_digest, write_json, write_table
from safebasin.encode import TokenizedRow, encode_all, shorten, template_digest
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.answers import Answers
from safebasin.measure.judge import OF_ALIGNED, Judge, make_judges
from safebasin.measure.subject import Subject
from safebasin.models.adapter import fresh_adapter
from safebasin.models.bundled import resolve
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.pipeline.config import Run, digest, plain
from safebasin.pipeline.folder import Folder
from safebasin.report import Report
from safebasin.report.gate import parse_gate
from safebasin.report.table import write
from safebasin.runtime import processes
from safebasin.scan import scorer
from safebasin.scan.column import Column, from_file, keep, star
from safebasin.scan.cut import cut as cut_rows
from safebasin.scan.cut import write_cut
from safebasin.scan.heat import HEAT, heat
from safebasin.scan.scan import ANCHORS, ScanJournal, read_scores, scan, write_scores
from safebasin.train import method
from safebasin.train.compose import Composition
from safebasin.train.trainer import OracleTrainer, arguments, check_columns, check_settings, streams_of
from safebasin.vector import gather_full, trainable


def source_digests(registry: Any, specs: Iterable[Any]) -> list[str]:
    return []


class Pipeline:
    """One run in its folder. Built, it has checked everything that can be checked without a model.

    Several processes share what a scan and a tuning cost; the first one does the rest, and the others wait.

    Raises:
        UserError: a method, field, set or setting that does not stand.
    """

    def __init__(self, config: Run, out: Path):
        console.quiet = not processes().is_main_process
        self.config = config
        self.folder = Folder(out)
        self.out = out
        self.arms = config.arms
        self.suites = [suite.make(spec) for spec in config.measure.suites]
        self.scorers = {self._name(spec): scorer.make(spec) for spec in config.scan.scorers}
        if len(self.scorers) < len(config.scan.scorers):
            raise UserError(
                "scan.scorers names one scorer twice; its scores would stand in one column, so run the second in a folder of its own"
            )
        self.attack = attack.make(config.data.attack)
        if "score" in self.attack.entry.reads and self.attack.against not in self.scorers:
            raise UserError(
                f"data.attack adapts to {self.attack.against!r}, which is not among scan.scorers ({', '.join(self.scorers)})"
            )
        self.methods = {name: Composition.of(arm.train) for name, arm in self.arms.items() if arm.train is not None}
        for composed in self.methods.values():
            check_settings(config.arguments, config.adapter, composed)
        self.arguments = arguments(config.arguments, out / "arms")
        self.gate = parse_gate(config.gate)
        if not self.arms:
            raise UserError("arms is empty; name at least one arm")
        for name, arm in self.arms.items():
            if not name.replace("_", "").replace("-", "").isalnum():
                raise UserError(f"arms.{name}: an arm's name is made of letters, digits, - and _")
            if arm.cut and (odd := [told for told in arm.cut.scorers if told not in self.scorers]):
                raise UserError(
                    f"arms.{name}.cut.scorer: {odd[0]!r} is not among scan.scorers ({', '.join(self.scorers)})"
                )
            if arm.train is None and arm.cut:
                raise UserError(f"arms.{name}: a cut needs an arm that is trained: train: [sft]")
            for stream in self.methods[name].needs("streams") if name in self.methods else ():
                if not isinstance(getattr(config.data, stream, None), Source):
                    raise UserError(f"arms.{name}: its methods need the stream {stream!r}: set data.{stream}")
        for name, methods in self.methods.items():
            for column in methods.needs("columns"):
                told = self.arms[name].columns.get(column)
                if told is None:
                    raise UserError(
                        f"arms.{name}: its methods read the column {column!r}: set arms.{name}.columns.{column} to a scorer or a file"
                    )
                if told not in self.scorers and not Path(told).is_file():
                    raise UserError(
                        f"arms.{name}.columns.{column}: {told!r} is neither among scan.scorers ({', '.join(self.scorers)}) nor a file"
                    )
            methods.format_messages(())  # a secret that is missing is said before any time is spent
        if self.methods and not config.adapter:
            raise UserError(
                "train.adapter is missing: name at least r and target_modules (full fine-tuning: not in this version)"
            )

    def check_files(self) -> None:
        """What a dry run sees beyond the recipe: files that are not there, columns of another length than the user's own rows."""
        sets = [*vars(self.config.data).values(), *(getattr(made, "data", None) for made in self.suites)]
        for path in [told.path for told in sets if isinstance(told, Source)] + [
            made.prompts for made in self.suites if hasattr(made, "prompts")
        ]:
            check_file(path)
        pairs = [
            (self.arms[name].columns[column], column)
            for name, made in self.methods.items()
            for column in made.needs("columns")
        ]
        pairs = [(told, column) for told, column in pairs if told not in self.scorers]
        if not pairs or self._mixed:
            return  # rows that are mixed have their ids when they are written
        examples = self._usable(self.config.data.task).examples
        rows, _ = encode_all(self._tokenizer(), examples, self.config.data.max_length)
        for told, column in pairs:
            found = from_file(told, column, examples)
            check_columns([dataclasses.replace(row, columns={column: found[row.id]}) for row in rows], (column,))

    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(
            resolve(self.config.model.name), trust_remote_code=self.config.model.trust_remote_code
        )

    @staticmethod
    def _name(spec: Any) -> str:
        return spec if isinstance(spec, str) else next(iter(spec))

    # --- data ---------------------------------------------------------------------------------------------------------------

    def data(self) -> None:
        """Write the training rows: the task as it came, or the task and the poison mixed in one form."""
        config, folder = self.config.data, self.out / "data"
        target = self.train_file
        pool = getattr(self.attack, "pool", None)
        sets = [s for s in (config.task, config.poison, pool and Source(path=pool)) if s]
        facts = [
            plain(config),
            self.config.seed,
            [self._origin(s) for s in sets],
            source_digests(attack, [config.attack]),
        ]
        if self.attack.entry.reads:
            facts += [
                plain(self.config.model),
                plain(self.config.scan),
                source_digests(scorer, self.config.scan.scorers),
            ]
        with self.folder.step("data", facts, [target, folder / "rows.json", folder / "problems.json"]) as needed:
            if not needed:
                return
            task = self._usable(config.task)
            rows = [(example, "task") for example in task.examples]
            if self._mixed:
                harmful = open_examples(config.poison) if config.poison else []
                told = self._turns(task.examples), self._turns(harmful)
                mixed = poison(self.attack, *told, config.poison_share, self.config.seed, self._score())
                rows += [
                    (example, "poison") for example in (read_examples(enumerate(mixed, 1)).examples if mixed else ())
                ]
                random.Random(self.config.seed).shuffle(rows)
            folder.mkdir(parents=True, exist_ok=True)
            write_table(
                target,
                [example.row if self._kept_form else {"messages": list(example.messages)} for example, _ in rows],
            )
            if not self._kept_form:  # ids are those of the rows as they now stand
                again = read_examples(target).examples
                rows = [(new, origin) for new, (_, origin) in zip(again, rows, strict=True)]
            write_json(folder / "rows.json", [{"id": e.id, "line": e.line, "origin": origin} for e, origin in rows])
            write_json(folder / "problems.json", [bad._asdict() for bad in task.bad])

    @staticmethod
    def _turns(examples: Iterable[Example]) -> list[Row]:
        return [{"messages": list(example.messages)} for example in examples]

    def _score(self) -> Score | None:
        """The score that an adaptive attacker knows: the run's own scorer on the start model."""
        if not self.attack.entry.reads:
            return None
        name, loaded = self.attack.against, self._load()
        anchors = self._anchors(loaded.tokenizer)

        def score(rows: Sequence[Row]) -> list[float]:
            examples = read_examples(enumerate(rows, 1)).examples
            coded, bad = encode_all(loaded.tokenizer, examples, self.config.data.max_length)
            if bad:
                raise UserError(f"data.attack: one of its rows cannot be scored: {bad[0].reason}")
            size = self.config.scan.batch_size
            return scan(*loaded, coded, {name: self.scorers[name]}, anchors, examples=examples, batch_size=size).rows[
                name
            ]

        return score

    def _asks(self, system: str | None) -> Callable[[str], Any] | None:
        """How the attacker asks at test time; None where it is as anyone does."""
        if not any(self.attack.entry.implements(name) for name in ("ask", "system", "prefill")):
            return None
        made = (
            self.attack.fit(self._turns(self._usable(self.config.data.task).examples))
            if self.attack.entry.implements("fit")
            else self.attack
        )
        return functools.partial(conversation, made, system=system)

    @property
    def _mixed(self) -> bool:
        return self.config.data.poison is not None or self.config.data.poison_share > 0

    @property
    def _kept_form(self) -> bool:
        """Whether the training file is the user's own, in its own form."""
        path = Path(self.config.data.task.path)
        return not self._mixed and path.suffix in (".jsonl", ".json", ".csv", ".parquet")

    @property
    def train_file(self) -> Path:
        return (
            self.out
            / "data"
            / ("train" + Path(self.config.data.task.path).suffix if self._kept_form else "train.jsonl")
        )

    def _origin(self, source: Source) -> Any:
        """What a set was read from, by content."""
        return digest([row for _, row in open_table(source.path)])

    def _usable(self, source: Source) -> Rows:
        rows = open_rows(source)
        if rows.bad and self.config.data.on_bad == "stop":
            listed = "; ".join(f"line {bad.line}: {bad.reason}" for bad in rows.bad[:3])
            raise UserError(
                f"{source.path}: {len(rows.bad)} rows cannot be used ({listed}); mend them, or set data.on_bad: skip"
            )
        if not rows.examples:
            raise UserError(f"{source.path}: no row can be used")
        return rows

    def _rows(self, path: Path, tokenizer: Any, *, short: bool = False) -> tuple[list[Example], list[TokenizedRow]]:
        """Training rows and their tokens; over-long rows stop the run, or are listed and left out. ``short``: they are listed and cut to what fits."""
        source, limit = self.config.data.task if self._kept_form else Source(path=""), self.config.data.max_length
        examples = read_examples(path, source.prompt, source.answer).examples
        rows, bad = encode_all(tokenizer, examples, sys.maxsize if short else limit)
        if bad:
            self._skip(bad, len(examples))
        kept = {row.id for row in rows}
        examples = [example for example in examples if example.id in kept]
        long = {example.line: len(row) for example, row in zip(examples, rows, strict=True) if len(row) > limit}
        self._list(
            [
                BadRow(line, f"cut short for the scan: {size} tokens, max_length is {limit}")
                for line, size in long.items()
            ]
        )
        return examples, [shorten(row, limit) for row in rows]

    def _skip(self, bad: Sequence[BadRow], count: int) -> None:
        if self.config.data.on_bad == "stop":
            raise UserError(
                f"{len(bad)} rows cannot be used (line {bad[0].line}: {bad[0].reason}); mend them, or set data.on_bad: skip"
            )
        if len(bad) == count:
            raise UserError(f"no row can be used (line {bad[0].line}: {bad[0].reason})")
        self._list(bad)

    def _list(self, bad: Sequence[BadRow]) -> None:
        """Add rows to data/problems.json."""
        path = self.out / "data" / "problems.json"
        if bad and processes().is_main_process:
            known = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, known + [row for b in bad if (row := b._asdict()) not in known])

    def _encoded(
        self, source: Source, tokenizer: Any, dress: Any = tuple, *, whole: bool = False
    ) -> list[TokenizedRow]:
        """The rows of a set; ``whole``: however long they are."""
        examples = [dataclasses.replace(example, messages=dress(example.messages)) for example in open_examples(source)]
        rows, bad = encode_all(tokenizer, examples, sys.maxsize if whole else self.config.data.max_length)
        if bad:
            raise UserError(f"{source.path}: line {bad[0].line}: {bad[0].reason}")
        return rows

    def _known(self) -> dict[str, Source]:
        """The anchor sets of a scan, and what single scorers read where the run has it."""
        asked = (
            "probe",
            "harmful",
            "safe",
            *(stream for made in self.scorers.values() for stream in made.entry.streams),
        )
        return {name: source for name in asked if (source := getattr(self.config.data, name))}

    def _anchors(self, tokenizer: Any) -> dict[str, list[TokenizedRow]]:
        return {name: self._encoded(source, tokenizer, whole=True) for name, source in self._known().items()}

    # --- stages -------------------------------------------------------------------------------------------------------------

    def _load(self, adapter: Path | None = None) -> ModelAndTokenizer:
        model = self.config.model
        return load(model.name, dtype=model.dtype, adapter=adapter, trust_remote_code=model.trust_remote_code)

    def scan(self) -> None:
        """Score every row by every scorer of the run. Processes share the rows, and the first one writes.

        A row longer than max_length is scored on what fits, unless an arm is tuned on it and ``on_bad`` is "stop".
        """
        config, ranks = self.config, processes()
        target = self.out / "scan" / "scores.parquet"
        facts = [
            plain(config.scan),
            plain(config.model),
            source_digests(scorer, config.scan.scorers),
            file_digest(self.train_file),
        ]
        facts += [[plain(source), self._origin(source)] for source in self._known().values()] + [config.data.max_length]
        files = [target, target.with_name(ANCHORS), target.with_name(HEAT)]
        with self.folder.step("scan", facts, files, shared=True) as needed:
            if not needed:
                return
            loaded = self._load()
            examples, rows = self._rows(
                self.train_file, loaded.tokenizer, short=not self.methods or config.data.on_bad == "skip"
            )
            files[0].parent.mkdir(parents=True, exist_ok=True)
            journal = ScanJournal(target.with_name("journal.jsonl"), digest(facts), ranks)
            with steps("scan", len(rows)) as advance:
                scanned = scan(
                    *loaded,
                    rows,
                    self.scorers,
                    self._anchors(loaded.tokenizer),
                    examples=examples,
                    batch_size=config.scan.batch_size,
                    journal=journal,
                    progress=lambda done, _: advance(min(done * ranks.num_processes, len(rows)), ""),
                )
            if ranks.is_main_process:
                write_scores(target, examples, scanned)
                write_json(target.with_name(HEAT), heat(loaded.tokenizer, examples, rows, scanned, self.scorers))
                journal.clear()

    def cut(self, name: str) -> Path:
        """The rows that an arm trains on."""
        arm = self.arms[name]
        if arm.cut is None:
            return self.train_file
        folder = self.out / "cut" / name
        target = folder / self.train_file.name
        scores = self.out / "scan" / "scores.parquet"
        facts = [plain(arm.cut), file_digest(scores), file_digest(self.train_file)]
        with self.folder.step(f"cut.{name}", facts, [target, folder / "cut.json"]) as needed:
            if needed:
                source = self.config.data.task if self._kept_form else Source(path="")
                examples = read_examples(self.train_file, source.prompt, source.answer).examples
                write_cut(
                    folder, self.train_file, cut_rows(examples, read_scores(scores), **plain(arm.cut)), arm.cut.scorer
                )
        return target

    def train(self, name: str) -> Path | None:
        """Tune one arm; its adapter's folder, or None for the arm that is left as it was. Processes share the rows of a step."""
        arm = self.arms[name]
        if arm.train is None:
            return None
        rows_file = self.cut(name)
        target = self.out / "arms" / name / "adapter"
        streams = {stream: getattr(self.config.data, stream) for stream in self.methods[name].needs("streams")}
        facts = [
            plain(arm.train),
            plain(self.config.train),
            plain(self.config.model),
            self.config.seed,
            file_digest(rows_file),
        ]
        facts += [
            self.config.data.max_length,
            source_digests(method, arm.train),
            [[plain(s), self._origin(s)] for s in streams.values()],
        ]
        facts += [plain(arm.columns), [file_digest(path) for path in self._told(name)]]
        facts += [self.methods[name].format_messages(())]  # only their digest is written
        with self.folder.step(f"train.{name}", facts, [target, target.parent / "train.json"], shared=True) as needed:
            if needed:
                key = digest([facts, processes().num_processes])[:12]  # a step of more processes has more rows
                self._train(name, rows_file, streams, target, target.parent / "checkpoints" / key)
        return target

    def _train(
        self, name: str, rows_file: Path, streams: Mapping[str, Source], target: Path, checkpoints: Path
    ) -> None:
        """Tune from the last of ``checkpoints``, whose folder is named by all that goes into the tuning: what another recipe left is removed."""
        if processes().is_main_process:
            for old in set(checkpoints.parent.glob("*/")) - {checkpoints}:
                shutil.rmtree(old)
        loaded = self._load()
        examples, rows = self._rows(rows_file, loaded.tokenizer)
        columns = {column: self._column(name, column, examples) for column in self.methods[name].needs("columns")}
        rows = [
            dataclasses.replace(row, columns={column: told[row.id] for column, told in columns.items()}) for row in rows
        ]
        model = fresh_adapter(loaded.model, self.config.adapter, self.config.seed)
        args = arguments(self.config.arguments, checkpoints)
        dress = {"align": self.methods[name].format_messages}
        encoded = {
            "task": rows,
            **{s: self._encoded(source, loaded.tokenizer, dress.get(s, tuple)) for s, source in streams.items()},
        }
        made = streams_of(encoded, args, loaded.tokenizer.pad_token_id, self.config.align_share)
        total = args.max_steps if args.max_steps > 0 else int(made["task"].steps * args.num_train_epochs)
        with steps(f"{name}: train", total) as advance:
            host = OracleTrainer(
                model,
                args,
                self.methods[name],
                made,
                advance=lambda loss: advance(host.state.global_step, f"loss {loss:.3f}"),
            )
            saved = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
            outcome = host.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
        weights = gather_full(trainable(model))  # every process gathers
        if not processes().is_main_process:
            return
        part = target.with_name("adapter.part")
        model.save_pretrained(part, state_dict=weights)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written with the report
        part.rename(target)
        facts = {"steps": outcome.global_step, "seconds": outcome.metrics["train_runtime"], "loss": host.curve}
        write_json(target.parent / "train.json", facts | {"methods": plain(self.arms[name].train), "rows": len(rows)})

    def _told(self, name: str) -> list[Path]:
        """The files that an arm's columns come from."""
        sources = {self.arms[name].columns[column] for column in self.methods[name].needs("columns")}
        return sorted(
            {self.out / "scan" / "scores.parquet" if told in self.scorers else Path(told) for told in sources}
        )

    def _column(self, name: str, column: str, examples: Sequence[Example]) -> Column:
        told = self.arms[name].columns[column]
        if told not in self.scorers:
            return from_file(told, column, examples)
        scores = read_scores(self.out / "scan" / "scores.parquet")
        return keep(scores, told, examples) if column == "keep" else star(scores, told, self.scorers[told], examples)

    def measure(self, name: str, judges: Mapping[str, Judge] | None = None) -> None:
        """Ask one arm's model every prompt of every suite."""
        adapter = self.train(name)
        folder = self.out / "arms" / name
        files = [folder / "measurements.jsonl", folder / "answers.jsonl"]
        weights = file_digest(adapter / "adapter_model.safetensors") if adapter else ""
        sources = source_digests(suite, self.config.measure.suites)
        system = self._served(name)
        facts = [plain(self.config.measure), plain(self.config.model), weights, sources, system]
        asks = self._asks(system)
        if asks:
            facts += [plain(self.config.data.attack), asks("")]
        with self.folder.step(f"measure.{name}", facts, files) as needed:
            if not needed:
                return
            folder.mkdir(parents=True, exist_ok=True)
            subject = Subject(
                self._load(adapter), name, judges or self.judges(), self.config.measure.labels, system, asks
            )
            subject.kept = Answers(self.out / "answers.db")
            if any("start" in made.entry.roles for made in self.suites):
                subject.start = self._load() if adapter else subject.loaded
            found = [dataclasses.asdict(measured) for made in self.suites for measured in made.measure(subject)]
            write_table(files[1], subject.answers)
            write_table(files[0], found)

    def scanned(self, name: str) -> bool:
        """Whether an arm rests on scores."""
        return bool(self.arms[name].cut) or any(told in self.scorers for told in self.arms[name].columns.values())

    def _served(self, name: str) -> str | None:
        """The system prompt that an arm's model is served with."""
        system = self.config.measure.system
        first: tuple[Mapping[str, Any], ...] = ({"role": "system", "content": system},) if system else ()
        dressed = self.methods[name].format_messages(first) if name in self.methods else first
        return dressed[0]["content"] if dressed else None

    def judges(self) -> Mapping[str, Judge]:
        """The judges that the suites ask for; the start model is the one that classifies."""
        if not hasattr(self, "_judges"):
            names = list(dict.fromkeys(name for made in self.suites for name in getattr(made, "judges", ())))
            self._judges = make_judges(
                names, self._load() if set(names) & set(OF_ALIGNED) else None, self.config.measure.rubric
            )
        return self._judges

    def prepare(self) -> None:
        """The run folder with its manifest, and the training rows."""
        facts = {"seed": self.config.seed, "model": self.config.model.name}
        self.folder.open(self.config, facts)
        self.data()
        tokenizer = self._tokenizer()
        self.folder.open(
            self.config, facts | {"template": template_digest(tokenizer), "data": file_digest(self.train_file)}
        )

    def run(self, *, show_text: bool = False) -> Report | None:
        """All steps that are not done yet, then the report; None where another process writes it."""
        self.prepare()
        if any(self.scanned(name) for name in self.arms):
            self._say("scan")
            self.scan()
        for name in self.arms:
            self._say(f"arm {name}")
            self.measure(name)
        return write(self.out, show_text=show_text, gate=self.gate) if processes().is_main_process else None

    def _say(self, what: str) -> None:
        console.print(f"[bold]{what}[/bold]")
