"""What is measured: a model under an arm's name, how it is asked, who judges, and the evidence that piles up."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safebasin.console import console, steps
from safebasin.data.records import Measurement
from safebasin.data.source import Prompt
from safebasin.errors import UserError
from safebasin.measure.generate import Answer, Answers, generate
from safebasin.measure.judge import Judge, Verdict, rule
from safebasin.models.load import ModelAndTokenizer
from safebasin.stats import kappa, wilson

Asks = Callable[[str], Sequence[Mapping[str, Any]]]  # a prompt -> the turns that are sent


@dataclasses.dataclass
class Subject:
    """``answers`` collects one record a prompt (the objects of ``answers.jsonl``)."""

    loaded: ModelAndTokenizer
    arm: str
    judges: Mapping[str, Judge]
    labels: Sequence[str] = ()  # answers that are only one of these are off task
    system: str | None = None
    attacked: Asks | None = None  # how an attacker asks, where not as anyone does
    asks: Asks | None = None  # how prompts are asked now; None: as anyone does
    start: ModelAndTokenizer | None = None  # the model that tuning started from; None: not at hand
    kept: Answers | None = None  # answers on disk
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def turns(self, prompts: Sequence[str]) -> list[Sequence[Mapping[str, Any]]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [self.asks(prompt) if self.asks else [*first, {"role": "user", "content": prompt}] for prompt in prompts]

    def ask(self, prompts: Sequence[str], max_new_tokens: int, title: str) -> list[Answer]:
        turns = self.turns(prompts)
        with steps(f"{self.arm}: {title}", len(turns)) as advance:
            return generate(*self.loaded, turns, max_new_tokens=max_new_tokens, progress=advance, kept=self.kept)

    def one_judge(self, suite: str, names: Sequence[str]) -> Judge:
        if len(names) != 1 or names[0] not in self.judges:
            raise UserError(f"{suite}: name one judge of {', '.join(self.judges)}; found {', '.join(names) or 'none'}")
        return self.judges[names[0]]

    def judged(
        self,
        suite: str,
        quantity: str,
        hit: Verdict,
        prompts: Sequence[Prompt],
        judges: Sequence[str],
        max_new_tokens: int,
    ) -> Iterator[Measurement]:
        """Ask, judge, record, count: the share of ``hit`` among refusals and compliances, by judge, and by category for the first."""
        if not judges:
            raise UserError(f"{suite}: name at least one judge, of: {', '.join(self.judges)}")
        missing = [name for name in judges if name not in self.judges]
        if missing:
            raise UserError(f"{suite}: no judge {missing[0]!r}; this run has: {', '.join(self.judges)}")
        if hit is Verdict.REFUSED and "guard" in judges:
            raise UserError(
                f"{suite}: the judge 'guard' finds any answer to a harmless request safe; use another judge here"
            )
        prompts = distinct(suite, prompts)
        told = self.ask([prompt.text for prompt in prompts], max_new_tokens, suite)
        texts, asked = [answer.text for answer in told], [prompt.text for prompt in prompts]
        rulings = {name: rule(self.judges[name], texts, self.labels, asked) for name in judges}
        for i, (prompt, answer) in enumerate(zip(prompts, told, strict=True)):
            verdicts = {name: str(rulings[name][i].verdict) for name in judges}
            scores = {name: round(score, 4) for name in judges if (score := rulings[name][i].score) is not None}
            self.answers.append(
                {
                    "suite": suite,
                    "id": prompt.id,
                    "category": prompt.category,
                    "prompt": prompt.text,
                    "answer": answer.text,
                }
                | {
                    "expected": None,
                    "verdicts": verdicts,
                    "scores": scores,
                    "correct": None,
                    "finished": answer.finished,
                }
            )
        for name in judges:
            yield count(suite, quantity, hit, [ruling.verdict for ruling in rulings[name]], judge=name)
        for category in sorted({prompt.category for prompt in prompts} - {""}):
            inside = [r.verdict for p, r in zip(prompts, rulings[judges[0]], strict=True) if p.category == category]
            yield count(suite, quantity, hit, inside, judge=judges[0], category=category)
        for second in judges[1:]:
            pairs = [(a.verdict, b.verdict) for a, b in zip(rulings[judges[0]], rulings[second], strict=True)]
            both = [(a, b) for a, b in pairs if {a, b} <= {Verdict.REFUSED, Verdict.COMPLIED}]
            value = kappa(*map(list, zip(*both, strict=True))) if both else None
            left = len(pairs) - len(both)
            yield Measurement(
                suite, "agreement", value, None, None, len(both), left, unit="kappa", judge=f"{judges[0]}, {second}"
            )


def distinct(suite: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every request once in its category: one that counts twice makes an interval look narrower than it is."""
    kept = list({(prompt.text, prompt.category): prompt for prompt in reversed(prompts)}.values())[::-1]
    if len(kept) < len(prompts):
        console.print(
            f"  {suite}: {len(prompts) - len(kept)} of {len(prompts)} prompts stand in the set before; each counts once",
            markup=False,
        )
    return kept


def count(
    suite: str, quantity: str, hit: Verdict, verdicts: Sequence[Verdict], *, judge: str, category: str = ""
) -> Measurement:
    """A share with Wilson's interval over what was scored; value None where nothing was."""
    hits = sum(verdict == hit for verdict in verdicts)
    n = sum(verdict in (Verdict.REFUSED, Verdict.COMPLIED) for verdict in verdicts)
    off = sum(verdict == Verdict.OFF_TASK for verdict in verdicts)
    low, high = wilson(hits, n) if n else (None, None)
    value = hits / n if n else None
    unscored = len(verdicts) - n - off
    return Measurement(
        suite, quantity, value, low, high, n, unscored, off, judge=judge, category=category, evidence="answers.jsonl"
    )
