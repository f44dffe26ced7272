"""What this weight should have been: edits of a tuned model, weight by weight."""

from safebasin.registry import Registry

edit = Registry("repair")
