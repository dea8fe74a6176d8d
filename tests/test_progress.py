import io
from types import SimpleNamespace

import pytest

from teddy_ray import progress
from teddy_ray.progress import Progress, duration
from teddy_ray.stages import board
from teddy_ray.stages.board import Post, Poster, summarise


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


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_time_left_counts_from_the_first_work_done_not_from_the_start_of_workers(clock, monkeypatch, stream):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    shown = []
    with Progress(stream).stage("synthesis", 4, "units") as bar:
        for now, done in [(160.0, 0.0), (200.0, 0.25), (210.0, 0.5), (210.5, 0.125), (220.0, 2.25), (3820.0, 2.3)]:
            clock.now = now
            bar.update(done, "note")
            shown.append(stream.getvalue().splitlines()[-1].split("\r")[-1])
    left = [line.split("about ")[1] if "about " in line else "" for line in shown]
    assert left == ["", "", "2:20 left, note", "", "18 s left, note", "50:02 left, note"]


def test_the_time_left_is_told_by_the_items_that_tell_it(clock, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    stream = io.StringIO()
    with Progress(stream).stage("sweep", 8, "trials") as bar:
        for now, done, paced in [(200.0, 1.5, 0), (700.0, 2.5, 1), (710.0, 3.5, 1), (800.0, 4.0, 3)]:
            clock.now = now
            bar.update(done, paced=paced)
    lines = stream.getvalue().splitlines()
    assert ["about" in line for line in lines] == [False, False, False, False, True]
    assert lines[-1].endswith("about 3:20 left")  # two in 100 s, four to go


def test_durations_are_short():
    seconds = [0.4, 59.4, 59.6, 61, 3599, 3600, 7384, 360_000]
    assert list(map(duration, seconds)) == ["0 s", "59 s", "1:00", "1:01", "59:59", "1:00:00", "2:03:04", "100:00:00"]


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


def test_measures_of_all_running_items_make_one_note():
    posts = {
        "a": Post(0.25, "", {"images_steps_per_s": 500.2, "statistics": 12.0, "cross_entropy": 0.4}),
        "b": Post(0.5, "", {"images_steps_per_s": 312.1, "statistics": 12.6, "cross_entropy": 0.502}),
        "c": Post(0.125, "loading", {}),
    }
    assert summarise(posts) == (0.875, "812 images·steps/s, statistics 12.3, cross-entropy 0.451")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.01234, "0.0123"), (99.94, "99.9"), (99.96, "100"), (12345.6, "12,346")]
)
def test_measures_have_three_digits_or_all_of_an_integer(value, text):
    assert summarise({"a": Post(0.5, "", {"loss": value})}) == (0.5, f"loss {text}")


def test_without_measures_the_latest_note_is_shown():
    posts = {"a": Post(0.25, "epoch 1", {}), "b": Post(0.5, "epoch 2", {}), "c": Post(0.0, "", {})}
    assert summarise(posts) == (0.75, "b: epoch 2")
    assert summarise({}) == (0, "")


def test_a_worker_posts_once_per_interval(monkeypatch):
    clock, posted = SimpleNamespace(now=100.0), []
    monkeypatch.setattr(board, "time", SimpleNamespace(monotonic=lambda: clock.now))
    poster = Poster(SimpleNamespace(post=SimpleNamespace(remote=lambda *post: posted.append(post))), "synthesis")
    for _ in range(5):
        poster("a", 0.5, loss=clock.now)
        clock.now += board.MIN_INTERVAL_S / 2
    assert posted == [("synthesis", "a", Post(0.5, "", {"loss": now})) for now in (100.0, 101.0, 102.0)]


def test_the_board_keeps_only_what_runs():
    posts = board._Posts()
    for index in range(1000):
        posts.post("synthesis", f"item {index}", Post(0.5, "half", {}))
    assert posts.read("synthesis", ["item 1", "item 2", "item -1"]) == (1.0, "item 2: half")
    assert len(posts._posts) == 2
    posts.post("synthesis", "item 1", Post(0.75, "more", {}))
    assert posts.read("synthesis", ["item 1", "item 2"]) == (1.25, "item 1: more")
