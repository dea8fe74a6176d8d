"""Patience with object stores: what fails for a moment is tried again, what fails for good is named."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from teddy_ray.errors import StoreError

PATIENCE_S = 120.0
"""A store that restarts, moves or slows its callers down is back within a minute or two."""
FIRST_WAIT_S = 0.2
"""Before the second attempt; doubled from one to the next. The stores' own libraries have tried again by then."""
LONGEST_WAIT_S = 15.0
JITTER = 0.5
"""Share of a wait that is left to chance: workers that failed together must not come back together."""
LONGEST_REASON = 300
"""Characters; a client of GCS says much."""

FINAL_TYPES = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
FINAL = re.compile(
    r"""
    AWS\ Error\ (?:
        ACCESS_DENIED | INVALID_ACCESS_KEY_ID | INVALID_CLIENT_TOKEN_ID | UNRECOGNIZED_CLIENT | OPT_IN_REQUIRED
        | \w*SIGNATURE\w* | MISSING_AUTHENTICATION_TOKEN | MISSING_PARAMETER | VALIDATION | INVALID_\w+
        | REQUEST_TIME_TOO_SKEWED
        | NO_SUCH_BUCKET | RESOURCE_NOT_FOUND | METHOD_NOT_ALLOWED | BUCKET_\w+ | OBJECT_NOT_IN_ACTIVE_TIER
    )\b
    | AWS\ Error\ UNKNOWN\ \(HTTP\ status\ (?!408|409|429)[34]\d\d\)
    | google::cloud::Status\((?:
        PERMISSION_DENIED | UNAUTHENTICATED | NOT_FOUND | FAILED_PRECONDITION | INVALID_ARGUMENT
    )\b
    | Bucket\ '.*'\ not\ found
    | Not\ a\ regular\ file | (?:Not|Is)\ a\ directory
    """,
    re.VERBOSE,
)
"""How Arrow spells, of S3 and GCS, what no waiting mends. A redirection (3xx) is to the region that was not named."""

T = TypeVar("T")
_patience_s: ContextVar[float] = ContextVar("patience_s", default=PATIENCE_S)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Another patience than PATIENCE_S, for what this thread asks of stores meanwhile."""
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


def persist(action: Callable[[], T], doing: str, where: str) -> T:
    """The result of an action on a store, tried again while it may yet succeed.

    doing, where: for errors, such as "reading" and the URI. Raises FileNotFoundError as it comes, and StoreError of all
    else that is final, or lasts longer than our patience.
    """
    started = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:LONGEST_REASON]
            if isinstance(error, FINAL_TYPES) or FINAL.search(str(error)):
                raise StoreError(where, f"{doing} is refused ({reason})", is_final=True) from None
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) * random.uniform(1 - JITTER, 1)  # noqa: S311
            spent_s = time.monotonic() - started
            if spent_s + wait_s > _patience_s.get():
                tries = f"{attempt} times in {spent_s:.0f} s" if attempt > 1 else "once"
                raise StoreError(where, f"{doing} failed {tries}, the last time: {reason}") from None
        time.sleep(wait_s)
    raise AssertionError
