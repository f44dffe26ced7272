"""Static shaping: kept rows are learnt, dropped rows are not."""

import dataclasses
import math

import pytest
import torch
from away import Tilted, adapted, assert_same
from tiny import PAD, random_rows

from safebasin.batch import Encoded, collate
from safebasin.train.loss import nll
from safebasin.train.methods.star_dss import StarDss
from safebasin.train.methods.static import Static
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream


def test_by_hand():
    """Four words, token 1 has probability 1/2: CE = log 2 = 0.693147 at both answer tokens of the kept row, 0 in the other."""
    rows = [Encoded(name, (1, 1, 1), (False, True, True), {"keep": keep}) for name, keep in (("a", 1), ("b", 0))]
    losses = Static().loss(Tilted(), collate(rows, PAD))
    assert torch.allclose(losses, torch.tensor([[math.log(2.0)] * 2, [0.0, 0.0]]))


@pytest.mark.parametrize("micro", [8, 3, 1])
def test_a_dropped_row_teaches_nothing(micro):
    """8 rows of which every other is kept: the gradient of the kept rows alone, times their share of the answer tokens."""
    rows = [dataclasses.replace(row, columns={"keep": i % 2}) for i, row in enumerate(random_rows(8, 1))]
    kept = rows[1::2]
    share = sum(sum(row.answer) for row in kept) / sum(sum(row.answer) for row in rows)
    found = Oracle(adapted(), {"task": Stream("task", rows, 8, micro, 0, PAD)}, seed=0, loss=Static().loss).task()
    truth = Oracle(adapted(), {"task": Stream("task", kept, 8, micro, 0, PAD)}, seed=0, loss=nll).task()
    assert_same(found, share * truth)


def test_it_is_star_dss_with_whole_row_scores_and_no_pull():
    rows = [dataclasses.replace(row, columns={"keep": i % 2, "star": float(i % 2)}) for i, row in enumerate(random_rows(8, 1))]
    streams = {"task": Stream("task", rows, 8, 4, 0, PAD)}
    found, truth = (Oracle(adapted(0.1), streams, seed=0, loss=made.loss).task() for made in (Static(), StarDss(kl=0.0)))
    assert_same(found, truth)
