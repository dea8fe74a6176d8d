"""The kernels as a shared library, built once per machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
LONG, POINTER = ctypes.c_long, ctypes.c_void_p
SIGNATURES = {  # of the .cpp files: what is returned, what is given
    "panel": (LONG, []),
    "most_channels": (LONG, []),
    "scratch": (LONG, [LONG] * 7),
    "convolve": (None, [POINTER] * 4 + [LONG] * 7),
    "moments_scratch": (LONG, [LONG] * 2),
    "channel_moments": (None, [POINTER] * 5 + [LONG] * 3),
    "image_moments": (None, [POINTER] * 3 + [LONG] * 4),
}


def compiler() -> str | None:
    """The C++ compiler that is there: $CXX or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def can_build() -> bool:
    """Whether the kernels are there or can be built."""
    try:
        library()
    except (RuntimeError, OSError):  # no compiler, one that refuses, no OpenMP, a cache where nothing may run
        return False
    return True


@functools.cache
def identity() -> str:
    """What the kernels' bytes depend on: their sources, the compiler, the kind of CPU it builds for."""
    version = [compiler() or "g++", "--version"]
    built_with = subprocess.run(version, capture_output=True, text=True, check=False).stdout  # noqa: S603
    cpu = next((line for line in _cpuinfo().splitlines() if line.startswith(("flags", "Features"))), "")
    texts = [path.read_text() for path in SOURCES]
    return hashlib.sha256("\n".join([*texts, *FLAGS, built_with, cpu]).encode()).hexdigest()[:16]


@functools.cache
def library() -> Any:
    """The kernels. Raises RuntimeError or OSError where there is no compiler, or it refuses."""
    target = _folder() / f"kernels-{identity()}.so"
    if not target.exists():
        folder = target.parent
        with tempfile.TemporaryDirectory(dir=folder) as build:
            built = Path(build) / target.name
            command = [compiler() or "g++", *FLAGS, *map(str, SOURCES), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()}")
            built.replace(target)  # another process never sees half a file
    kernels = ctypes.CDLL(str(target))
    for name, (returned, given) in SIGNATURES.items():
        function = getattr(kernels, name)
        function.restype, function.argtypes = returned, given
    return kernels


def _folder() -> Path:
    """The user's cache, or a folder of the system's temporary one where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "teddy_ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"teddy_ray-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
