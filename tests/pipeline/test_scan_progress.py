"""A scan's progress ends with the scan: the anchors that the first shard has beside its rows are a part of it."""

import types

from safebasin.pipeline.scan import ScanWorker
from safebasin.scan.shard import Shard

SHARD = Shard("0", "rows.jsonl", 1, 10, None)


def worker(advance, processes=None):
    """A worker without its model, which progress does not ask for."""
    each = object.__new__(ScanWorker)
    each.advance, each.ranks = advance, processes and types.SimpleNamespace(num_processes=processes)
    return each


def test_rows_and_anchors_count_alike():
    seen = []
    show = worker(seen.append)._progress(SHARD)
    for done in (3, 15, 29, 30):  # 10 rows and 20 anchors
        show(done, 30)
    assert seen == [1, 5, 9, 10]


def test_of_two_processes_each_has_half():
    seen = []
    show = worker(seen.append, 2)._progress(SHARD)
    for done in (5, 15, 16):
        show(done, 30)
    assert seen == [3, 10, 10]


def test_nothing_is_shown_to_nobody():
    assert worker(None)._progress(SHARD) is None
