"""How the loss of a member is computed fast: number format, memory layout, compilation. Chosen once, from facts."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from teddy_ray.errors import InputError, Problem
from teddy_ray.matching import member_loss
from teddy_ray.models import build
from teddy_ray.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

FLOPS_WORTH_COMPILING = {"cpu": 5e12, "cuda": 4e14}
"""Work of a unit, per architecture and CPU thread, from which the warm-up of the compiler pays: a rough two minutes
on a CPU core and twenty seconds on a GPU, both uncompiled."""

COMPILED_VARIANTS = 64
"""Graphs that a worker may hold: one per architecture, view size and batch size."""


@dataclass(frozen=True)
class Machine:
    """What the choice depends on. The same for every worker of a run: asked once, by `inspect_machine`."""

    device: str
    threads: int
    fast_bf16: bool
    compiler: bool


@dataclass(frozen=True)
class Engine:
    """A choice: `precision` of activations and weights, and whether the loss is compiled for `device`."""

    precision: str
    compile: bool
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def loss(self) -> Callable[..., Any]:
        """`matching.member_loss`, compiled or not."""
        return _compiled(self.device) if self.compile else member_loss

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.compile else 'not compiled'}"


def inspect_machine(device: torch.device) -> Machine:
    """What this machine can do."""
    if device.type == "cuda":
        return Machine("cuda", 1, torch.cuda.get_device_capability(device) >= (8, 0), True)
    return Machine(
        "cpu", torch.get_num_threads(), _cpu_has_fast_bf16(), shutil.which(os.environ.get("CXX", "g++")) is not None
    )


def choose(recipe: Recipe, num_classes: int, num_images: int, machine: Machine) -> Engine:
    """The engine of a unit of so many images. Depends on the recipe, the unit and the kind of machine alone.

    Raises InputError where the recipe asks for what the machine cannot do.
    """
    part = recipe.synthesis
    precision = part.precision
    if precision == "auto":
        precision = "bf16" if machine.fast_bf16 else "fp32"
    compiled = part.compile
    if compiled == "auto":
        work = num_images * part.steps * part.models_per_step * mean_step_flops(recipe, num_classes)
        worth = FLOPS_WORTH_COMPILING[machine.device] * machine.threads * len(recipe.pool.architectures)
        compiled = machine.compiler and work > worth
    elif compiled and not machine.compiler:
        raise InputError(
            [Problem("synthesis.compile", True, "needs a C++ compiler on every node; install g++, or set it to false")]
        )
    return Engine(precision, compiled, machine.device)


def mean_step_flops(recipe: Recipe, num_classes: int) -> float:
    """Floating-point operations of a step per image, forward and back to the image, mean over architectures."""
    names = recipe.pool.architectures
    return sum(_step_flops(name, num_classes, recipe.data.channels, recipe.data.image_size) for name in names) / len(
        names
    )


@functools.cache
def _step_flops(architecture: str, num_classes: int, channels: int, image_size: int) -> float:
    with torch.device("meta"):
        model = build(architecture, num_classes=num_classes, channels=channels, image_size=image_size).eval()
        image = torch.empty(1, channels, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return 2.0 * float(counter.get_total_flops())  # back to the image costs what forward does


@functools.cache
def _compiled(device: str) -> Callable[..., Any]:
    # A program per architecture: weights are its inputs, so all members of one share it.
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    # reduce-overhead captures CUDA graphs: small models are bound by launches
    return torch.compile(member_loss, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)


def _cpu_has_fast_bf16() -> bool:
    """Whether bfloat16 products run at twice the rate of float32: AMX, or AVX-512 BF16 on AMD (Zen 4 and later).

    Intel's AVX-512 BF16 without AMX has float32's rate, and conversions on top.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in text)
