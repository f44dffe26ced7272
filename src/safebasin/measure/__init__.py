"""How safe, how useful, how sure: suites of prompts, judged."""

from safebasin.registry import Registry

suite = Registry("measure")
