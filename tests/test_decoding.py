"""Images decoded ahead: each once, in order, few at a time, with a view of their own."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from teddy_ray.decoding import Decoder
from teddy_ray.errors import InputError
from teddy_ray.recipe import Augmentation
from teddy_ray.sources import Images

NUM = 57


class Reads:
    """Reads rows as images of their own number, and notes which."""

    def __init__(self):
        self.rows, self._lock = [], threading.Lock()

    def __call__(self, row):
        with self._lock:
            self.rows.append(row)
        if row == 1000:
            raise OSError("truncated")
        return Image.fromarray(np.full((4, 4), row, dtype=np.uint8))


@pytest.fixture
def images():
    return Images(
        ids=[f"image {row}" for row in range(NUM)],
        labels=np.arange(NUM) % 3,
        rows=np.arange(NUM),
        classes=("a", "b", "c"),
        content="",
        image_size=4,
        channels=1,
        read_row=Reads(),
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [range(0, NUM), range(10, 31), range(56, 57)], ids=str)
def test_each_image_is_decoded_once_and_comes_in_order(rows, threads, images):
    decoder = Decoder(images)
    batches = list(decoder.batches(rows, 10, threads))
    assert [row for batch in batches for row in batch.rows] == list(rows)
    assert all(len(batch.rows) == len(batch.pixels) <= 10 for batch in batches)
    assert np.array_equal(np.concatenate([batch.pixels for batch in batches])[:, 0, 0, 0], list(rows))
    assert sorted(images.read_row.rows) == list(rows)
    assert decoder.num_decoded == len(rows)
    assert all(batch.boxes is None for batch in batches)


@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_runs_ahead_by_a_few_batches_and_no_more(threads, images):
    stream = Decoder(images).batches(range(NUM), 4, threads)
    next(stream)
    deadline = time.monotonic() + 10
    while len(images.read_row.rows) < 4 * (threads + 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(images.read_row.rows) == 4 * (threads + 1)
    stream.close()
    assert len(images.read_row.rows) == 4 * (threads + 1)


def test_view_of_an_image_depends_on_its_id_and_the_key_alone(images):
    def boxes(of, key=("statistics", 0), batch_size=10):
        decoder = Decoder(of, key, Augmentation())
        return np.concatenate([batch.boxes for batch in decoder.batches(range(len(of)), batch_size, 1)])

    whole = boxes(images)
    assert len({row.tobytes() for row in whole}) == NUM
    some = np.array([50, 3, 17])
    assert np.array_equal(boxes(images.select(some), batch_size=2), whole[some])
    assert not np.isclose(boxes(images, ("statistics", 1))[:, :4], whole[:, :4]).all(1).any()


def test_an_image_that_cannot_be_decoded_is_named(images):
    rows = images.rows.copy()
    rows[20] = 1000
    with pytest.raises(InputError, match=r"'image 20'; this image cannot be decoded \(truncated\)"):
        list(Decoder(replace(images, rows=rows)).batches(range(NUM), 8, 2))
