"""What a run of tuning can be refused for before its first step."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.models.adapter import starts_fresh
from safebasin.train.compose import Composition
from safebasin.train.reference import ReferenceCache
from safebasin.train.settings import DEEPSPEED
from safebasin.train.stream import Stream
from safebasin.vector import trainable


def check(
    model: Any,
    args: TrainingArguments,
    methods: Composition,
    streams: Mapping[str, Stream],
    reference: ReferenceCache | None = None,
) -> None:
    """Refuse what can be refused before the first step.

    Raises:
        UserError: a stream, a column or a role that the methods need is missing; nothing to tune; FSDP on one process.
    """
    if not trainable(model):
        raise UserError("the model has no trainable parameter: tune with train.adapter, or all of it")
    for name in methods.needs("streams"):
        if name not in streams:
            raise UserError(
                f"the methods {[type(m).__name__ for m in methods.methods]} need the stream {name!r}: set data.{name}"
            )
    for name in methods.needs("columns"):
        if any(name not in row.columns for row in streams["task"].rows):
            raise UserError(
                f"the methods need the column {name!r} on every row of the task; scan the rows first, or name a file"
            )
    check_columns(streams["task"].rows, methods.needs("columns"))
    if methods.penalty is not None:  # it raises where a base is missing, or names or shapes differ
        with torch.no_grad():
            methods.penalty(trainable(model))
    if "reference" in methods.needs("roles") and reference is None:
        if not hasattr(model, "disable_adapter"):
            raise UserError(
                "a method needs the reference model, which is the adapter switched off: tune with train.adapter, or"
                " give a stored_reference"
            )
        if own := [name for name in trainable(model) if name.endswith("base_layer.bias")]:
            raise UserError(
                f"{own[0]} is tuned with the adapter, so switching that off is not the starting model; set bias: none"
            )
        if not starts_fresh(model):
            raise UserError(
                "the adapter does not start fresh (its B is not zero), so switching it off is not the starting model; "
                "merge it first"
            )
    if args.fsdp and args.world_size == 1:
        raise UserError(
            "train.fsdp shards over several processes and this is one; start the run with torchrun, or leave it out"
        )
    if args.deepspeed:
        raise UserError(DEEPSPEED)


def check_columns(rows: Iterable[TokenizedRow], names: Iterable[str]) -> None:
    """UserError: a column with numbers per row and per token, or with another count than the answer has tokens."""
    rows = list(rows)
    for name in names:
        per_row = [isinstance(row.columns[name], int | float) for row in rows]
        if len(set(per_row)) > 1:
            one, several = rows[per_row.index(True)].id, rows[per_row.index(False)].id
            raise UserError(f"the column {name!r} has one number for row {one} and several for {several}")
    for row, name in itertools.product(rows, names):
        values = row.columns[name]
        if not isinstance(values, int | float) and len(values) != row.answer.sum():
            raise UserError(
                f"row {row.id}: the column {name!r} holds {len(values)} numbers for {row.answer.sum()} answer tokens; "
                "was it made with another tokenizer or template?"
            )
