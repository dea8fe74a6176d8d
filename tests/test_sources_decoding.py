"""Every kind of image, with pixel values computed by hand."""

import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, grey
from PIL import Image, ImageFile

from teddy_ray.sources.decoding import MAX_PIXELS, BadImageError, decode

SIZE = 8
FLAT = (SIZE, SIZE)


def colour_of(data, channels=3):
    """The colour of an image of one colour."""
    pixels = decode(data, SIZE, channels)
    assert pixels.shape == (channels, SIZE, SIZE)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def palette(transparency=None):
    """Every pixel shows the second of two colours."""
    image = Image.new("P", FLAT, 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image, **({} if transparency is None else {"transparency": transparency}))


def sixteen_bits(value, form="PNG"):
    return encoded(Image.fromarray(np.full(FLAT, value, np.uint16)), form)


def jpeg(mode, colour):
    options = {} if mode in ("L", "CMYK") else {"subsampling": 0}
    return encoded(Image.new(mode, FLAT, colour), "JPEG", quality=100, **options)


def without_adobe_marker(data):
    start = data.index(b"\xff\xee\x00\x0eAdobe")
    return data[:start] + data[start + 16 :]


def as_ycck(data):
    """Adobe's marker says by its last byte how the four channels are to be taken: 0 as CMYK, 2 as YCCK."""
    last = data.index(b"\xff\xee\x00\x0eAdobe") + 15
    assert data[last] == 0
    return data[:last] + b"\2" + data[last + 1 :]


def animation(form):
    first, second = Image.new("RGB", FLAT, (10, 20, 30)), Image.new("RGB", FLAT, (250, 0, 0))
    lossless = {"lossless": True} if form == "WEBP" else {}
    return encoded(first, form, save_all=True, append_images=[second], **lossless)


