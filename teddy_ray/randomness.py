"""Counter-based randomness: every draw is a pure function of its key, never of what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: str | int) -> np.random.Generator:
    """A Philox generator for the key, such as ("crop", seed, unit, step).

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def id_hash(image_id: str) -> int:
    """A stable 64-bit hash of an image's id: splits are keyed by it, so that they do not follow the data's order."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest())
