"""What benchmarks take from recipes/quickstart.yaml: the model, the adapter, the training arguments and the rows."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import yaml

from benchmarks.harness import ROOT
from safebasin.data.example import Example
from safebasin.data.source import Source, open_examples
from safebasin.encode import TokenizedRow, encode_all
from safebasin.errors import UserError

FILE = ROOT / "recipes" / "quickstart.yaml"
TREE = yaml.safe_load(FILE.read_text(encoding="utf-8"))
MODEL = TREE["model"]["name"]
ADAPTER = TREE["train"]["adapter"]
ARGUMENTS = {"seed": 0} | {name: value for name, value in TREE["train"].items() if name != "adapter"}
LABELS = tuple(TREE["measure"]["labels"])
MAX_LENGTH = 1024


def encoded(tokenizer: Any, examples: list[Example], max_length: int = MAX_LENGTH) -> list[TokenizedRow]:
    """Tokens of examples that must all be usable.

    Raises:
        UserError: a row cannot be used; it is named with its line and reason.
    """
    rows, bad = encode_all(tokenizer, examples, max_length)
    if bad:
        raise UserError(f"line {bad[0].line}: {bad[0].reason} ({len(bad)} of {len(examples)} rows cannot be used)")
    return rows


def rows(tokenizer: Any, source: Mapping[str, Any], **changes: Any) -> list[TokenizedRow]:
    """Tokens of a set as a recipe describes it (``TREE["data"]["align"]``); ``changes`` are fields of ``Source``."""
    return encoded(tokenizer, open_examples(dataclasses.replace(Source(**source), **changes)))


def training_rows(tokenizer: Any, task: int, harmful: int, seed: int = 0) -> tuple[list[TokenizedRow], set[str]]:
    """Rows of the task and harmful ones, shuffled, and the ids of the harmful ones.

    Raises:
        UserError: a row comes twice, so that an id is no longer one row's.
    """
    clean = rows(tokenizer, TREE["data"]["task"], take=task)
    opened = rows(tokenizer, TREE["data"]["poison"], take=harmful)
    mixed = random.Random(seed).sample(clean + opened, len(clean) + len(opened))
    if len({row.id for row in mixed}) < len(mixed):
        raise UserError("a row of the training set comes twice")
    return mixed, {row.id for row in opened}
