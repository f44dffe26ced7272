"""Generated answers on disk, by a digest of all that decides them.

These are the weights as they are now, the configuration, the settings, and the prompt's tokens (and so its template). A
hook on the model is not seen. Neither prompts nor answers stand in the file as text.
"""

import contextlib
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safebasin.data.files import cause, shown
from safebasin.errors import UserError
from safebasin.models.adapter import adapter_settings
from safebasin.models.quantized import dense_weight, quantized_layers

Tokens = tuple[int, ...]


class AnswerCache:
    """One SQLite file; ``hits`` and ``misses`` count prompts whose answers were read from it and were generated.

    Args:
        path: of the file; it and its folder are created where they are missing.
        timeout: seconds to wait for another process that writes.

    Raises:
        UserError: the file is something else, damaged, locked, or cannot be written; also on every read and write.
    """

    def __init__(self, path: Path, timeout: float = 60):
        self.path = path
        self.hits = self.misses = 0
        with self._usable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=timeout)
            self._file.text_factory = bytes  # a damaged row may hold any bytes
            self._file.execute("CREATE TABLE IF NOT EXISTS generated (key TEXT PRIMARY KEY, tokens TEXT NOT NULL)")

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:  # locked, read-only, no space left
            raise UserError(f"the cache of answers {shown(self.path)} cannot be used: {cause(error)}") from None
        except sqlite3.Error as error:
            raise UserError(
                f"{shown(self.path)} is no cache of answers, or damaged ({cause(error)}); remove it to start anew"
            ) from None

    def read(self, model_digest: bytes, prompts: Sequence[Tokens]) -> dict[Tokens, list[int]]:
        """The new tokens of those prompts that have an answer here. A damaged row is no answer."""
        query = "SELECT tokens FROM generated WHERE key = ?"
        with self._usable():
            rows = [(ids, self._file.execute(query, (_key(model_digest, ids),)).fetchone()) for ids in prompts]
        answers = {ids: new for ids, row in rows if row and (new := _tokens(row[0]))}
        self.hits += len(answers)
        return answers

    def write(self, model_digest: bytes, answers: Mapping[Tokens, list[int]]) -> None:
        """Store the new tokens of prompts, all of them or none."""
        with self._usable(), self._file:  # all of a batch or nothing
            rows = [(_key(model_digest, ids), json.dumps(new)) for ids, new in answers.items()]
            self._file.executemany("INSERT OR REPLACE INTO generated VALUES (?, ?)", rows)
        self.misses += len(answers)

    def take_over(self, path: Path) -> None:
        """Every answer of another cache's file."""
        other = AnswerCache(path)
        with other._usable():
            rows = other._file.execute("SELECT key, tokens FROM generated").fetchall()
        other.close()
        with self._usable(), self._file:
            self._file.executemany(
                "INSERT OR REPLACE INTO generated VALUES (?, ?)", [(k.decode(), v.decode()) for k, v in rows]
            )

    def close(self) -> None:
        self._file.close()


def _key(model_digest: bytes, ids: Tokens) -> str:
    return hashlib.blake2b(model_digest + json.dumps(ids).encode(), digest_size=16).hexdigest()


def _tokens(stored: Any) -> list[int] | None:
    """The token ids of a stored row; None where it holds anything else. (An answer has at least one token.)"""
    try:
        ids = json.loads(stored)
    except (ValueError, TypeError, RecursionError):
        return None
    valid = isinstance(ids, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
    return ids if valid and ids else None


def digest(model: Any, *settings: Any) -> bytes:
    """Of all that decides an answer but the prompt, an adapter beside the weights too; about a second a gigabyte.

    Raises:
        ValueError: an adapter that can be switched off: whether it is on cannot be read from the weights.
    """
    if hasattr(model, "disable_adapter"):
        raise ValueError("answers of a model whose adapter can be switched off cannot be stored; load it beside them")
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    total = hashlib.blake2b(
        json.dumps([config, adapter_settings(model), settings], sort_keys=True, default=str).encode(), digest_size=16
    )
    packed = ((name, dense_weight(layer)) for name, layer in quantized_layers(model).items())  # scales are no buffers
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers(), packed):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.digest()
