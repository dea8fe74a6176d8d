"""Keeps known lines of Ray's core, which nobody can act on, off the driver's terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray._private.worker

RESTARTABLE_ACTOR = b"github.com/ray-project/ray/issues/53727"
"""In the line that every actor pool of Ray Data sets off: its arguments lie in the object store by design."""


@contextlib.contextmanager
def without_lines(mark: bytes) -> Iterator[None]:
    """Drop the lines that hold `mark` from this process's standard error; pass all others on.

    Works on the file descriptor, for Ray's core does not write through Python.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)

    def forward() -> None:
        with open(reader, "rb") as lines, open(saved, "wb") as stderr:
            for line in lines:
                if mark not in line:
                    stderr.write(line)
                    stderr.flush()

    thread = threading.Thread(target=forward, name="stderr-filter", daemon=True)
    restore = os.dup(saved)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(restore, 2)  # closes the pipe's last writer, which ends the thread
        os.close(restore)
        thread.join(timeout=5)  # a child process may have inherited the pipe


def without_raylets() -> None:
    """Keep the last lines of a lost node's log, which Ray prints on the driver's standard output, out of a result."""
    show = ray._private.worker.print_to_stdstream
    if getattr(show, "drops_raylets", False):
        return

    def filtered(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") == "raylet":
            logging.getLogger(__name__).info("%s", "\n".join(data["lines"]))
        else:
            show(data, ignore_prefix)

    filtered.drops_raylets = True  # type: ignore[attr-defined]
    ray._private.worker.print_to_stdstream = filtered
