"""What tests of the command line build on: a tiny model as a folder, and the command itself."""

from pathlib import Path

import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safebasin.cli.main import app, guarded

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*words: str) -> int:
    return guarded(lambda: app(list(words), result_action="return_value"))


def save_tiny(folder: Path, *, template: str | None = TEMPLATE, broken: bool = False) -> Path:
    """A tiny model with a tokenizer, as a Hugging Face folder."""
    words = ["<unk>", "</s>", "<user>", "<assistant>", "<system>", *"abcdefghijklmnopqrstuvwxyz .,:?!'\n"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    fast.add_tokens(["<user>", "<assistant>", "<system>"], special_tokens=True)
    fast.chat_template = template
    fast.save_pretrained(folder)
    model = tiny_model()
    if broken:
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    return folder
