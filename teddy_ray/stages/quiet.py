"""Keeps known lines of Ray's core, which nobody can act on, off the driver's standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

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
