"""Counter-based randomness: every draw is a pure function of its key, never of what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def generator(*key: str | int) -> np.random.Generator:
    """A Philox generator for the key, such as ("crop", seed, unit, step).

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def uniforms(keys: Iterable[tuple[str | int, ...]], num: int) -> npt.NDArray[np.float64]:
    """(keys num) draws from [0, 1), one row per key, straight from its hash: many keys that need few draws each.

    num: at most 8, of 53 bits each.
    """
    digests = b"".join(hashlib.blake2b(repr(key).encode(), digest_size=8 * num).digest() for key in keys)
    integers = np.frombuffer(digests, dtype="<u8") >> np.uint64(11)
    return integers.reshape(-1, num).astype(np.float64) * 2.0**-53


def id_hash(image_id: str) -> int:
    """A stable 64-bit hash of an image's id: splits are keyed by it, so that they do not follow the data's order."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest())
