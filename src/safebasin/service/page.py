"""The operator's pages."""

from typing import Any


def add_pages(app: Any, store: Any, storage: Any, settings: Any, supervisor: Any) -> None:
    """Later."""
