"""What a malicious customer does: rows mixed into the task, and requests at test time."""

from safebasin.registry import Registry

attack = Registry("attack")
