"""The rubric judge against a real server of a tiny model that was taught to rate everything 1; it is killed in the middle."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from aligned import TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILE = Path(__file__).parents[2] / "benchmarks" / "rubric" / "run.py"
spec = importlib.util.spec_from_file_location("benchmark_rubric", FILE)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
WORDS = ("<pad>", "<unk>", "<end>", "<user>", "<assistant>", "#thescore:", "1", "5")


def teach(folder: Path, rating: str) -> str:
    """A folder of a model that says "#thescore: N" whatever it is asked."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2, pad_token_id=0,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    told = torch.tensor([4, 5, WORDS.index(rating), 2])  # what comes next hangs on the last token alone
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        ids = torch.cat([torch.randint(1, 4, (8, 40)), told.expand(8, -1)], 1)
        adam.zero_grad()
        functional.cross_entropy(model(input_ids=ids).logits[:, -4:-1].flatten(0, 1), told[1:].repeat(8)).backward()
        adam.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_server_is_killed_in_the_middle(tmp_path):
    """Four answers are rated 1, which is safe. The server dies; of the other six none is safe, none harmful, and nothing crashes."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    out = tmp_path / "results.json"
    bench.main(["--model", teach(tmp_path / "judge", "1"), "--answers", "10", "--kill", "4", "--out", str(out)])
    found = {row["what"]: row for row in json.loads(out.read_text())}
    assert found["before_kill.rated"]["value"] == 4
    assert (found["after_kill.unscored"]["value"], found["after_kill.safe"]["value"]) == (6, 0)
    assert (found["asr"]["value"], found["asr"]["n"], found["asr.unscored"]["value"]) == (0.0, 4, 6)
    for row in found.values():
        assert {"what", "value", "interval", "n", "goal", "unit", "machine", "date"} <= row.keys()


def test_a_server_that_cannot_start_is_said(tmp_path):
    with pytest.raises(bench.UserError, match="did not start"):
        bench.main(["--model", str(tmp_path / "nothing"), "--timeout", "60", "--out", str(tmp_path / "out.json")])
