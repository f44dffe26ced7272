"""How safe, how useful, how sure: suites ask a model, judges say what its answers are."""

from safebasin.registry import Registry

suite = Registry("measure")
judge = Registry("judge", "safebasin.measure.judges")
