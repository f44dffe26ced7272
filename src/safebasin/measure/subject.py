"""What is measured: a model under an arm's name, how its prompts are written, its judges, and the answers it gave."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safebasin.console import line, progress
from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.source import Prompt
from safebasin.errors import UserError
from safebasin.measure.answers import AnswerCache
from safebasin.measure.generate import Answer, generate
from safebasin.measure.judging import Judge, Verdict, judge_answers
from safebasin.models.adapter import merged
from safebasin.models.load import ModelAndTokenizer
from safebasin.stats import kappa, wilson

PromptFormat = Callable[[str], Sequence[Mapping[str, Any]]]  # a prompt -> the turns that are sent
SCORED = {Verdict.REFUSED, Verdict.COMPLIED}


@dataclasses.dataclass
class Subject:
    """A model to measure. ``answers`` collects one record a prompt, the lines of ``answers.jsonl``."""

    loaded: ModelAndTokenizer
    arm: str
    judges: Mapping[str, Judge]
    labels: Sequence[str] = ()  # answers that are only one of these are off task
    system: str | None = None
    attack_format: PromptFormat | None = None  # how this run's attacker writes a prompt, where not as anyone does
    prompt_format: PromptFormat | None = None  # how prompts are written now; None: the system prompt and the prompt
    start: ModelAndTokenizer | None = None  # the model that tuning started from; None: not at hand
    cache: AnswerCache | None = None
    answers: list[AnswerRecord] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def merged(self) -> ModelAndTokenizer:
        """The model for suites that move or compare its weights: an adapter is folded into them, in float32."""
        return self.loaded._replace(model=merged(self.loaded.model))

    def turns(self, prompts: Sequence[str]) -> list[Sequence[Mapping[str, Any]]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [
            self.prompt_format(prompt) if self.prompt_format else [*first, {"role": "user", "content": prompt}]
            for prompt in prompts
        ]

    def ask(self, prompts: Sequence[str], max_new_tokens: int, title: str) -> list[Answer]:
        turns = self.turns(prompts)
        with progress(f"{self.arm}: {title}", len(turns)) as advance:
            return generate(*self.loaded, turns, max_new_tokens=max_new_tokens, progress=advance, cache=self.cache)

    def judge(self, suite: str, name: str) -> Judge:
        """UserError: this run has no judge of that name."""
        if name not in self.judges:
            raise UserError(f"{suite}: no judge {name!r}; this run has: {', '.join(self.judges)}")
        return self.judges[name]

    def judged(
        self,
        suite: str,
        what: str,
        hit: Verdict,
        prompts: Sequence[Prompt],
        judges: Sequence[str],
        max_new_tokens: int,
    ) -> Iterator[Measurement]:
        """Ask, judge, record, count.

        Yields the share of ``hit`` among refusals and compliances by judge, then by category for the first judge, then
        the agreement of the first judge with each other one.
        """
        chosen = {name: self.judge(suite, name) for name in judges}
        prompts = distinct(suite, prompts)
        texts = [prompt.text for prompt in prompts]
        answers = self.ask(texts, max_new_tokens, suite)
        judgements = {
            name: judge_answers(judge, [answer.text for answer in answers], self.labels, texts)
            for name, judge in chosen.items()
        }
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            scores = {name: judgements[name][i].score for name in judges}
            record = AnswerRecord(
                suite,
                prompt.id,
                prompt.category,
                prompt.text,
                answer.text,
                verdicts={name: str(judgements[name][i].verdict) for name in judges},
                scores={name: round(score, 4) for name, score in scores.items() if score is not None},
                finished=answer.finished,
            )
            self.answers.append(record)
        verdicts = {name: [judgement.verdict for judgement in judgements[name]] for name in judges}
        for name in judges:
            yield count(suite, what, hit, verdicts[name], judge=name)
        for category in sorted({prompt.category for prompt in prompts} - {""}):
            inside = [v for p, v in zip(prompts, verdicts[judges[0]], strict=True) if p.category == category]
            yield count(suite, what, hit, inside, judge=judges[0], category=category)
        for second in judges[1:]:
            yield agreement(suite, verdicts, judges[0], second)


def distinct(suite: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every request once in its category: one that counts twice makes an interval look narrower than it is."""
    first = list({(prompt.text, prompt.category): prompt for prompt in reversed(prompts)}.values())[::-1]
    if len(first) < len(prompts):
        line(f"  {suite}: {len(prompts) - len(first)} of {len(prompts)} prompts are repetitions; each counts once")
    return first


def count(
    suite: str, what: str, hit: Verdict, verdicts: Sequence[Verdict], *, judge: str, category: str = ""
) -> Measurement:
    """A share with Wilson's interval over what was scored; value None where nothing was."""
    hits = sum(verdict == hit for verdict in verdicts)
    n = sum(verdict in SCORED for verdict in verdicts)
    off = sum(verdict == Verdict.OFF_TASK for verdict in verdicts)
    low, high = wilson(hits, n) if n else (None, None)
    value = hits / n if n else None
    unscored = len(verdicts) - n - off
    return Measurement(
        suite, what, value, low, high, n, unscored, off, judge=judge, category=category, evidence="answers.jsonl"
    )


def agreement(suite: str, verdicts: Mapping[str, Sequence[Verdict]], first: str, second: str) -> Measurement:
    """Cohen's kappa of two judges over the answers that both scored."""
    pairs = list(zip(verdicts[first], verdicts[second], strict=True))
    both = [(a, b) for a, b in pairs if a in SCORED and b in SCORED]
    value = kappa(*map(list, zip(*both, strict=True))) if both else None
    unscored = len(pairs) - len(both)
    return Measurement(
        suite, "agreement", value, None, None, len(both), unscored, unit="kappa", judge=f"{first}, {second}"
    )
