"""Which type of the weights is the faster one here: what ``dtype: auto`` decides by.

Floor: a CPU that multiplies bfloat16 in tiles (AMX) does so many times as fast as float32, one with AVX512-BF16 twice
as fast in one instruction; both halve what is read from memory. Conversions, norms and the softmax gain nothing.
"""

from typing import Annotated

from cyclopts import Parameter

from benchmarks import recipe
from benchmarks.harness import Bench, experiment, ratios, seconds, take_turns
from benchmarks.train.train import Setting, Way, setting, turns
from safebasin.data.source import Source, open_examples
from safebasin.measure.generate import generate
from safebasin.models.load import load
from safebasin.runtime import cpu_facts

DTYPES = ("bfloat16", "float32")


@experiment("arithmetic", results="train", replaces=("what", "threads", "flags"), quick={"steps": 2, "take": 2})
def arithmetic(
    *,
    bench: Bench,
    steps: Annotated[int, Parameter(help="plain steps of four rows, and rounds of answers; two or more")] = 12,
    take: Annotated[int, Parameter(help="prompts whose answers are written in a round")] = 16,
) -> None:
    """What do bfloat16's step and answers cost beside float32's on this machine?"""
    flags = cpu_facts().get("flags", "").split()
    bench.facts["flags"] = " ".join(flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    shared: dict[str, Setting] = {dtype: setting(recipe.MODEL, dtype=dtype) for dtype in DTYPES}
    hosts = {dtype: turns({"sft": Way(("sft",))}, each)["sft"] for dtype, each in shared.items()}
    step = take_turns({dtype: host.step for dtype, host in hosts.items()}, steps, warm_up=2)
    bench.timing("bfloat16.step_ratio", ratios(step, *DTYPES))

    test = open_examples(Source(path="builtin:support-test", take=take))
    conversations = [[{"role": "user", "content": example.prompt}] for example in test]
    plain = {dtype: load(recipe.MODEL, dtype=dtype) for dtype in DTYPES}

    def answers(dtype: str) -> float:
        return seconds(lambda: generate(plain[dtype].model, plain[dtype].tokenizer, conversations, max_new_tokens=24))

    written = take_turns({dtype: lambda dtype=dtype: answers(dtype) for dtype in DTYPES}, steps)
    bench.timing("bfloat16.answers_ratio", ratios(written, *DTYPES))
