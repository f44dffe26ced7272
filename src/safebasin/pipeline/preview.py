"""What the model will see of every row, and which of it is learned: what ``safebasin preview`` shows."""

import dataclasses
import itertools
from typing import Any

from safebasin.data.example import Rows
from safebasin.encode import encoded, fit


@dataclasses.dataclass(frozen=True)
class Preview:
    """A row as the trainer has it. Texts are as hostile as the row.

    Args:
        line: of the row in its file.
        text: the whole row, decoded from its tokens.
        trained: the tokens that are learned, decoded.
        parts: (text, learned) pairs, run by run; a decoder may space them otherwise than ``text``.
        bos: how many of its tokens begin a sequence; a template and a tokenizer that both add one make two.
        last: the last token that is learned, decoded: the end of the turn, where all is well.
        bad: why the row cannot be used; then all else is empty.
        note: how its answers were found, where not all of them could be.
    """

    line: int
    text: str = ""
    trained: str = ""
    parts: tuple[tuple[str, bool], ...] = ()
    bos: int = 0
    last: str = ""
    bad: str = ""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        if self.bad:
            return {"line": self.line, "bad": self.bad}
        note = {"note": self.note} if self.note else {}
        return {
            "line": self.line,
            "text": self.text,
            "trained": self.trained,
            "bos": self.bos,
            "last": self.last,
        } | note


def preview_rows(tokenizer: Any, rows: Rows, max_length: int = 1024) -> list[Preview]:
    """The rows of a set, in the order of their lines, as a tokenizer's chat template renders them."""
    shown = [Preview(bad.line, bad=bad.reason) for bad in rows.bad]
    for example, coded in zip(rows.examples, encoded(tokenizer, rows.examples), strict=True):
        good, bad = fit([coded], [example], max_length)
        if bad:
            shown.append(Preview(example.line, bad=bad[0].reason))
            continue
        [row] = good
        tokens, learned_ids = row.ids.tolist(), row.ids[row.answer].tolist()
        runs = itertools.groupby(zip(tokens, row.answer.tolist(), strict=True), key=lambda pair: pair[1])
        parts = tuple((tokenizer.decode([token for token, _ in run]), learned) for learned, run in runs)
        text, trained, last = (tokenizer.decode(ids) for ids in (tokens, learned_ids, learned_ids[-1:]))
        bos = tokens.count(tokenizer.bos_token_id)
        shown.append(Preview(example.line, text, trained, parts, bos, last, note=row.note))
    return sorted(shown, key=lambda row: row.line)
