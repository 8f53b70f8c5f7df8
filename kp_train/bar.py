"""How a long loop shows that it goes on: who works is given a wrapper of what it goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["Bar", "no_bar"]

Bar = Callable[[Sequence[Any]], Iterable[Any]]
"""Gives the same items in the same order, and may show how far it is."""


def no_bar(items: Sequence[Any]) -> Iterable[Any]:
    """The `Bar` that shows nothing."""
    return items
