"""SafeInstr is plain tuning on the mix."""

import dataclasses

import pytest
from away import Plane, adapted, assert_same, constant
from tiny import PAD, random_rows

from safebasin.errors import UserError
from safebasin.train import method
from safebasin.train.compose import Composition
from safebasin.train.methods.safe_instr import SafeInstr
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream


def test_by_hand():
    """share = 1/4: 3/4 (4, 0) + 1/4 (0, 8) = (3, 2)."""
    direction = SafeInstr(share=0.25).direction(Plane({"task": constant(4.0, 0.0), "align": constant(0.0, 8.0)}))
    assert direction["w"].tolist() == [3.0, 2.0]


def test_at_the_share_of_the_tokens_it_is_sft_on_the_mix():
    """Task and safety rows in one stream under sft, against two streams and share = their part of the answer tokens."""
    task, safe = random_rows(9, 1), [dataclasses.replace(row, id=f"safe{row.id}") for row in random_rows(4, 2)]
    mix = Oracle(adapted(0.1), {"task": Stream("task", [*task, *safe], 13, 5, 0, PAD)}, seed=0)
    truth = Composition.of(["sft"]).direction(mix)
    tokens = [sum(sum(row.answer) for row in rows) for rows in (task, safe)]
    two = Oracle(
        adapted(0.1), {"task": Stream("task", task, 9, 4, 0, PAD), "align": Stream("align", safe, 4, 3, 0, PAD)}, seed=0
    )
    assert_same(SafeInstr(share=tokens[1] / sum(tokens)).direction(two), truth)
    assert (
        SafeInstr(share=4 / 13).direction(two) - truth
    ).norm() > 1e-3 * truth.norm()  # the share of the rows is another one


def test_at_share_0_it_is_sft():
    streams = {
        "task": Stream("task", random_rows(8, 1), 8, 4, 0, PAD),
        "align": Stream("align", random_rows(4, 2), 4, 4, 0, PAD),
    }
    grad = Oracle(adapted(0.1), streams, seed=0)
    direction = SafeInstr(share=0.0).direction(grad)
    assert grad.losses.keys() == {"task"}
    assert_same(direction, Composition.of(["sft"]).direction(grad), 0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="share"):
        method.make({"safe_instr": {"share": share}})
