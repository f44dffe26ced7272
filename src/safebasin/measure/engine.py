"""Where answers are generated: here (``hf``), or by a server behind an OpenAI-compatible endpoint (vLLM, SGLang, ...).

A server is another implementation of the same model, in other kernels and perhaps with other settings (vLLM obeys the
repetition penalty of generation_config unless it is told not to). So its answers count only where they are ours: the
first ``check`` prompts of every suite are answered here too, and

    share of equal texts >= ``equal``,  and every judge gives the same verdict to each of them                  (1)

or the run stops. What was compared is written to arms/ARM/engine.json.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from safebasin.errors import DefenceError, UserError
from safebasin.measure.endpoint import Endpoint, RequestRefused, Settings
from safebasin.measure.generate import Answer
from safebasin.measure.judging import Judge, judge_answers
from safebasin.measure.thoughts import split
from safebasin.registry import split_spec, validated

Turns = Sequence[Mapping[str, Any]]


class Compared(NamedTuple):
    """What eq. 1 was computed from, of one suite of an arm."""

    suite: str
    prompts: int
    equal: int  # texts
    agree: int  # prompts on which all judges give the same verdict


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Served(Endpoint):
    """A server of the arms' models. An arm that it does not serve is answered here."""

    models: Annotated[dict[str, str], Field(min_length=1)]  # arm -> the name of its model (or adapter) at the endpoint
    settings: Settings = Field(default_factory=dict)  # of every request, beside temperature 0 and max_tokens
    check: PositiveInt = 32  # prompts of every suite that are answered here too
    equal: Annotated[float, Field(ge=0, le=1)] = 0.99  # share of these whose texts must be equal
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    concurrent: Annotated[PositiveInt, Field(le=256)] = 16

    def answer(self, arm: str, conversations: Sequence[Turns], max_new_tokens: int) -> list[Answer]:
        """Greedy answers of the server.

        Raises:
            UserError: it does not answer, or refuses a prompt.
        """

        def ask(turns: Turns) -> Answer:
            body = {"model": self.models[arm], "messages": list(turns), "temperature": 0, "max_tokens": max_new_tokens}
            text, reason = self.choice(json.dumps(body | self.settings).encode())
            thought, rest = split(text, begun=False)
            return Answer(rest if thought else text, 0, reason == "stop", thought)

        self.check_key("measure.engine.endpoint")
        try:
            return self.each(ask, conversations)
        except (ConnectionError, RequestRefused) as error:
            raise UserError(
                f"measure.engine.endpoint: {error}; start the server with the model {self.models[arm]!r}, a context "
                "that holds every prompt, and no filter or parser of its answers, and run again"
            ) from None


def compare(
    server: Served,
    suite: str,
    own: Sequence[Answer],
    served: Sequence[Answer],
    judges: Mapping[str, Judge],
    prompts: Sequence[str],
) -> Compared:
    """Eq. 1 of the same prompts.

    Raises:
        DefenceError: it does not hold.
    """

    def verdicts(answers: Sequence[Answer]) -> list[tuple[str, ...]]:
        """Of every answer those of all judges."""
        texts, finished = [answer.text for answer in answers], [answer.finished for answer in answers]
        columns = [judge_answers(judge, texts, (), prompts, finished) for judge in judges.values()]
        return [tuple(column[i].verdict for column in columns) for i in range(len(answers))]

    equal = sum(a.text == b.text for a, b in zip(own, served, strict=True))
    agree = sum(a == b for a, b in zip(verdicts(own), verdicts(served), strict=True))
    if equal < server.equal * len(own) or agree < len(own):
        raise DefenceError(
            f"measure.engine.endpoint: of {len(own)} prompts of {suite} that were answered here too, {equal} texts are "
            f"equal and the judges agree on {agree}; its numbers would not be those of this model: check the adapter, "
            "the chat template and generation_config (vllm serve --generation-config vllm), or measure here"
        )
    return Compared(suite, len(own), equal, agree)


def make_served(spec: str | Mapping[str, Any]) -> Served | None:
    """``hf`` (None) or ``{endpoint: {url: ..., models: {arm: name}}}``.

    Raises:
        UserError: another engine, an unknown field, a value out of bounds.
    """
    name, fields = split_spec(spec, "measure.engine")
    if name == "hf" and not fields:
        return None
    if name != "endpoint":
        what = repr(name) + " with fields" * (name == "hf")
        raise UserError(f"measure.engine: there is no {what}; there are: hf, and endpoint with its fields")
    return validated(Served, fields, "measure.engine.endpoint")
