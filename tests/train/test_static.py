"""Static shaping: kept rows are learnt, dropped rows are not."""

import contextlib
import dataclasses
import math

import pytest
import torch
from away import Tilted, adapted, assert_same
from tiny import PAD, random_rows

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError
from safebasin.train.compose import Composition
from safebasin.train.loss import nll
from safebasin.train.methods.star_dss import StarDss
from safebasin.train.methods.static import Static
from safebasin.train.oracle import Oracle
from safebasin.train.settings import training_arguments
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer


def test_by_hand():
    """Four words, token 1 has probability 1/2: CE = log 2 = 0.693147 at both tokens of the learnt row, else 0."""
    rows = [TokenizedRow(name, (1, 1, 1), (False, True, True), {"keep": keep}) for name, keep in (("a", 1), ("b", 0))]
    losses = Static().loss(Tilted(), collate(rows, PAD))
    assert torch.allclose(losses, torch.tensor([[math.log(2.0)] * 2, [0.0, 0.0]]))


@pytest.mark.parametrize("micro", [8, 3, 1])
def test_a_dropped_row_teaches_nothing(micro):
    """Every other row is learnt: the gradient of those rows alone, times their share of the answer tokens."""
    rows = [dataclasses.replace(row, columns={"keep": i % 2}) for i, row in enumerate(random_rows(8, 1))]
    learnt = rows[1::2]
    share = sum(sum(row.answer) for row in learnt) / sum(sum(row.answer) for row in rows)
    actual = Oracle(adapted(), {"task": Stream("task", rows, 8, micro, 0, PAD)}, seed=0, loss=Static().loss).task()
    truth = Oracle(adapted(), {"task": Stream("task", learnt, 8, micro, 0, PAD)}, seed=0, loss=nll).task()
    assert_same(actual, share * truth)


@pytest.mark.parametrize(("learnt", "words"), [(1, ""), (0, "took nothing of any row")])
def test_a_step_of_dropped_rows_is_no_fault_but_a_run_of_them_is(learnt, words, tmp_path):
    """Two rows a step, those of the first step dropped: the run goes on. Where all are, it stops."""
    rows = random_rows(8, 1)
    stream = Stream("task", rows, 2, 2, 0, PAD)
    first = {row.id for row in stream.rows_at(0)}
    dropped = [dataclasses.replace(row, columns={"keep": int(row.id not in first) * learnt}) for row in rows]
    args = training_arguments({"per_device_train_batch_size": 2, "max_steps": 3}, tmp_path)
    host = OracleTrainer(
        adapted(), args, Composition.of(["static"]), {"task": dataclasses.replace(stream, rows=dropped)}
    )
    with pytest.raises(DefenceError, match=words) if words else contextlib.nullcontext():
        host.train()
    assert [loss == 0 for _, loss in host.curve] == [True, *[not learnt] * 2]


def test_it_is_star_dss_with_whole_row_scores_and_no_pull():
    rows = [
        dataclasses.replace(row, columns={"keep": i % 2, "star": float(i % 2)})
        for i, row in enumerate(random_rows(8, 1))
    ]
    streams = {"task": Stream("task", rows, 8, 4, 0, PAD)}
    actual, truth = (
        Oracle(adapted(0.1), streams, seed=0, loss=method.loss).task() for method in (Static(), StarDss(kl=0.0))
    )
    assert_same(actual, truth)
