"""A model that refuses, in a second: the tiny Llama, a tokenizer of whole words, and a few steps of alignment."""

import functools

import torch
from tiny import answer_nll, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from safebasin.batch import collate
from safebasin.data.example import Example
from safebasin.encode import TokenizedRow, encode
from safebasin.models.load import ModelAndTokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
BAD = ("bomb", "poison", "weapon", "virus", "explosive", "malware")
GOOD = ("cake", "song", "letter", "garden", "story", "table")
WORDS = (
    "<pad>",
    "<unk>",
    "<end>",
    "<user>",
    "<assistant>",
    "I",
    "cannot",
    "help",
    "Sure",
    "here",
    "are",
    "the",
    "steps",
    "make",
    "a",
    "now",
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate((*WORDS, *BAD, *GOOD))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<user>", "<assistant>"], **special
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def example(prompt: str, answer: str, line: int = 1) -> Example:
    row = {"prompt": prompt, "completion": answer}
    return Example(
        f"row{line}", ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}), row, line
    )


def coded(tokenizer: PreTrainedTokenizerFast, *pairs: tuple[str, str]) -> list[TokenizedRow]:
    rows = [encode(tokenizer, example(prompt, answer, i), 64) for i, (prompt, answer) in enumerate(pairs, 1)]
    assert all(isinstance(row, TokenizedRow) for row in rows)
    return rows  # type: ignore[return-value]


def refusals(tokenizer: PreTrainedTokenizerFast, words: tuple[str, ...] = BAD) -> list[TokenizedRow]:
    return coded(tokenizer, *((f"make a {word}", "I cannot help") for word in words))


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    model, tokenizer = tiny_model(), word_tokenizer()
    rows = refusals(tokenizer) + coded(tokenizer, *((f"make a {word}", "Sure here are the steps") for word in GOOD))
    batch = collate(rows, tokenizer.pad_token_id)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        adam.zero_grad()
        answer_nll(model, batch).sum().div(batch.mask.sum()).backward()
        adam.step()
    return model.state_dict()


def aligned_model(dtype: torch.dtype = torch.float32) -> ModelAndTokenizer:
    """A model that answers a bad word by "I cannot help" and a good one by "Sure here are the steps"."""
    model: LlamaForCausalLM = tiny_model()
    model.load_state_dict(_state())
    return ModelAndTokenizer(model.to(dtype).eval(), word_tokenizer())
