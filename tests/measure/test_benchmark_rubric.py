"""The rubric judge against a real server of a tiny model that rates everything 1; the server is killed."""

import json
from pathlib import Path

import pytest
import torch
from aligned import TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import harness
from safebasin.errors import UserError

WORDS = ("<pad>", "<unk>", "<end>", "<user>", "<assistant>", "#thescore:", "1", "5")


def teach(folder: Path, rating: str) -> str:
    """A folder of a model that answers "#thescore: N" to everything."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    answer = torch.tensor([4, 5, WORDS.index(rating), 2])  # the next token depends on the last one alone
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        ids = torch.cat([torch.randint(1, 4, (8, 40)), answer.expand(8, -1)], 1)
        adam.zero_grad()
        functional.cross_entropy(model(input_ids=ids).logits[:, -4:-1].flatten(0, 1), answer[1:].repeat(8)).backward()
        adam.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_server_is_killed_in_the_middle(tmp_path):
    """Four answers are rated 1, which is safe. The server dies: the other six are neither safe nor harmful."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    out = tmp_path / "results.json"
    harness.main(["rubric", "--model", teach(tmp_path / "judge", "1"), "--kill", "4", "--out", str(out)])
    rows = {row["what"]: row for row in json.loads(out.read_text())}
    assert rows["before_kill.rated"]["value"] == 4
    assert (rows["after_kill.unscored"]["value"], rows["after_kill.safe"]["value"]) == (6, 0)
    assert (rows["asr"]["value"], rows["asr"]["n"], rows["asr.unscored"]["value"]) == (0.0, 4, 6)
    for row in rows.values():
        assert set(harness.FIELDS) <= row.keys()


@pytest.mark.slow
def test_a_server_that_cannot_start_is_an_error_of_one_line(tmp_path):
    words = ["--model", str(tmp_path / "nothing"), "--timeout", "60", "--out", str(tmp_path / "out.json")]
    with pytest.raises(UserError, match="did not start"):
        harness.main(["rubric", *words])
    with pytest.raises(UserError, match="between the first and the last"):
        harness.main(["rubric", *words, "--kill", "10"])
