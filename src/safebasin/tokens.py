"""Texts as tokens, many in one call, and which tokens of them have a part in a span of characters.

Where every token is a run of bytes of its text (byte-level BPE: Llama 3, Qwen, SmolLM), the place of one is the sum of
the bytes before it, so that the tokenizer is not asked for offsets, which cost a third of its time; and a text between
two added tokens, such as a system prompt, becomes tokens once for all the rows that have it. Other tokenizers are asked
for complete texts and offsets, and so is this one where its tokens have fewer bytes than a text (a byte without a
token, white space that a token swallows).
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

Span = tuple[int, int]
SPLITS = ("Split", "Digits", "Punctuation", "ByteLevel")  # steps that leave every byte of a text, unless they remove


class TokenizedTexts:
    """Texts as token ids, one text behind the other.

    Attributes:
        ids: of all texts.
        first: [texts + 1], the place in ``ids`` of each text's first token, and the end.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self._texts, self._bytes = texts, True
        kind = _byte_tokens(tokenizer, len(tokenizer)) if _plain(tokenizer) else None
        if kind is None or not self._by_bytes(tokenizer, kind):
            self._by_offsets(tokenizer)

    def _by_bytes(self, tokenizer: Any, kind: "_ByteTokens") -> bool:
        """Whether the bytes of the tokens are as many as those of each text."""
        texts, backend = self._texts, tokenizer.backend_tokenizer
        if kind.composed and not all(text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts):
            return False
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        ids = kind.added | {"": []}
        pieces = [kind.border.split(text) for text in texts]
        fresh = list(dict.fromkeys(piece for row in pieces for piece in row if piece not in ids))
        ids |= zip(
            fresh, [coded.ids for coded in backend.encode_batch_fast(fresh, add_special_tokens=False)], strict=True
        )
        self._fill([[token for piece in row for token in ids[piece]] for row in pieces])
        widths = kind.widths[self.ids]
        self._ends = widths.cumsum()
        self._starts = self._ends - widths
        self._begins = _sums([len(text) if text.isascii() else len(text.encode()) for text in texts])
        self._regular = np.ones(len(self.ids), bool)
        return np.array_equal(np.append(0, self._ends)[self.first], self._begins)

    def _by_offsets(self, tokenizer: Any) -> None:
        how = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}
        coded = tokenizer(list(self._texts), **how)
        self._bytes = False
        self._fill(coded["input_ids"])
        self._begins = _sums([len(text) for text in self._texts])
        pairs = itertools.chain.from_iterable(itertools.chain.from_iterable(coded["offset_mapping"]))
        offsets = np.fromiter(pairs, np.int64).reshape(-1, 2)
        offsets += np.repeat(self._begins[:-1], np.diff(self.first))[:, None]
        self._starts, self._ends = np.maximum.accumulate(offsets, 0).T
        self._regular = (offsets[:, 0] == self._starts) & (offsets[:, 1] == self._ends)  # others stand for no text

    def _fill(self, ids: Sequence[Sequence[int]]) -> None:
        self.first = _sums([len(row) for row in ids])
        self.ids = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(self.first[-1]))
        self.ids.flags.writeable = False

    def inside(
        self, spans: Sequence[Sequence[Span]]
    ) -> tuple[Int[np.ndarray, " spans"], Int[np.ndarray, " spans"], Int[np.ndarray, " spans"]]:
        """Of every span of characters of each text: the text, the first token with a part in it, and the one behind
        the last.

        Args:
            spans: for each text, in order.
        """
        counts = [len(each) for each in spans]
        flat = np.array([span for each in spans for span in each], np.int64).reshape(-1, 2)
        owners = np.repeat(np.arange(len(spans)), counts)
        if self._bytes:
            for i in np.flatnonzero(np.diff(self._begins) != [len(text) for text in self._texts]).tolist():
                flat[owners == i] = _byte_places(self._texts[i])[flat[owners == i]]
        flat += self._begins[owners][:, None]
        low = np.searchsorted(self._ends, flat[:, 0], "right")
        return owners, low, np.maximum(low, np.searchsorted(self._starts, flat[:, 1], "left"))

    def having(self, values: Iterable[int]) -> Bool[np.ndarray, " tokens"]:
        """Which tokens, those that stand for text, have one of these ids."""
        return np.isin(self.ids, list(values)) & self._regular

    def covered(self, low: Int[np.ndarray, " spans"], high: Int[np.ndarray, " spans"]) -> Bool[np.ndarray, " tokens"]:
        """Which tokens are in one of these runs of tokens."""
        size = len(self.ids) + 1
        steps = np.bincount(low, minlength=size) - np.bincount(high, minlength=size)
        return (steps.cumsum()[:-1] > 0) & self._regular


