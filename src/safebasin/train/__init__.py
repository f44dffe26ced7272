"""Which way to go: training methods on the gradient oracle."""

from safebasin.registry import Registry

method = Registry("train")
