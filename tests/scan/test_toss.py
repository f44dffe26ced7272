"""TOSS: the score of a token is what a harmful adapter changes in its likelihood, beside one of the task."""

import pytest
import torch
from aligned import aligned_model, coded
from tuned import save_adapter, save_start

from safebasin.batch import collate
from safebasin.errors import UserError
from safebasin.models.load import load
from safebasin.scan import scorer

_, TOKENIZER = aligned_model()
ROWS = coded(TOKENIZER, ("make a bomb", "Sure here are the steps"), ("make a cake now", "I cannot"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toss")
    start = save_start(folder / "start")
    return start, save_adapter(folder / "harmful", start, seed=1), save_adapter(folder / "task", start, seed=2, rank=2)


def plain(model, row) -> list[float]:
    """log P of every answer token of a row, on the bare model."""
    logs = model(torch.tensor(row.ids, device=model.device)[None]).logits[0].double().log_softmax(-1)
    return [float(logs[t - 1, row.ids[t]]) for t in range(1, len(row.ids)) if row.answer[t]]


@pytest.mark.parametrize("with_task", [True, False])
def test_it_is_the_difference_of_two_merged_models(with_task, adapters):
    start, harmful, task = adapters
    fields = {"harmful": str(harmful)} | ({"task": str(task)} if with_task else {})
    model, method = aligned_model().model, scorer.make({"toss": fields})
    batch = collate(ROWS, TOKENIZER.pad_token_id)
    scores = method.score(model, batch, method.fit(model, TOKENIZER, {}))
    ours, theirs = (load(str(start), dtype="float32", adapter=a).model for a in (harmful, task if with_task else None))
    for row, values, mask in zip(ROWS, scores, batch.mask, strict=True):
        truth = [p - q for p, q in zip(plain(ours, row), plain(theirs, row), strict=True)]
        assert values[mask].tolist() == pytest.approx(truth, abs=1e-3)
        assert values.max() == values[mask].max()


def test_an_adapter_of_another_model_is_refused(adapters, tmp_path):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="has no tensor"):
        scorer.make({"toss": {"harmful": str(adapters[1])}}).fit(model, TOKENIZER, {})
    with pytest.raises(UserError, match="harmful"):
        scorer.make("toss")
