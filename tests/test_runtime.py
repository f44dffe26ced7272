"""What the hardware does well decides the arithmetic; the recipe may decide otherwise."""

import pytest
from folders import run

from safebasin import runtime
from safebasin.pipeline.parse import parse
from safebasin.runtime import Arithmetic, arithmetic, resolved

OLD = {"sse4_2", "avx", "avx2", "avx512f", "avx512_vnni"}


@pytest.mark.parametrize(
    ("flags", "gpu", "dtype", "words"),
    [
        (OLD, None, "float32", "without amx_bf16"),
        (OLD | {"avx512_bf16"}, None, "float32", "without amx_bf16"),
        ({"amx_tile", "amx_bf16"}, None, "bfloat16", "amx_bf16"),
        ((), None, "float32", "CPU"),
        (OLD, True, "bfloat16", "GPU"),
        (OLD | {"amx_bf16"}, False, "float32", "GPU without bfloat16"),
    ],
)
def test_by_the_flags(flags, gpu, dtype, words):
    chosen = arithmetic(flags, gpu)
    assert chosen.dtype == dtype and words in chosen.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_follows_the_weights(dtype, monkeypatch):
    monkeypatch.setattr(runtime, "hardware", lambda: Arithmetic(dtype, "a test"))
    text = "{data: {task: {path: x}}, arms: {start: {}}, measure: {}"
    assert resolved("auto") == dtype and resolved("float32") == "float32"
    assert parse(text + "}").arguments["bf16"] is (dtype == "bfloat16")
    assert parse(text + ", model: {dtype: float32}}").arguments["bf16"] is False
    assert parse(text + ", train: {bf16: auto}}").arguments["bf16"] is (dtype == "bfloat16")
    assert parse(text + ", model: {dtype: bfloat16}, train: {bf16: false}}").arguments["bf16"] is False


def test_doctor_says_which_and_why(monkeypatch, capsys):
    monkeypatch.setattr("safebasin.models.bundled.BUILTIN", ())
    assert run("doctor") == 0
    assert f"dtype auto is {runtime.hardware().dtype}: {runtime.hardware().reason}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert runtime.machine()
