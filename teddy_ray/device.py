"""How a worker process is set up, so that the same work gives the same bytes in every one of them."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from teddy_ray.kernels.build import identity

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

PACKAGES = ("teddy_ray", "torch", "torchvision", "ray", "numpy", "pyarrow")


def prepare(threads: int, gpus: float) -> torch.device:
    """Fix the number of CPU threads, refuse nondeterministic operators, and choose the device.

    The device is the one that is there: a worker that was promised a GPU by a cluster with pretended ones uses its CPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # filling costs a pass over every new tensor; all of ours are written whole
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is to mean fp32
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are much faster than float32's: from Ampere on, and on CPUs with AMX.

    AVX-512's BF16 alone was slower (tests/benchmarks/RESULTS.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, for a process that works in the same large tensors again and again.

    glibc gives them back to the system each time, and page faults on their return take a fifth of a step. What the
    process holds stays at its peak from then on.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def versions() -> dict[str, str]:
    """Versions of everything that can change bytes."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def describe(device: torch.device) -> str:
    """What a table says it was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s) per worker"


def environment(device: torch.device, *, kernels: bool) -> dict[str, Any]:
    """What the bytes of a worker's result depend on beside the recipe. kernels: whether it uses its own."""
    return {"device": describe(device), "versions": versions(), "kernels": identity() if kernels else ""}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is too small, in one of PyTorch's ways or Python's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
