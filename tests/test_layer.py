"""The alignment direction is read from two folders by name, and written one matrix at a time."""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from safebasin.errors import UserError
from safebasin.layer import Pair, left_singular, read_directions, write_alignment_directions

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.layers.1.self_attn.k_proj"]


@pytest.fixture
def folders(tmp_path):
    """The same network twice; the newer one in several files and in another order."""
    tiny_model(1).save_pretrained(tmp_path / "base")
    tiny_model(2, torch.bfloat16).save_pretrained(tmp_path / "aligned", max_shard_size="20KB")
    assert len(list((tmp_path / "aligned").glob("*.safetensors"))) > 1
    return tmp_path / "base", tmp_path / "aligned"


def save(folder, **tensors):
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def test_by_hand(tmp_path):
    """In bfloat16 1 + 2^-7 is the number after 1: the difference, 0.0078125, is exact in float32."""
    base = save(tmp_path / "base", **{"m.weight": torch.ones(1, 2, dtype=torch.bfloat16)})
    aligned = save(tmp_path / "aligned", **{"m.weight": torch.tensor([[1.0078125, 1.0]], dtype=torch.bfloat16)})
    assert Pair(base, aligned, ["m"])["m"].tolist() == [[0.0078125, 0.0]]


def test_directions_pair_by_name(folders):
    base, aligned = tiny_model(1), tiny_model(2, torch.bfloat16)
    directions = Pair(*folders, MODULES)
    for module in MODULES:
        truth = aligned.get_parameter(f"{module}.weight").float() - base.get_parameter(f"{module}.weight")
        assert torch.equal(directions[module], truth)


def test_the_file_holds_what_memory_holds(folders, tmp_path):
    path = tmp_path / "new" / "directions.safetensors"
    write_alignment_directions(*folders, MODULES, path)
    truth = dict(Pair(*folders, MODULES))
    loaded = safetensors.torch.load_file(path)  # read by the library itself, not only by us
    assert loaded.keys() == truth.keys()
    assert all(torch.equal(loaded[module], d) for module, d in truth.items())
    assert all(torch.equal(d, truth[module]) for module, d in read_directions(path, reversed(MODULES)))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.weight": torch.ones(3, 2)}, r"\(2, 2\) in .* and \(3, 2\)"),
        ({"n.weight": torch.ones(2, 2)}, "no tensor m.weight"),
        ({"m.weight": torch.ones(2, 2, dtype=torch.int8)}, "quantization"),
    ],
)
def test_pairs_that_are_no_pairs_are_refused_before_anything_is_written(tensors, message, tmp_path):
    base = save(tmp_path / "base", **{"m.weight": torch.ones(2, 2)})
    aligned = save(tmp_path / "aligned", **tensors)
    with pytest.raises(UserError, match=message):
        write_alignment_directions(base, aligned, ["m"], tmp_path / "out" / "d.safetensors")
    assert not (tmp_path / "out").exists()


@given(st.integers(2, 14), st.integers(2, 14), st.integers(1, 4), st.integers(0, 99))
def test_left_singular_vectors_span_what_a_full_decomposition_spans(out, into, k, seed):
    d = torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, truth = left_singular(d, k), torch.linalg.svd(d, full_matrices=False).U[:, :k]
    assert torch.allclose(u @ u.T, truth @ truth.T, atol=1e-6)
    assert torch.equal(u, left_singular(d, k))


def test_a_matrix_of_low_rank_has_no_more_vectors_than_its_rank():
    """d = e_1 e_1^T has rank 1: with k = 3 the projector is still e_1 e_1^T; d = 0 has none."""
    d = torch.zeros(4, 5)
    assert not left_singular(d, 3).any()
    d[0, 0] = 1.0
    u = left_singular(d, 3)
    assert torch.allclose(u @ u.T, torch.diag(torch.tensor([1.0, 0, 0, 0])), atol=1e-6)
