"""How bad is this row: scorers of rows, high = harmful."""

from safebasin.registry import Registry

scorer = Registry("scan")
