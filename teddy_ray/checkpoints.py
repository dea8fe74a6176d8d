"""Unfinished work on the storage, so that what is lost with a worker goes on elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from teddy_ray.errors import StoreError
from teddy_ray.retries import patience
from teddy_ray.storage import Storage, sha256

DIGEST = 64
"""Length of the SHA-256 in hexadecimal that a file begins with."""

SAVE_PATIENCE_S = 5.0
"""How long a save is tried: a GPU waits for it."""

log = logging.getLogger("teddy_ray")
_told: set[tuple[str, bool]] = set()


class Checkpoint:
    """The one checkpoint of an artifact in the making, under artifacts/.checkpoints/.

    environment: what its bytes depend on beside the fingerprint, such as device and versions. A checkpoint of another
    environment counts as none, as does a damaged one.
    """

    def __init__(self, storage: Storage, stage: str, fingerprint: str, environment: Mapping[str, Any]) -> None:
        self._storage, self._path = storage, _path(stage, fingerprint)
        self._environment = json.dumps(environment, sort_keys=True)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace what was saved before, if the storage lets us: it is an insurance, and the next save may succeed.

        The first failure of a process is a warning in its log.
        """
        named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        named["environment"] = _encode(self._environment)
        data = save(named)
        with _lenient("saving", self._path), patience(SAVE_PATIENCE_S):
            self._storage.write(self._path, sha256(data).encode() + data)

    def load(self) -> dict[str, Tensor] | None:
        """What was saved last, None where there is nothing to go on from."""
        try:
            stored = self._storage.read(self._path)
        except FileNotFoundError:
            return None
        digest, data = stored[:DIGEST], stored[DIGEST:]
        if sha256(data).encode() != digest:
            return None
        tensors = load(data)
        return tensors if tensors.pop("environment").equal(_encode(self._environment)) else None

    def drop(self) -> None:
        """The work is finished, and published: a checkpoint that cannot be deleted is no reason to do it again."""
        with _lenient("deleting", self._path), patience(SAVE_PATIENCE_S):
            self._storage.delete_file(self._path)


def saved_digest(storage: Storage, stage: str, fingerprint: str) -> str | None:
    """What tells a checkpoint from an earlier one, None where there is none."""
    try:
        return storage.read(_path(stage, fingerprint), DIGEST).decode()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _lenient(doing: str, path: str) -> Iterator[None]:
    """Goes on after an error of the storage; tells the first of a process, and the first that is final."""
    try:
        yield
    except (OSError, StoreError) as error:
        kind = (doing, getattr(error, "is_final", True))
        if kind not in _told:
            _told.add(kind)
            log.warning("%s a checkpoint failed, and the work goes on without it: %s: %s", doing, path, error)


def _path(stage: str, fingerprint: str) -> str:
    return f"artifacts/.checkpoints/{stage}/{fingerprint}.safetensors"


def _encode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
