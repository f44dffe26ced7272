"""Per-token weights in somebody else's Trainer: a collator that hands them over, and the loss that reads them.

    L = sum_t w_t CE(y_t | x, y_<t) / N     N: labels of all micro-batches and ranks of the step, whatever they weigh

With w = ``star`` this is STAR-DSS without its KL to the reference, ``star_dss: {kl: 0}``; with one number a row it is
static shaping. This file imports torch and errors alone, so that it runs beside other versions of transformers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from safebasin.errors import UserError

WEIGHTS = "weights"  # the column: one number a token, 0 where nothing is learned


@dataclasses.dataclass
class WeightedCollator:
    """Rows of ``input_ids``, ``labels`` and ``weights``, lists of one length, padded on the right.

    The fields after the tokenizer are those that axolotl hands over.

    Raises:
        UserError: a row lacks one of the three, or they have different lengths: a trainer cut the row short.
    """

    tokenizer: Any
    padding: bool = True
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, rows: Sequence[Mapping[str, Any]], return_tensors: str = "pt") -> dict[str, Tensor]:
        fills = {"input_ids": self.tokenizer.pad_token_id, "labels": -100, WEIGHTS: 0.0}
        for row in rows:
            sizes = {name: len(row[name]) for name in fills if row.get(name) is not None}
            if len(sizes) < len(fills) or len(set(sizes.values())) > 1:
                raise UserError(
                    f"a row needs {', '.join(fills)} of one length, found {sizes}; leave the cutting of rows to "
                    "safebasin convert --max-length, and the column in the set (remove_unused_columns=False)"
                )
        longest, unit = max(len(row["input_ids"]) for row in rows), self.pad_to_multiple_of or 1
        width = -(-longest // unit) * unit
        fills["attention_mask"] = 0
        full = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        return {
            name: torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in full])
            for name, fill in fills.items()
        }


class WeightedLoss:
    """Goes before a Trainer: ``class Weighted(WeightedLoss, SFTTrainer)``.

    Raises:
        UserError: a batch without weights: the Trainer dropped the column, or has a collator of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the labels of a step over its micro-batches

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if WEIGHTS not in inputs:
            raise UserError(
                f"the batch has no {WEIGHTS!r}, so nothing would be weighed: set remove_unused_columns=False and "
                "data_collator=WeightedCollator(tokenizer)"
            )
        inputs = dict(inputs)
        labels, weights = (inputs.pop(name)[:, 1:] for name in ("labels", WEIGHTS))
        outputs = model(**inputs)
        mask = labels != -100
        losses = functional.cross_entropy(outputs.logits[:, :-1][mask].float(), labels[mask], reduction="none")
        count = mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (weights[mask] * losses).sum() / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the labels of all ranks were counted; gradients are averaged
        return (loss, outputs) if return_outputs else loss
