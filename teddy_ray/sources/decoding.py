"""From what a source holds of an image, encoded bytes or an array, to pixels of one size: every kind of image.

Pixels stored sideways are turned as their EXIF says. Of 16 bits the high byte is kept. Transparency is laid over white.
CMYK is read with Adobe's polarity, marked or not, as browsers do. Of animations the first frame is taken. Colour
profiles are ignored.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from teddy_ray.sources.jpeg import decode_plain

DECODING_VERSION = 2
"""Raise it when decoding or resizing changes its bytes: nothing old is reused then."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""The formats that are tried, whatever a file is called: Pillow knows others, of which one runs Ghostscript."""

MAX_PIXELS = 89_478_485
"""A larger image is refused by its declared size, before any of its pixels is decoded (256 MiB of RGB; Pillow's own
bound for a warning)."""


class BadImageError(ValueError):
    """An image that cannot be decoded, and why. Says nothing of images that cannot be read: those are no fault of
    the data."""


Raw = bytes | npt.NDArray[np.uint8] | BadImageError
"""What a source holds of an image: a file's bytes, an array (h w) or (h w c) of 1, 3 or 4 channels, or why there is
none."""


def decode(raw: Raw, image_size: int, channels: int) -> npt.NDArray[np.uint8]:
    """Pixels (channels size size), resized and centre-cropped. Raises BadImageError."""
    if isinstance(raw, BadImageError):
        raise raw
    try:
        plain = decode_plain(raw, MAX_PIXELS) if isinstance(raw, bytes) else None
        if plain is not None and plain.shape == (image_size, image_size, channels):
            return plain.transpose(2, 0, 1)
        image = Image.fromarray(plain) if plain is not None else _open(raw)
        image = _without_transparency(_to_8_bits(ImageOps.exif_transpose(image)))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (image_size, image_size):
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    except (BadImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        bomb = f"it declares more than {MAX_PIXELS} pixels and is refused undecoded, as a decompression bomb"
        raise BadImageError(bomb) from None
    except UnidentifiedImageError:
        raise BadImageError(f"of none of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # noqa: BLE001 - Pillow's parsers raise whatever a broken file leads them to
        raise BadImageError(str(error) or type(error).__name__) from None
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _open(raw: bytes | npt.NDArray[np.uint8]) -> Image.Image:
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw[..., 0] if raw.shape[2:] == (1,) else raw)
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale keeps its high byte; Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadImageError("its values are neither of 8 nor of 16 bits")
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if (transparent := image.info.get("transparency")) is None:
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))
    if image.mode == "F":
        raise BadImageError("its values are floating-point numbers; store 8 or 16 bits per channel")
    return image


def _without_transparency(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
