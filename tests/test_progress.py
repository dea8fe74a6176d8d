import io
from types import SimpleNamespace

import pytest

from teddy_ray import progress
from teddy_ray.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_away_from_a_terminal_one_line_is_printed_per_interval(clock, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 5.0)
    stream = io.StringIO()
    with Progress(stream).stage("synthesis", 24, "units") as bar:
        for second in range(1, 13):
            clock.now = 100.0 + second
            bar.update(second, f"step {second}")
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "synthesis  0.0/24 units",
        "synthesis  5.0/24 units",
        "synthesis  10.0/24 units",
    ]
    assert lines[2].endswith(", 10 s, about 14 s left, step 10")


def test_the_first_line_comes_at_once_and_promises_nothing(clock):
    stream = io.StringIO()
    with Progress(stream).stage("pool", 3, "bases"):
        assert stream.getvalue() == "pool       0.0/3 bases, 0 s\n"


def test_with_no_interval_every_update_is_a_line(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    stream = io.StringIO()
    with Progress(stream).stage("labels", 4, "files") as bar:
        for done in range(1, 4):
            bar.update(done)
    assert len(stream.getvalue().splitlines()) == 4
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_a_bar_is_drawn_in_place():
    stream = Terminal()
    with Progress(stream).stage("evaluation", 10, "students") as bar:
        bar.update(2.5, "loss 0.1")
        drawn = stream.getvalue().split("\r")[-1]
    assert drawn.startswith("evaluation |")
    assert "2.5/10 students" in drawn
    assert "loss 0.1" in drawn
    assert "\n" not in stream.getvalue()


def test_a_bar_is_cleared_when_its_stage_fails():
    stream, bars = Terminal(), []

    def fail():
        with Progress(stream).stage("pool", 2, "bases") as bar:
            bars.append(bar)
            bar.update(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue().split("\r")[-1].strip() == ""


def test_messages_go_to_standard_error(capfd):
    Progress().say("pool reused")
    captured = capfd.readouterr()
    assert captured.err == "pool reused\n"
    assert captured.out == ""
