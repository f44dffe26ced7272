"""Rows of a run as tokens on disk: tokens/KEY/NAME.arrow. The scan and every arm share them: who comes first encodes.

A row is found by the digest of its conversation. KEY is that of all else that decides its tokens: tokenizer, template,
this package and the versions it stands on. NAME is the digest of the rows of a file and that of its bytes, so that a
damaged file is removed and never read. Files are mapped into memory, which holds no token of its own.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from safebasin.data.example import Example
from safebasin.data.files import atomic_write, file_digest, make_folder
from safebasin.encode import Refused, TokenizedRow, encoded
from safebasin.pipeline.fingerprint import digest, package_digest, source_digest, versions
from safebasin.places import TEXT_KEYS

ROWS = 4096  # of a file
SCHEMA = pa.schema(
    {
        "row": pa.binary(16),  # digest of the conversation
        "ids": pa.large_list(pa.int32()),
        "answer": pa.large_list(pa.uint8()),  # 1: learned. Arrow's booleans are bits, and could not be used in place
        "note": pa.string(),
        "reason": pa.string(),  # of a row that cannot be used, which has no ids
        "tokens": pa.int64(),  # of the text of such a row, where it came to that
        "template": pa.bool_(),  # whether the template fails on it
    }
)

BAD = ["reason", "tokens", "template"]  # the fields of a ``Refused``


class TokenFiles:
    """Encoded rows by their conversations.

    Args:
        folder: of a run; what another tokenizer or another safebasin left in it is removed.
        tokenizer: a fast one, with its chat template.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, tokenizer: Any):
        self._tokenizer, key = tokenizer, _key(tokenizer)
        for old in folder.glob("*"):
            if old.name != key:
                shutil.rmtree(old, ignore_errors=True)
        self._folder = make_folder(folder / key)

    def encoded(self, examples: Sequence[Example]) -> list[TokenizedRow | Refused]:
        """``encode.encoded``: every row at its full length, or why there is none, in their order.

        Raises:
            UserError: the chat template cannot be read, or a file cannot be written.
        """
        parts = (examples[start : start + ROWS] for start in range(0, len(examples), ROWS))
        return [row for part in parts for row in self._part(part)]

    def _part(self, examples: Sequence[Example]) -> list[TokenizedRow | Refused]:
        rows = [row_digest(example) for example in examples]
        alone = iter(encoded(self._tokenizer, [e for e, row in zip(examples, rows, strict=True) if row is None]))
        wanted = {row: example for row, example in zip(rows, examples, strict=True) if row is not None}
        file = self._open(f"{_name(wanted)}-*.arrow")
        places = {row: (file, i) for i, row in enumerate(wanted)} if file else self._index.find(list(wanted))
        missing = {row: example for row, example in wanted.items() if row not in places}
        if missing:
            file = self._write(missing)
            places |= {row: (file, i) for i, row in enumerate(missing)}
        results: list[TokenizedRow | Refused] = []
        for row, example in zip(rows, examples, strict=True):
            place = places[row] if row is not None else None
            results.append(place[0].row(place[1], example.id) if place else next(alone))
        return results

    def _open(self, pattern: str) -> "_File | None":
        """A file by its name; None: there is none, or it was damaged and is removed."""
        for path in self._folder.glob(pattern):
            if file_digest(path) == path.stem.partition("-")[2]:
                return _File(path)
            path.unlink(missing_ok=True)
        return None

    @functools.cached_property
    def _index(self) -> "_Index":
        """Of the rows in the files that are there when the first row is missing."""
        return _Index([file for path in sorted(self._folder.glob("*.arrow")) if (file := self._open(path.name))])

    def _write(self, examples: Mapping[bytes, Example]) -> "_File":
        """Encode rows into a new file."""
        coded = encoded(self._tokenizer, list(examples.values()))
        rows = [TokenizedRow("", (), ()) if isinstance(row, Refused) else row for row in coded]
        bad = [row if isinstance(row, Refused) else (None, None, None) for row in coded]
        columns = [
            pa.array(list(examples), SCHEMA.field("row").type),
            _lists([row.ids for row in rows]),
            _lists([row.answer.view(np.uint8) for row in rows]),
            pa.array([row.note for row in rows], pa.string()),
            *(
                pa.array(values, SCHEMA.field(name).type)
                for name, values in zip(BAD, zip(*bad, strict=True), strict=True)
            ),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        content = sink.getvalue()
        path = self._folder / f"{_name(examples)}-{hashlib.blake2b(content, digest_size=16).hexdigest()}.arrow"
        with atomic_write(path) as part:
            part.write_bytes(content)
        return _File(path)


class _File:
    """A file that is mapped into memory."""

    def __init__(self, path: Path):
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.rows = np.frombuffer(batch["row"].buffers()[1] or b"", "S16", len(batch))
        self._notes, self._bad = batch["note"], batch.select(BAD)
        self._first = batch["ids"].offsets.to_numpy()
        self._ids = batch["ids"].values.to_numpy()
        self._answer = batch["answer"].values.to_numpy().view(np.bool_)

    def row(self, i: int, name: str) -> TokenizedRow | Refused:
        """A row, under the id that it has in its set."""
        reason, tokens, template = (column[i].as_py() for column in self._bad.columns)
        if reason is not None:
            return Refused(reason, tokens, template)
        part = slice(self._first[i], self._first[i + 1])
        return TokenizedRow(name, self._ids[part], self._answer[part], note=self._notes[i].as_py())


class _Index:
    """Where rows are, among those of several files: 24 bytes a row."""

    def __init__(self, files: Sequence[_File]):
        self._files = files
        self._first = np.cumsum([0, *(len(file.rows) for file in files)])
        self._rows = np.concatenate([np.empty(0, "S16"), *(file.rows for file in files)])
        self._order = np.argsort(self._rows)

    def find(self, rows: Sequence[bytes]) -> dict[bytes, tuple[_File, int]]:
        """The file and the place in it of every row that is there."""
        wanted = np.array(rows, "S16")
        at = np.searchsorted(self._rows, wanted, sorter=self._order)
        there = np.flatnonzero(at < len(self._rows))
        places = self._order[at[there]]
        same = self._rows[places] == wanted[there]
        files = np.searchsorted(self._first, places, "right") - 1
        inside = places - self._first[files]
        return {rows[there[k]]: (self._files[files[k]], int(inside[k])) for k in np.flatnonzero(same)}


def _lists(arrays: Sequence[Any]) -> pa.LargeListArray:
    """Arrays as one column."""
    first = np.cumsum([0, *(len(array) for array in arrays)])
    return pa.LargeListArray.from_arrays(pa.array(first, pa.int64()), pa.array(np.concatenate(arrays)))


def row_digest(example: Example) -> bytes | None:
    """16 bytes that stand for a conversation and its tools; None where they hold a value that JSON does not have."""
    given = [list(example.messages), list(example.tools)]
    try:
        text = json.dumps(given)
    except TypeError:
        return None
    plain = not example.tools and all(turn.keys() <= TEXT_KEYS for turn in example.messages)
    if not plain and json.loads(text) != given:  # a key that is no text
        return None
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _name(rows: Iterable[bytes]) -> str:
    return digest([row.hex() for row in rows])


def _key(tokenizer: Any) -> str:
    """All that decides the tokens of a row, but the row."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # as the last call of the tokenizer left it
    backend.no_padding()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    how = [str(tokenizer.chat_template), special, tokenizer.split_special_tokens, source_digest(type(tokenizer))]
    return digest([hashlib.blake2b(backend.to_str().encode()).hexdigest(), how, package_digest(), versions()])
