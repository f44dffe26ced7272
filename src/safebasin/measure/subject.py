"""What is measured: a model under an arm's name, how its prompts are written, its judges, and the answers it gave."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safebasin.console import line, progress
from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.source import Prompt
from safebasin.errors import UserError
from safebasin.measure.answers import AnswerCache
from safebasin.measure.engine import Compared, Served, compare
from safebasin.measure.generate import Answer, generate
from safebasin.measure.judging import HITS, SCORED, DecidesEarly, Judge, Verdict, all_decided, judge_answers
from safebasin.measure.mix import Conversation, Mixing
from safebasin.measure.pool import Pool
from safebasin.models.adapter import merged
from safebasin.models.load import ModelAndTokenizer
from safebasin.stats import kappa, wilson

PromptFormat = Callable[[str], Sequence[Mapping[str, Any]]]  # a prompt -> the turns that are sent


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
    mixing: Mixing | None = None  # with the start's logits; None: the model answers alone
    answers: list[AnswerRecord] = dataclasses.field(default_factory=list)
    server: Served | None = None  # that generates the answers; None: they are generated here
    pool: Pool | None = None  # that generates the answers into the cache; None: this process does
    compared: list[Compared] = dataclasses.field(default_factory=list)  # the server's answers with ours

    @functools.cached_property
    def merged(self) -> ModelAndTokenizer:
        """The model for suites that move or compare its weights: an adapter is folded into them, in float32."""
        return self.loaded._replace(model=merged(self.loaded.model))

    def turns(self, prompts: Sequence[str | Conversation]) -> list[Conversation]:
        """What is sent: a prompt as prompts are written now, a conversation with a system prompt if it has none."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        turns: list[Conversation] = []
        for prompt in prompts:
            if not isinstance(prompt, str):
                turns.append(prompt if prompt[0]["role"] == "system" else [*first, *prompt])
            elif self.prompt_format:
                turns.append(self.prompt_format(prompt))
            else:
                turns.append([*first, {"role": "user", "content": prompt}])
        return turns

    def ask(
        self,
        prompts: Sequence[str | Conversation],
        max_new_tokens: int,
        title: str,
        judges: Mapping[str, Judge] | None = None,
    ) -> list[Answer]:
        """Answers up to the end of the turn or ``max_new_tokens``; less where all ``judges`` have decided before."""
        turns, early = self.turns(prompts), until_decided([*(judges or {}).values()])
        begun = any(each[-1]["role"] == "assistant" for each in turns)  # a server would begin a turn of its own
        if self.server and self.arm in self.server.models and not begun and not self.mixing:
            return self._served(title, turns, max_new_tokens, judges or {})
        if self.pool and self.cache and not self.mixing:
            by_all = {"max_new_tokens": max_new_tokens, **early}
            self.pool.fill(self.cache, self.loaded.tokenizer, turns, f"{self.arm}: {title}", by_all)
        with progress(f"{self.arm}: {title}", len(turns)) as advance:
            how = {"max_new_tokens": max_new_tokens, "progress": advance, "cache": self.cache, **early}
            return (
                self.mixing.answers(self.loaded, turns, title, **how)
                if self.mixing
                else generate(*self.loaded, turns, **how)
            )

    def _served(
        self, title: str, turns: Sequence[Conversation], max_new_tokens: int, judges: Mapping[str, Judge]
    ) -> list[Answer]:
        """The server's answers, of which the first ones are compared with ours before the others are asked for.

        Raises:
            UserError: it does not answer.
            DefenceError: its answers are not ours.
        """
        assert self.server
        first, rest = turns[: self.server.check], turns[self.server.check :]
        own = generate(*self.loaded, first, max_new_tokens=max_new_tokens, cache=self.cache)
        served = self.server.answer(self.arm, first, max_new_tokens)
        self.compared.append(compare(self.server, title, own, served, judges, [turn[-1]["content"] for turn in first]))
        return served + self.server.answer(self.arm, rest, max_new_tokens)

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
        the agreement of each two judges in this arm, then, where there are thoughts, their own shares by judge.
        """
        chosen = {name: self.judge(suite, name) for name in judges}
        prompts = distinct(suite, prompts)
        texts = [prompt.text for prompt in prompts]
        answers = self.ask(texts, max_new_tokens, suite, chosen)
        given, finished = [answer.text for answer in answers], [answer.finished for answer in answers]
        judgements = {name: judge_answers(judge, given, self.labels, texts, finished) for name, judge in chosen.items()}
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
                thought=answer.thought,
            )
            self.answers.append(record)
        verdicts = {name: [judgement.verdict for judgement in judgements[name]] for name in judges}
        for name in judges:
            yield count(suite, what, hit, verdicts[name], judge=name)
        for category in sorted({prompt.category for prompt in prompts} - {""}):
            inside = [v for p, v in zip(prompts, verdicts[judges[0]], strict=True) if p.category == category]
            yield count(suite, what, hit, inside, judge=judges[0], category=category)
        for first, second in itertools.combinations(judges, 2):
            yield agreement(suite, verdicts, first, second)
        thoughts = [answer.thought for answer in answers]
        if any(thoughts):  # a quantity of its own: no gate takes it for that of the answers
            for name, judge in chosen.items():
                own = [judgement.verdict for judgement in judge_answers(judge, thoughts, self.labels, texts)]
                yield count(suite, f"{what}_thought", hit, own, judge=name)


def until_decided(judges: Sequence[Judge]) -> dict[str, Any]:
    """Arguments of ``generate`` that end an answer where all judges have decided; none where one cannot tell."""
    if not judges or not all(isinstance(judge, DecidesEarly) for judge in judges):
        return {}
    return {"decided": functools.partial(all_decided, judges), "decided_by": repr(judges)}


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
    hits = sum(verdict in HITS if hit in HITS else verdict == hit for verdict in verdicts)
    n = sum(verdict in SCORED for verdict in verdicts)
    off = sum(verdict == Verdict.OFF_TASK for verdict in verdicts)
    low, high = wilson(hits, n) if n else (None, None)
    value = hits / n if n else None
    unscored = len(verdicts) - n - off
    return Measurement(
        suite, what, value, low, high, n, unscored, off, judge=judge, category=category, evidence="answers.jsonl"
    )


def agreement(suite: str, verdicts: Mapping[str, Sequence[Verdict]], first: str, second: str) -> Measurement:
    """Cohen's kappa of two judges over the answers of this arm that both scored."""
    pairs = list(zip(verdicts[first], verdicts[second], strict=True))
    both = [(a in HITS, b in HITS) for a, b in pairs if a in SCORED and b in SCORED]
    value = kappa(*map(list, zip(*both, strict=True))) if both else None
    unscored = len(pairs) - len(both)
    return Measurement(
        suite, "agreement", value, None, None, len(both), unscored, unit="kappa", judge=f"{first}, {second}"
    )
