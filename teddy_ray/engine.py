"""How the loss of a member is computed fast: number format, memory layout, compilation. Chosen once, from facts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from teddy_ray.device import fast_bf16
from teddy_ray.errors import InputError, Problem
from teddy_ray.kernels.build import can_build
from teddy_ray.kernels.build import compiler as find_compiler
from teddy_ray.matching import member_loss
from teddy_ray.recipe import Recipe
from teddy_ray.work import SYNTHESIS_STEP, forward_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

FLOPS_WORTH_COMPILING = {"cpu": 5e13, "cuda": 4e14}
"""Work of a unit, per architecture and CPU thread, from which the warm-up of the compiler pays: a rough four minutes
on a CPU core, where it saves an eighth, and twenty seconds on a GPU, both uncompiled."""

COMPILED_VARIANTS = 256
"""Graphs that a worker may hold: one per architecture, view size and batch size."""


@dataclass(frozen=True)
class Machine:
    """What the choice depends on. The same for every worker of a run: asked once, by `inspect_machine`."""

    device: str
    threads: int
    fast_bf16: bool
    compiler: bool
    kernels: bool


@dataclass(frozen=True)
class Engine:
    """A choice: `precision` of activations and weights, how convolutions are computed, whether the loss is compiled."""

    device: str
    precision: str
    kernels: bool
    compile: bool | Literal["graphs"]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def loss(self) -> Callable[..., Any]:
        """`matching.member_loss`, compiled or not."""
        return _compiled(self.device, self.compile == "graphs") if self.compile else member_loss

    def __str__(self) -> str:
        how = {False: "", True: "compiled", "graphs": "compiled into CUDA graphs"}[self.compile]
        parts = [self.precision, "own kernels" if self.kernels else "", how]
        return ", ".join(part for part in parts if part)


def inspect_machine(device: torch.device) -> Machine:
    """What this machine can do."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        compiler = capability >= (7, 0) and find_spec("triton") is not None
        return Machine("cuda", 1, fast_bf16=fast_bf16(device), compiler=compiler, kernels=False)
    threads = torch.get_num_threads()
    return Machine("cpu", threads, fast_bf16(device), find_compiler() is not None, can_build())


def choose(recipe: Recipe, num_classes: int, num_images: int, machine: Machine) -> Engine:
    """The engine of a unit of so many images. Depends on the recipe, the unit and the kind of machine alone.

    Raises InputError where the recipe asks for what the machine cannot do.
    """
    part = recipe.synthesis
    num_images *= part.formation**2
    precision = choose_precision(part.precision, machine.fast_bf16)
    kernels = choose_kernels("synthesis.kernels", part.kernels, precision, machine)
    compiled = part.compile
    if compiled == "auto":
        work = num_images * part.steps * part.models_per_step * mean_step_flops(recipe, num_classes)
        worth = FLOPS_WORTH_COMPILING[machine.device] * machine.threads * len(recipe.pool.architectures)
        compiled = machine.compiler and work > worth
    elif compiled and not machine.compiler:
        needed = {"cpu": "g++", "cuda": "Triton and a GPU of capability 7.0 or later"}[machine.device]
        remedy = f"needs {needed} on every node; install it, or leave it at auto"
        raise InputError([Problem("synthesis.compile", compiled, remedy)])
    if compiled == "graphs" and machine.device != "cuda":
        raise InputError([Problem("synthesis.compile", compiled, "is for GPUs; set it to auto, true or false")])
    return Engine(machine.device, precision, kernels, compiled)


def choose_precision(wanted: str, fast_bf16: bool) -> str:
    """fp32 or bf16, `wanted` being what the recipe says of a stage's precision."""
    auto = "bf16" if fast_bf16 else "fp32"
    return auto if wanted == "auto" else wanted


def choose_kernels(key: str, wanted: bool | Literal["auto"], precision: str, machine: Machine) -> bool:
    """Whether the kernels are used, `wanted` being what the recipe's `key` says.

    Raises InputError where the recipe asks for what the machine cannot do.
    """
    if wanted == "auto":
        return machine.kernels and precision == "fp32"
    if wanted and (machine.device != "cpu" or precision != "fp32"):
        remedy = f"is for CPUs in fp32, not for {machine.device} in {precision}; leave it at auto"
        raise InputError([Problem(key, True, remedy)])
    if wanted and not machine.kernels:
        remedy = "cannot be built; install g++ with OpenMP on every node, or leave it at auto"
        raise InputError([Problem(key, True, remedy)])
    return wanted


def check_machine(device: torch.device, expected: Machine, address: str | None) -> None:
    """Raises InputError where this machine is not of the kind that the choice was made for."""
    if (here := inspect_machine(device)) != expected:
        remedy = f"has nodes of different kinds, {here} and {expected}; choose nodes of one kind"
        raise InputError([Problem("cluster.address", address, remedy)])


def mean_step_flops(recipe: Recipe, num_classes: int) -> float:
    """Floating-point operations of a step per image, forward and back to the image, mean over architectures."""
    names, data = recipe.pool.architectures, recipe.data
    passes = (forward_flops(name, num_classes, data.channels, data.image_size) for name in names)
    return SYNTHESIS_STEP * sum(passes) / len(names)


@functools.cache
def _compiled(device: str, graphs: bool) -> Callable[..., Any]:
    # A program per architecture: weights are its inputs, so all members of one share it. Nothing may fall back to
    # uncompiled code in silence: what a worker ran before must not decide how it runs a unit.
    import torch._dynamo
    import torch._inductor.config  # seconds, which only those who compile should pay

    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    if hasattr(torch._inductor.config, "deterministic"):  # or the fastest reduction is chosen by the clock
        torch._inductor.config.deterministic = device == "cuda"
    mode = "reduce-overhead" if graphs else None
    program = torch.compile(member_loss, dynamic=False, fullgraph=True, mode=mode)
    if not graphs:
        return program

    def loss(*arguments: Any, **settings: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # what the last call gave has been added up by now
        return program(*arguments, **settings)

    return loss
