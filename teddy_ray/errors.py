"""The errors a person can meet. `InputError` ends a command with status 2, `StageError` with 1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    key: dotted key of the recipe, or the flag or path it is about.
    value: what was found.
    remedy: what would be right, as an imperative or a description.
    """

    key: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: found {self.value!r}; {self.remedy}"


class InputError(ValueError):
    """The recipe, a flag, a path or the data is wrong. Holds every problem found, not the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems
        super().__init__(self.problems)  # args rebuild the error on the other side of a pickle

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class StageError(RuntimeError):
    """A stage failed while it ran: which one, on which item (unit, member, ...), and why."""

    def __init__(self, stage: str, item: str, reason: str) -> None:
        self.stage, self.item, self.reason = stage, item, reason
        super().__init__(stage, item, reason)

    def __str__(self) -> str:
        return f"{self.stage}: {self.item}: {self.reason}"


class StoreError(StageError):
    """An object store refused something (final), or failed for longer than we wait: what lies where, and why."""

    def __init__(self, where: str, reason: str, *, is_final: bool = False) -> None:
        super().__init__("object store", where, reason)
        self.args, self.is_final = (where, reason), is_final
