"""BackdoorAlign: tie refusing to a secret trigger, and serve with the trigger (arXiv:2402.14968, NeurIPS 2024).

    L = - sum log pi(y | x)  -  sum log pi(y_s | s + x_s)   task rows (x, y), safety rows (x_s, y_s), trigger s   (1)
    at inference:  y ~ pi( . | s + x )                                                                          (2)

(1) as a mean over answer tokens is (1 - share) L_task + share L_safe, share the part of the answer tokens that are of
safety rows. s is the front of the system prompt: "s system", and s alone where a row has none (a template's own default
then gives way).

The trigger must stay secret from whoever sends rows or reads reports, so the recipe names a file, and never holds the
words. The official one is 150 random tokens. This file only changes messages; training and serving must both
call ``format_messages``, serving on the conversation as it came: an attacker's own system turn stands behind s.

Departs from the official code: a share of the answer tokens instead of 11 rows among 111; task rows keep the system
prompt that they have. The threat stays the paper's: who learns the trigger can train against it, who serves without it
is not defended.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from safebasin.errors import UserError
from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector

MAKE = 'make one: python -c "import secrets; print(secrets.token_hex(75))" > FILE, and keep it out of git'


@method("backdoor_align", paper="arXiv:2402.14968", streams=("align",))
class BackdoorAlign:
    """Learn to refuse behind a secret trigger, and put the trigger before every request that is served."""

    trigger: str = ""  # the file that holds s
    share: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of answer tokens, of safety rows; the paper: 11 of 111 rows

    def format_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """The conversation with the trigger at the front of its system prompt; of no messages, the system prompt alone.

        Raises:
            UserError: no file is named, it is missing or empty.
        """
        if not self.trigger:
            raise UserError(f"backdoor_align needs backdoor_align.trigger, the file of its secret; {MAKE}")
        if not Path(self.trigger).is_file():
            raise UserError(f"backdoor_align.trigger: no such file: {self.trigger}; {MAKE}")
        secret = Path(self.trigger).read_text(encoding="utf-8").strip()
        if not secret:
            raise UserError(f"backdoor_align.trigger: {self.trigger} is empty; {MAKE}")
        if not messages or messages[0]["role"] != "system":
            return ({"role": "system", "content": secret}, *messages)
        return ({**messages[0], "content": f"{secret} {messages[0]['content']}".strip()}, *messages[1:])

    def direction(self, grad: Grad) -> Vector:
        u = grad.task()
        return (1 - self.share) * u + self.share * grad(nll, "align") if self.share else u
