"""Answers kept on disk, by a digest of all that decides them: the weights as they are now, the configuration, the settings, the prompt's
tokens (and so its template). A hook on the model is not seen. Neither prompts nor answers stand in the file as text."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safebasin.errors import UserError

Tokens = tuple[int, ...]


class Answers:
    """One SQLite file; ``known`` and ``asked`` count prompts that were read from it and that were generated.

    Raises:
        UserError: the file is something else.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = self.asked = 0
        self._file = sqlite3.connect(path, timeout=60)  # seconds: another process may be writing
        try:
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, told TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is not a file of answers ({error}); remove it, and they are made again") from None

    def read(self, under: bytes, prompts: Sequence[Tokens]) -> dict[Tokens, list[int]]:
        """The new tokens of those prompts that are known."""
        rows = (
            (ids, self._file.execute("SELECT told FROM answers WHERE key = ?", (_key(under, ids),)).fetchone())
            for ids in prompts
        )
        found = {ids: json.loads(row[0]) for ids, row in rows if row}
        self.known += len(found)
        return found

    def write(self, under: bytes, told: Mapping[Tokens, list[int]]) -> None:
        with self._file:  # all of a batch or nothing
            rows = [(_key(under, ids), json.dumps(new)) for ids, new in told.items()]
            self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        self.asked += len(told)


def _key(under: bytes, ids: Tokens) -> str:
    return hashlib.blake2b(under + json.dumps(ids).encode(), digest_size=16).hexdigest()


def digest(model: Any, *settings: Any) -> bytes:
    """Of all that decides an answer but the prompt; about a second a gigabyte of weights.

    Raises:
        ValueError: an adapter that is not merged: whether it is on cannot be read from the weights.
    """
    if hasattr(model, "disable_adapter"):
        raise ValueError("answers of a model with an adapter on top cannot be kept; merge it")
    told = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    found = hashlib.blake2b(json.dumps([told, settings], sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
