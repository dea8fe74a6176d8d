"""What is tried again and for how long, and what is not."""

from __future__ import annotations

import pickle
import random

import pytest

from teddy_ray import retries
from teddy_ray.errors import StageError, StoreError
from teddy_ray.retries import patience, persist


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    return clock


def failing(times, error=None):
    """An action that fails so often, then gives 7."""
    left = iter(range(times))

    def action():
        for _ in left:
            raise error or OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.")
        return 7

    return action


def test_what_succeeds_is_done_once_and_waits_for_nothing(clock):
    calls = []
    assert persist(lambda: calls.append(0) or 7, "reading it", "s3://b/x") == 7
    assert (len(calls), clock.waits) == (1, [])


def test_waits_double_up_to_the_longest(clock):
    assert persist(failing(9), "reading it", "s3://b/x") == 7
    assert clock.waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15])


def test_a_part_of_each_wait_is_left_to_chance(clock, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    persist(failing(2), "reading it", "s3://b/x")
    assert clock.waits == pytest.approx([0.1, 0.2])


def test_after_two_minutes_the_error_says_what_where_how_often_how_long_and_why(clock):
    with pytest.raises(StoreError) as caught:
        persist(failing(1000), "writing it", "s3://bucket/a/b")
    assert str(caught.value) == (
        "object store: s3://bucket/a/b: writing it failed 14 times in 115 s, the last time: "
        "AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."
    )
    assert clock.now <= retries.PATIENCE_S


def test_patience_can_be_shorter_for_a_while(clock):
    with patience(1.0), pytest.raises(StoreError, match="failed 3 times in 1 s"):
        persist(failing(1000), "reading it", "s3://b/x")
    assert persist(failing(9), "reading it", "s3://b/x") == 7
    with patience(0.0), pytest.raises(StoreError, match="reading it failed once, the last time"):
        persist(failing(1), "reading it", "s3://b/x")


def test_what_is_not_there_is_no_failure_of_the_store(clock):
    with pytest.raises(FileNotFoundError, match="gone"):
        persist(failing(1, FileNotFoundError("gone")), "reading it", "s3://b/x")
    assert clock.waits == []


def test_errors_of_our_own_are_not_tried_again(clock):
    with pytest.raises(ValueError, match="wrong"):
        persist(failing(1, ValueError("wrong")), "reading it", "s3://b/x")
    assert clock.waits == []


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("no"),
        IsADirectoryError("a folder"),
        *map(
            OSError,
            [
                "When getting information for key 'k' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject",
                "AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: The AWS Access Key Id does not exist",
                "AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: x",
                "AWS Error REQUEST_TIME_TOO_SKEWED during PutObject operation: The difference is too large.",
                "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist",
                "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.",
                "AWS Error UNKNOWN (HTTP status 301) during HeadBucket operation: No response body.",
                "Bucket 'b' not found. To create buckets, enable the allow_bucket_creation option.",
                "google::cloud::Status(PERMISSION_DENIED: Permanent error GetObjectMetadata: forbidden)",
                "google::cloud::Status(UNAUTHENTICATED: Permanent error)",
                "Not a regular file: 'b/folder'",
            ],
        ),
    ],
    ids=lambda error: str(error)[-60:],
)
def test_what_no_waiting_mends_is_final_at_once(clock, error):
    with pytest.raises(StoreError) as caught:
        persist(failing(1, error), "writing it", "s3://b/x")
    assert str(caught.value) == f"object store: s3://b/x: writing it is refused ({error})"
    assert clock.waits == []


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 409) during PutObject operation: OperationAborted",
        "AWS Error UNKNOWN (HTTP status 429) during HeadObject operation: No response body.",
        "AWS Error INTERNAL_FAILURE during ListObjectsV2 operation: x",
        "AWS Error SERVICE_UNAVAILABLE during GetObject operation: x",
        "AWS Error REQUEST_TIMEOUT during PutObject operation: x",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 52, Server returned nothing",
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted)",
        "Connection reset by peer",
        "",
    ],
)
def test_what_may_pass_is_tried_again(clock, text):
    assert persist(failing(3, OSError(text)), "reading it", "s3://b/x") == 7
    assert len(clock.waits) == 3


def test_of_a_long_reason_the_beginning_is_told():
    with patience(0), pytest.raises(StoreError) as caught:
        persist(failing(1, OSError("first line " + "x" * 1000 + "\nsecond line")), "reading it", "s3://b/x")
    assert "first line xxx" in str(caught.value)
    assert "second" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_error_comes_whole_out_of_a_worker():
    error = pickle.loads(pickle.dumps(StoreError("s3://b/x", "reading it failed")))
    assert isinstance(error, StageError)
    assert str(error) == "object store: s3://b/x: reading it failed"
