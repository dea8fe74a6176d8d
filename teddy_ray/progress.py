"""Progress of long work: a bar on a terminal, one line per interval elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from tqdm import tqdm

INTERVAL_S = 10.0


class Bar:
    """Progress of one stage, as a number of items done out of a total."""

    def __init__(self, stage: str, total: int, what: str, stream: TextIO | None, say: Callable[..., None]) -> None:
        """stream: of a terminal, on which the bar is drawn; without one, `say` takes a line per interval."""
        self._stage, self._total, self._what, self._tell = stage, total, what, say
        self._started = self._spoke = time.monotonic()
        self._work_began: tuple[float, float] | None = None  # when, and how much was done by then
        self._bar = None
        if stream is not None:
            layout = "{desc} |{bar}| {n:.1f}/{total} " + what + ", {elapsed}{postfix}"
            self._bar = tqdm(total=total, desc=f"{stage:<10}", bar_format=layout, file=stream, leave=False)
        else:
            self._say(0.0, "")

    def update(self, done: float, note: str = "", *, paced: float | None = None) -> None:
        """done: items finished, running ones counted by their share. paced: of these, those by which the time left is
        told, where shares do not tell it."""
        note = note or ("starting workers" if done == 0 else "")
        paced = done if paced is None else paced
        if paced > 0 and self._work_began is None:
            self._work_began = time.monotonic(), paced
        left = self._time_left(done, paced)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, [left, note])), refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._spoke >= INTERVAL_S:
            self._say(done, note, left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _say(self, done: float, note: str, left: str = "") -> None:
        self._spoke = time.monotonic()
        start = f"{self._stage:<10} {done:.1f}/{self._total} {self._what}"
        elapsed = duration(self._spoke - self._started)
        line = ", ".join(filter(None, [start, elapsed, left, note]))
        self._tell(line, stage=self._stage, done=round(done, 3), total=self._total, note=note)

    def _time_left(self, done: float, paced: float) -> str:
        """At the pace since the first work that tells of it was done: before that, workers started."""
        if self._work_began is None:
            return ""
        since, paced_then = self._work_began
        if paced <= paced_then:
            return ""
        return f"about {duration((time.monotonic() - since) * (self._total - done) / (paced - paced_then))} left"


def duration(seconds: float) -> str:
    """59 s, 1:00, 2:03:04"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}:{m:02}:{s:02}"
    return f"{m}:{s:02}" if m else f"{s} s"


class Progress:
    """What a command tells its user while it works; everything goes to standard error.

    form: text for people, json for what collects logs: an object per line.
    """

    def __init__(self, stream: TextIO | None = None, form: Literal["text", "json"] = "text") -> None:
        self._form = form
        # a descriptor of its own, so that a bar is drawn even while standard error is being filtered
        self._stream = stream or os.fdopen(os.dup(sys.stderr.fileno()), "w")

    def say(self, text: str, **facts: Any) -> None:
        """facts: what a line in JSON holds besides the text and the time."""
        if self._form == "json":
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            text = json.dumps({"time": now, "message": text, **facts}, ensure_ascii=False)
        print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def stage(self, stage: str, total: int, what: str) -> Iterator[Bar]:
        terminal = self._stream if self._form == "text" and self._stream.isatty() else None
        bar = Bar(stage, total, what, terminal, self.say)
        try:
            yield bar
        finally:
            bar.close()