def _sums(numbers: Sequence[int] | Int[np.ndarray, " m"]) -> Int[np.ndarray, " m_and_1"]:
    return np.concatenate([[0], np.cumsum(numbers, dtype=np.int64)])


def _byte_places(text: str) -> Int[np.ndarray, " n"]:
    """[characters + 1]: the bytes before each character."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return _sums(1 + (points >= 1 << 7).astype(np.int64) + (points >= 1 << 11) + (points >= 1 << 16))


def _plain(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer is one of its backend and no more, which finds control tokens in a text."""
    from transformers import PreTrainedTokenizerFast  # here, as previews are to start fast

    kind, ours = type(tokenizer), isinstance(tokenizer, PreTrainedTokenizerFast)
    same = (getattr(kind, name, 0) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus"))
    return ours and all(same) and not tokenizer.split_special_tokens


class _ByteTokens(NamedTuple):
    """Byte-level BPE."""

    widths: Int[np.ndarray, " vocabulary"]  # bytes of each token
    composed: bool  # texts must be (NFC)
    border: re.Pattern[str]  # an added token, which is found before anything else is done to a text
    added: dict[str, list[int]]  # the tokens that ``border`` finds


@functools.lru_cache(maxsize=8)
def _byte_tokens(tokenizer: Any, size: int) -> _ByteTokens | None:
    """How texts become tokens, where each is a run of their bytes and pieces do not depend on one another."""
    backend = tokenizer.backend_tokenizer
    model, vocabulary = backend.model, backend.get_vocab(with_added_tokens=False)
    before, normalizers = _steps(backend.pre_tokenizer), _steps(backend.normalizer)
    levels = [step for step in before if step["type"] == "ByteLevel"]
    added = backend.get_added_tokens_decoder()
    lossless = (
        isinstance(model, BPE)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout)
        and (model.unk_token is None or set(ByteLevel.alphabet()) <= vocabulary.keys())
        and levels
        and not any(step["add_prefix_space"] for step in levels)
        and all(step["type"] in SPLITS and step.get("behavior") != "Removed" for step in before)
        and all(step["type"] == "NFC" for step in normalizers)
        and not any(step.get("trim_offsets") for step in _steps(backend.post_processor))
        and not any(token.lstrip or token.rstrip or token.single_word for token in added.values())
    )
    if not lossless:
        return None
    widths = np.zeros(1 + max(size, *vocabulary.values(), *added), np.int64)
    widths[list(vocabulary.values())] = [len(token) for token in vocabulary]
    for i, token in added.items():
        widths[i] = len(token.content.encode())
    texts = {token.content: [i] for i, token in added.items() if not token.normalized}
    border = "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
    return _ByteTokens(widths, bool(normalizers), re.compile(f"({border})"), texts)


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, which may be a sequence of sequences; its state is JSON."""
    pending, steps = [json.loads(part.__getstate__())] if part else [], list[dict[str, Any]]()
    while pending:
        step = pending.pop()
        inner = step.get("pretokenizers", step.get("normalizers", step.get("processors")))
        pending += inner or []
        steps += [step] * (inner is None)
    return steps
