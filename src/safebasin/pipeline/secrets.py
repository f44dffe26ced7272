"""Secrets that a recipe must not hold."""

import re
from collections.abc import Mapping
from typing import Any

from safebasin.errors import UserError

SECRET = re.compile(
    r"(?i)://[^/\s:@]+:[^/\s@]+@|[?&](?:api_?key|token|key|secret|password|sig|signature)=[^&\s]+|\bhf_\w{20,}|\bsk-\w{16,}"
)


def refuse_secrets(value: Any, where: str = "") -> None:
    """UserError where a recipe holds a password, a token or a key: run.yaml and the report would show it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_secrets(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            refuse_secrets(inner, f"{where}.{i}")
    elif isinstance(value, str) and SECRET.search(value):
        raise UserError(
            f"{where}: it holds a secret, and the run folder would show it; leave it to the environment or to a login"
        )