KINDS = {
    # form: bytes, RGB, grey; grey is (299 R + 587 G + 114 B) / 1000
    "1 bit": (encoded(grey(255).convert("1")), [255] * 3, 255),
    "greyscale": (encoded(grey(77)), [77] * 3, 77),
    "16 bits": (sixteen_bits(0x4DFF), [77] * 3, 77),  # its high byte
    "16 bits, TIFF": (sixteen_bits(0x4D01, "TIFF"), [77] * 3, 77),
    "colours": (encoded(Image.new("RGB", FLAT, (200, 100, 50))), [200, 100, 50], 124),  # 124.2
    "palette": (palette(), [200, 100, 50], 124),
    "PPM": (encoded(Image.new("RGB", FLAT, (200, 100, 50)), "PPM"), [200, 100, 50], 124),
    "BMP": (encoded(Image.new("RGB", FLAT, (200, 100, 50)), "BMP"), [200, 100, 50], 124),
    "animated GIF": (animation("GIF"), [10, 20, 30], 18),  # 18.15, of the first frame
    "animated PNG": (animation("PNG"), [10, 20, 30], 18),
    "animated WebP": (animation("WEBP"), [10, 20, 30], 18),
    # R = (1 - C)(1 - K): 255 * (1 - 55/255) * (1 - 51/255) = 160, and so on
    "CMYK, TIFF": (encoded(Image.new("CMYK", FLAT, (55, 105, 155, 51)), "TIFF"), [160, 120, 80], 127),  # 127.4
    # opaque parts of images that may be transparent keep their colour
    "opaque RGBA": (encoded(Image.new("RGBA", FLAT, (200, 100, 50, 255))), [200, 100, 50], 124),
    "opaque palette": (palette(transparency=0), [200, 100, 50], 124),
    # clear parts are white, whatever lies under them
    "clear greyscale": (encoded(Image.new("LA", FLAT, (0, 0))), [255] * 3, 255),
    "clear RGBA": (encoded(Image.new("RGBA", FLAT, (200, 0, 0, 0))), [255] * 3, 255),
    "clear palette": (palette(transparency=1), [255] * 3, 255),
    "clear colour": (encoded(Image.new("RGB", FLAT, (9, 8, 7)), transparency=(9, 8, 7)), [255] * 3, 255),
    "clear grey value": (encoded(grey(9), transparency=9), [255] * 3, 255),
    "clear GIF": (encoded(Image.new("P", FLAT, 1), "GIF", transparency=1), [255] * 3, 255),
    "clear WebP": (encoded(Image.new("RGBA", FLAT, (0, 0, 0, 0)), "WEBP", lossless=True), [255] * 3, 255),
    # in between: colour * a + 255 (1 - a), a = 51/255 = 0.2
    "greyscale and alpha": (encoded(Image.new("LA", FLAT, (100, 51))), [224] * 3, 224),
    "RGBA": (encoded(Image.new("RGBA", FLAT, (200, 100, 50, 51))), [244, 224, 214], 229),  # 228.8
    "palette and alpha": (palette(transparency=bytes([255, 51])), [244, 224, 214], 229),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_image_becomes_these_colours(kind):
    data, rgb, level = KINDS[kind]
    assert colour_of(data) == rgb
    assert colour_of(data, channels=1) == [level]


JPEGS = {
    "greyscale": (jpeg("L", 77), [77] * 3),
    "YCbCr": (jpeg("RGB", (200, 100, 50)), [200, 100, 50]),
    "CMYK of Adobe": (jpeg("CMYK", (55, 105, 155, 51)), [160, 120, 80]),
    "CMYK unmarked": (without_adobe_marker(jpeg("CMYK", (55, 105, 155, 51))), [160, 120, 80]),
    # Stored values are 255 minus Pillow's, so Y, Cb, Cr, K' are 100, 128, 128, 255: R = G = B = 100 of inks, no black.
    "YCCK of Adobe": (as_ycck(jpeg("CMYK", (155, 127, 127, 0))), [155] * 3),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_kind_of_jpeg_becomes_these_colours(kind):
    data, rgb = JPEGS[kind]
    np.testing.assert_allclose(colour_of(data), rgb, atol=1)


def test_a_grey_value_of_16_bits_that_is_clear_is_white():
    values = np.full(FLAT, 0x4D00, np.uint16)
    values[:, 4:] += 1  # the same high byte, and not the clear value
    data = encoded(Image.fromarray(values))
    header, rest = data[:33], data[33:]  # the clear value stands behind the header
    data = header + chunk(b"tRNS", struct.pack(">H", 0x4D00)) + rest
    assert decode(data, SIZE, 1)[0, 0].tolist() == [255] * 4 + [77] * 4


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


STORED = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(FLAT)
TURNED = {  # EXIF's orientation: what is shown of the pixels as stored
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.T,
    6: np.rot90(STORED, -1),
    7: STORED[::-1, ::-1].T,
    8: np.rot90(STORED),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_turned_as_its_exif_says(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(STORED), form, exif=exif, **options)
    np.testing.assert_array_equal(decode(data, SIZE, 1)[0], TURNED[orientation])


def test_a_wide_image_is_turned_before_its_centre_is_taken():
    """24 x 8 as stored, 8 x 24 as shown: its middle third is white."""
    image = grey(0, (24, 8))
    image.paste(255, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert colour_of(encoded(image, exif=exif)) == [255] * 3
    assert colour_of(encoded(image)) == [255] * 3


@pytest.mark.parametrize("size", [(30, 30), (2, 2), (8, 3)])
def test_images_of_other_sizes_are_resized(size):
    assert colour_of(encoded(grey(255, size))) == [255] * 3


def test_resizing_sees_no_colour_that_is_under_clear_pixels():
    """Left half clear black, right half white: all white, with no dark seam."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (32, 0, 64, 64))
    assert colour_of(encoded(image)) == [255] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8), [9] * 3), ((8, 8, 1), [9] * 3), ((8, 8, 3), [9] * 3), ((8, 8, 4), [246] * 3)],  # 255 - 246 * 9 / 255
)
def test_an_array_is_an_image_too(shape, expected):
    np.testing.assert_allclose(colour_of(np.full(shape, 9, np.uint8)), expected, atol=1)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))
BAD = {
    "nothing": (b"", "of none of the formats PNG, JPEG"),
    "text": (b"no image at all", "of none of the formats PNG, JPEG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "of none of the formats PNG, JPEG"),
    "half a PNG": (encoded(NOISE)[:1000], "truncated"),
    "half a JPEG": (encoded(NOISE, "JPEG")[:1000], "truncated"),
    "floats": (encoded(Image.new("F", FLAT, 0.5), "TIFF"), "floating-point numbers; store 8 or 16 bits"),
    "32 bits": (encoded(Image.new("I", FLAT, 70_000), "TIFF"), "neither of 8 nor of 16 bits"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_says_why(kind):
    data, reason = BAD[kind]
    with pytest.raises(BadImageError, match=reason):
        decode(data, SIZE, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow says much of broken TIFF
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_broken_bytes_give_pixels_or_one_error(form):
    """Pillow raises errors of many types for such; none but ours may come out."""
    random, num_bad = np.random.default_rng(0), 0
    whole = encoded(Image.fromarray(STORED).convert("RGB"), form)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        try:
            pixels = decode(bytes(data[: random.integers(len(data) // 2, len(data) + 1)]), SIZE, 3)
        except BadImageError:
            num_bad += 1
        else:
            assert pixels.shape == (3, SIZE, SIZE)
    assert num_bad > 20


def declared(width, height):
    """A PNG of so many pixels, by its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS + 1, 1), (10_000, 10_000), (20_000, 20_000)])
@pytest.mark.parametrize("pillows_bound", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch, width, height, pillows_bound):
    """Beyond Pillow's bounds for a warning and for an error, and where a program has lifted both."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_bound)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImageError, match="more than 89478485 pixels and is refused undecoded"):
        decode(declared(width, height), SIZE, 3)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_named_where_warnings_are_errors():
    with pytest.raises(BadImageError, match="refused undecoded"):
        decode(declared(10_000, 10_000), SIZE, 3)


def test_the_largest_image_is_not_refused_for_its_size():
    with pytest.raises(BadImageError) as caught:
        decode(declared(MAX_PIXELS, 1), SIZE, 3)
    assert "refused" not in str(caught.value)
