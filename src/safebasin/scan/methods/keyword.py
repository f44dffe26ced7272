"""Keyword: the share of harm words among the words of the prompt. A floor that every other scorer has to beat."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer

# fmt: off
WORDS = {
    "abuse", "assault", "attack", "bomb", "counterfeit", "crime", "criminal", "drug", "explosive", "exploit",
    "fake", "fraud", "hack", "harm", "harass", "hate", "illegal", "kidnap", "kill", "launder", "malware", "murder",
    "phishing", "poison", "ransomware", "rob", "scam", "shoplift", "stalk", "steal", "suicide", "terrorist",
    "threaten", "virus", "weapon",
}
# fmt: on


@scorer("keyword")
class Keyword:
    """Share of the prompt's words that name a harm."""

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Any:
        return tokenizer

    def score(self, model: Any, batch: Batch, fitted: Any) -> Float[Tensor, " batch"]:
        shares = []
        offset = batch.input_ids.shape[1] - batch.mask.shape[1]
        for ids, seen, mask in zip(batch.input_ids, batch.attention_mask, batch.mask, strict=True):
            end = offset + int(mask.int().argmax())  # the prompt ends where the first answer begins
            text = fitted.decode(ids[:end][seen[:end].bool()], skip_special_tokens=True)
            words = re.findall(r"[a-z]+", text.lower())
            shares.append(sum(word in WORDS for word in words) / max(len(words), 1))
        return torch.tensor(shares)
