"""Images for training loops."""

import itertools
import threading
import time

import numpy as np
import pytest
from pictures import make_folder, source, write_parquet

from teddy_ray.errors import InputError
from teddy_ray.sources import images as module
from teddy_ray.sources.loader import Loader

INDICES = [np.array([3, 1, 4, 1]), np.array([5]), np.array([9, 2, 6]), np.array([], dtype=int)]


@pytest.fixture(params=["folder", "parquet"])
def images(request, tmp_path):
    if request.param == "folder":
        return source(make_folder(tmp_path / "folder")).train
    write_parquet(tmp_path / "a.parquet", ["a", "b"] * 20, row_group_size=3)
    return source(tmp_path).train


def num_bytes(images):
    return len(images) * 8 * 8


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images decoded."""
    count, decode = itertools.count(), module.decode
    monkeypatch.setattr(module, "decode", lambda *args: (next(count), decode(*args))[1])
    return lambda: next(count)


@pytest.mark.parametrize("keeps", [True, False])
def test_kept_or_not_the_pixels_are_the_same(images, keeps, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    expected = images.read()
    with Loader(images, num_bytes(images) - (not keeps), num_threads=3) as loader:
        assert loader.keeps == keeps
        for index in INDICES:
            np.testing.assert_array_equal(loader.read(index), expected[index])
        for index, pixels in zip(INDICES, loader.ahead(INDICES), strict=True):
            np.testing.assert_array_equal(pixels, expected[index])
        assert loader.num_decoded == (len(images) if keeps else 2 * sum(map(len, INDICES)))


def test_a_set_that_fits_is_decoded_once_and_another_as_often_as_it_is_read(images, decoded):
    with Loader(images, num_bytes(images), 2) as loader:
        loader.read(INDICES[0])
        loader.read(INDICES[2])
    assert decoded() == len(images)
    with Loader(images, num_bytes(images) - 1, 2) as loader:
        loader.read(INDICES[0])
        loader.read(INDICES[2])
    assert decoded() == len(images) + 1 + 7


def test_several_threads_decode_a_set_that_fits_once(images, decoded):
    with Loader(images, num_bytes(images), 2) as loader:
        threads = [threading.Thread(target=loader.read, args=(INDICES[0],)) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert decoded() == len(images)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_are_decoded_ahead_by_as_many_as_there_are_threads(images, num_threads, monkeypatch):
    started, read = [], type(images).read
    monkeypatch.setattr(
        type(images), "read", lambda self, index, threads=None: (started.append(int(index[0])), read(self, index))[1]
    )
    with Loader(images, 0, num_threads) as loader:
        batches = loader.ahead([np.array([i]) for i in range(8)])
        next(batches)
        deadline = time.monotonic() + 10
        while len(started) <= num_threads and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(started) == list(range(num_threads + 1))
        assert len(list(batches)) == 7
        assert loader.num_decoded == 8


@pytest.mark.parametrize("max_bytes", [0, 10**9])
def test_a_caller_that_stops_early_leaves_no_thread(images, max_bytes):
    before = threading.active_count()
    with Loader(images, max_bytes, 2) as loader:
        batches = loader.ahead(itertools.cycle(INDICES[:3]))
        next(batches)
        batches.close()
    assert threading.active_count() == before


def test_an_error_comes_where_its_batch_would_have(tmp_path):
    images = source(make_folder(tmp_path / "folder")).train
    broken = images.ids[2]
    (tmp_path / "folder" / broken).write_bytes(b"")
    before = threading.active_count()
    with Loader(images, 0, 2) as loader:
        batches = loader.ahead([np.array([0]), np.array([1]), np.array([2]), np.array([3])])
        assert [len(next(batches)) for _ in range(2)] == [1, 1]
        with pytest.raises(InputError, match=broken):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)
    assert threading.active_count() == before


def test_an_error_of_the_indices_is_the_callers(images):
    def indices():
        yield np.array([0])
        raise KeyError("mine")

    with Loader(images, 10**9, 1) as loader, pytest.raises(KeyError, match="mine"):
        list(loader.ahead(indices()))
