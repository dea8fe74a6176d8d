"""Users' checkpoints: safetensors, or a state_dict. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from teddy_ray.errors import InputError, Problem, StoreError
from teddy_ray.models import Classifier
from teddy_ray.stores import open_uri

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training programs put the state_dict in what they save."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before names."""

OLD_NAMES = ((re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),)
"""Names in torchvision's files of weights that its models no longer have."""

NAMED = 3
"""How many names of each kind an error lists."""


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: tensors by name, the file's SHA-256, and the class names where it has them."""

    tensors: Mapping[str, Tensor]
    sha256: str
    classes: tuple[str, ...] | None = None


def read_weights(uri: str, key: str) -> Weights:
    """Read a checkpoint from a path, or any URI that pyarrow.fs opens.

    key: the recipe's key, for errors. Raises InputError where the file cannot be read, or holds more than tensors.
    """
    data = _read(uri, key)
    try:
        if _is_safetensors(data):
            from safetensors.torch import load

            tensors, metadata = load(data), _metadata(data)
        else:
            tensors, metadata = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}
    except Exception as error:  # of a file that may be anything
        raise InputError([Problem(key, uri, _refusal(error))]) from error
    unwrapped = _unwrap(tensors)
    if others := [str(name) for name, value in unwrapped.items() if not _is_named_tensor(name, value)]:
        remedy = f"should hold tensors alone, but has {_some(others)}; save the model's state_dict()"
        raise InputError([Problem(key, uri, remedy)])
    return Weights(_without_prefixes(unwrapped), hashlib.sha256(data).hexdigest(), _classes(metadata, uri, key))


def load_into(model: Classifier, weights: Weights, *, key: str, uri: str) -> None:
    """Load a checkpoint of the whole model or of its bare network.

    Raises InputError where they do not fit, naming some of what is missing, unexpected or of another shape.
    """
    whole = _overlap(model, weights) > _overlap(model.network, weights)
    target: nn.Module = model if whole else model.network
    expected = target.state_dict()
    tensors = {_current_name(name, expected): value for name, value in weights.tensors.items()}
    pixels = {"mean", "std"} if whole else set()
    for name in pixels & tensors.keys():
        if tensors[name].numel() == 1:  # the same for all channels
            tensors[name] = tensors[name].reshape(1).expand_as(expected[name])
    optional = pixels | {name for name in expected if name.endswith("num_batches_tracked")}
    misfits = {
        "missing": sorted(expected.keys() - tensors.keys() - optional),
        "unexpected": sorted(name for name in tensors.keys() - expected.keys() if not _left_out(target, name)),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} where {tuple(value.shape)} is needed"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    }
    if any(misfits.values()):
        told = "; ".join(f"{kind}: {_some(names)}" for kind, names in misfits.items() if names)
        remedy = f"should be weights of this {type(model.network).__name__}, with this number of classes ({told})"
        raise InputError([Problem(key, uri, remedy)])
    target.load_state_dict({name: tensors.get(name, value) for name, value in expected.items()})


def _read(uri: str, key: str) -> bytes:
    try:
        fs, path = open_uri(uri, key)
        with fs.open_input_file(path) as file:
            data: bytes = file.read()
    except InputError:
        raise
    except (ValueError, OSError, pa.ArrowNotImplementedError, StoreError) as error:
        if isinstance(error, StoreError) and not error.is_final:  # nothing is wrong with what was asked for
            raise
        remedy = f"should be a file of weights that can be read ({str(error).splitlines()[0]})"
        raise InputError([Problem(key, uri, remedy)]) from None
    return data


def _is_safetensors(data: bytes) -> bool:
    """By content: the length of the header, then a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _metadata(data: bytes) -> Mapping[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__") or {})


def _classes(metadata: Mapping[str, str], uri: str, key: str) -> tuple[str, ...] | None:
    if "classes" not in metadata:
        return None
    try:
        classes = json.loads(metadata["classes"])
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError([Problem(key, uri, "should name its classes as a JSON list in the metadata `classes`")])
    return tuple(classes)


def _refusal(error: Exception) -> str:
    """Why a file is refused, and what would be right."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"it holds objects of {found[1]}" if found else f"it cannot be read: {type(error).__name__}"
    return f"should be safetensors or a state_dict of tensors, for nothing else is loaded from a file ({reason})"


def _unwrap(value: Any) -> Mapping[Any, Any]:
    while isinstance(value, Mapping):
        inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), Mapping)), None)
        if inner is None:
            return value
        value = inner
    return {type(value).__name__: None}


def _is_named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _without_prefixes(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in PREFIXES * 2:  # either may stand before the other
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _overlap(module: nn.Module, weights: Weights) -> int:
    expected = module.state_dict()
    return len(expected.keys() & {_current_name(name, expected) for name in weights.tensors})


def _current_name(name: str, expected: Mapping[str, Any]) -> str:
    for pattern, replacement in OLD_NAMES:
        if name not in expected:
            name = pattern.sub(replacement, name)
    return name


def _left_out(module: nn.Module, name: str) -> bool:
    """Whether a name belongs to a part that the model is built without, such as a head for training alone."""
    part: Any = module
    for step in name.split("."):
        part = getattr(part, step, module)
        if part is None or part is module:
            break
    return part is None


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more
