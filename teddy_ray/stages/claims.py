"""Who does work that several runs need. A run by itself does all of it; trials of a sweep share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

Missing = Callable[[], Sequence[str]]
"""Looks which artifacts are not published yet; gives their fingerprints."""


class Claims(Protocol):
    """Hands out artifacts that are to be made."""

    def turns(self, kind: str, missing: Missing) -> Iterator[Sequence[str]]:
        """Fingerprints of artifacts of a kind that nobody else makes; again until none is missing."""


class Alone:
    """Claims of a run that shares its work with nobody."""

    def turns(self, kind: str, missing: Missing) -> Iterator[Sequence[str]]:
        if fingerprints := missing():
            yield fingerprints
