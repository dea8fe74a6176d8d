"""Names of artifacts: a hash of everything that can change their bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

VERSIONS = {
    "training": 2,
    "member": 2,
    "pool": 2,
    "statistics": 2,
    "unit": 3,
    "synthesis": 2,
    "set": 2,
    "labels": 2,
    "student": 6,
    "evaluation": 3,
}
"""Raise a number when the algorithm behind it changes its bytes: nothing old is reused then."""


def fingerprint(kind: str, **parts: Any) -> str:
    """SHA-256, shortened to 128 bits, of the canonical JSON of the parts."""
    text = json.dumps({"kind": kind, "version": VERSIONS[kind], **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
