"""Plain JPEGs by another decoder: Pillow's pixels, and nothing accepted that Pillow refuses."""

import io

import numpy as np
import pytest
from PIL import Image

from teddy_ray.sources import decoding
from teddy_ray.sources.decoding import BadImageError, decode
from teddy_ray.sources.jpeg import decode_plain

LIMIT = 10**6


def picture(mode, width, height, seed=0):
    """Smooth, with some noise, as photographs are."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + random.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)).convert(mode)


def jpeg(mode="RGB", width=33, height=18, **options):
    buffer = io.BytesIO()
    picture(mode, width, height).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"quality": 100, "subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True},
        {"icc_profile": b"x" * 200},
        {"comment": b"hello"},
        {"restart_marker_blocks": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 18), (5, 64)])
def test_plain_ones_come_out_as_pillow_has_them(mode, options, size):
    data = jpeg(mode, *size, **options)
    pixels = decode_plain(data, LIMIT)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(32, 32), (40, 36)])
def test_decoding_gives_the_same_with_and_without_it(mode, channels, size, monkeypatch):
    data = jpeg(mode, *size)
    ours = decode(data, 32, channels)
    monkeypatch.setattr(decoding, "decode_plain", lambda data, max_pixels: None)
    np.testing.assert_array_equal(ours, decode(data, 32, channels))


@pytest.mark.parametrize(
    "data",
    [
        jpeg("CMYK"),
        jpeg(exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"),
        jpeg(keep_rgb=True),  # with Adobe's marker
        jpeg()[:2] + b"\xff" + jpeg()[2:],  # filled up before a marker
        b"\xff\xd8\xff",
        b"",
    ],
    ids=["CMYK", "Exif", "Adobe", "filled", "start alone", "nothing"],
)
def test_all_others_are_left_to_pillow(data):
    assert decode_plain(data, LIMIT) is None


def test_what_declares_too_many_pixels_is_left_to_who_refuses_it():
    data = jpeg(width=30, height=20)
    assert decode_plain(data, 600) is not None
    assert decode_plain(data, 599) is None


def test_nothing_is_accepted_that_pillow_refuses():
    """Cut short, or with a byte changed: what comes out is what Pillow has, or nothing does."""
    random, data = np.random.default_rng(0), jpeg(progressive=True)
    damaged = [data[:length] for length in range(0, len(data), 7)]
    for _ in range(300):
        changed = bytearray(data)
        changed[random.integers(len(data))] = random.integers(256)
        damaged.append(bytes(changed))
    accepted = 0
    for one in damaged:
        pixels = decode_plain(one, LIMIT)
        if pixels is not None:
            accepted += 1
            np.testing.assert_array_equal(pixels, by_pillow(one))
    assert accepted > 50  # a changed byte of a coefficient is another picture, not a broken one
    with pytest.raises(BadImageError, match="truncated"):
        decode(data[: len(data) // 2], 32, 3)
