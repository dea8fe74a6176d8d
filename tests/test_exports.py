"""What is written where a set is exported to a store; the forms themselves are tested in test_distilled.py."""

import threading
import time
from types import SimpleNamespace

import pytest

from teddy_ray.exports import UPLOADS, _upload


@pytest.mark.parametrize("num", [1, 2, 200])
def test_few_files_are_in_memory_at_once_and_the_last_is_written_last(num):
    lock, written, held, most = threading.Lock(), [], 0, 0

    def files():
        nonlocal held, most
        for index in range(num):
            with lock:
                held += 1
                most = max(most, held)
            yield f"{index}", b""

    def write(name, data):
        nonlocal held
        time.sleep(0.001)
        with lock:
            written.append(name)
            held -= 1

    _upload(SimpleNamespace(write=write), files())
    assert sorted(written, key=int) == [str(index) for index in range(num)]
    assert written[-1] == str(num - 1)
    assert most <= 2 * UPLOADS + 1


def test_a_write_that_fails_ends_the_export_before_the_last_file():
    written = []

    def write(name, data):
        if name == "1":
            raise OSError("full")
        written.append(name)

    with pytest.raises(OSError, match="full"):
        _upload(SimpleNamespace(write=write), iter([(str(index), b"") for index in range(4)]))
    assert "3" not in written
