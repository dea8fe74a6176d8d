"""Speed and memory of a synthesis step against a plain loop, side by side in one run: `make bench`.

The plain loop is written as the published ones are: float32, NCHW, one Python hook per BatchNorm that takes the mean
and permutes a copy for the variance, weights frozen, Adam, one random crop for the whole batch. Each loop has a process
of its own, of which the peak memory is that above what imports take; the two run in turn, and a third measures the best
rate of any single convolution of the model. On a GPU: `python tests/benchmarks/bench_synthesis.py --device cuda`.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from teddy_ray import device as devices
from teddy_ray.engine import Engine, inspect_machine
from teddy_ray.models import Classifier, build, freeze
from teddy_ray.moments import Moments, class_moments
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.synthesis import Member, State, optimise
from teddy_ray.taps import Taps

ROUNDS, NUM_CLASSES = 5, 10


@dataclass(frozen=True)
class Case:
    """A model with a batch. steps: of one round on a CPU."""

    name: str
    architecture: str
    image_size: int
    num_images: int
    steps: int


CASES = [
    Case("ResNet-18, 32x32", "resnet18", 32, 100, 8),
    Case("ResNet-18, 64x64", "resnet18", 64, 100, 2),
    Case("torchvision ResNet-18, 224x224", "torchvision", 224, 16, 3),
    Case("ConvNet-3, 32x32", "convnet", 32, 100, 20),
]


def model_of(case: Case) -> nn.Module:
    """The case's model, frozen, with random weights."""
    torch.manual_seed(0)
    if case.architecture == "torchvision":
        return freeze(Classifier(resnet18(num_classes=NUM_CLASSES)))
    size = {"num_classes": NUM_CLASSES, "channels": 3, "image_size": case.image_size}
    return freeze(build(case.architecture, **size))


def batch_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images, and labels."""
    shape = (case.num_images, 3, case.image_size, case.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return images, np.arange(case.num_images) % NUM_CLASSES


def plain_loop(case: Case, device: torch.device) -> Callable[[int], None]:
    """Eq. 7 as it is usually written."""
    model = model_of(case).to(device)
    pixels, labels = batch_of(case)
    start, y = torch.from_numpy(pixels).to(device).float() / 255, torch.from_numpy(labels).to(device)
    terms: list[Tensor] = []

    def hook(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        terms.append(torch.norm(module.running_mean - mean, 2) + torch.norm(module.running_var - var, 2))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(hook)

    def run(steps: int) -> None:
        images = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([images], lr=0.02, betas=(0.5, 0.9))
        size, random = case.image_size, np.random.default_rng(0)
        for _ in range(steps):
            side = int(size * random.uniform(0.7, 1.0))
            top, left = random.integers(0, size - side + 1, 2)
            views = images[..., top : top + side, left : left + side]
            views = functional.interpolate(views, (size, size), mode="bilinear")
            terms.clear()
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(views.flip(3) if random.random() < 0.5 else views), y)
            (loss + sum(terms)).backward()
            optimiser.step()
            images.data.clamp_(0, 1)

    return run


def our_loop(case: Case, device: torch.device, engine: Engine) -> Callable[[int], None]:
    """`optimise`, as a worker of the synthesis runs it."""
    model = model_of(case).to(device)
    pixels, labels = batch_of(case)
    with torch.no_grad(), Taps(model) as taps:
        x = torch.from_numpy(pixels[:NUM_CLASSES]).to(device).float() / 255
        model(x)
        y = torch.arange(NUM_CLASSES, device=device)
        activations = zip(taps.layers, taps.take(), strict=True)
        moments: dict[str, Moments] = {layer: class_moments(a, y, NUM_CLASSES) for layer, a in activations}
    member = Member("only", model, moments, engine.dtype, kernels=engine.kernels)
    del model, x, taps

    def run(steps: int) -> None:
        recipe = parse_recipe({"name": "bench", "data": {"source": "none"}, "synthesis": {"steps": steps}})
        state = State.begin(pixels, recipe, device)
        for _ in optimise(state, labels, [member], recipe, key="bench", loss=engine.loss):
            pass

    return run


def best_convolution(case: Case, device: torch.device) -> Callable[[int], float]:
    """Gives the best rate, in operations per second, of any convolution of the model, in any format."""
    model, shapes = model_of(case), []

    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        shapes.append((module, inputs[0].shape))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.zeros(case.num_images, 3, case.image_size, case.image_size))

    def rate(module: nn.Conv2d, shape: torch.Size, dtype: torch.dtype, layout: torch.memory_format) -> float:
        settings = {"stride": module.stride, "padding": module.padding}
        x = torch.randn(shape).to(device, dtype).contiguous(memory_format=layout)
        weight = module.weight.detach().to(device, dtype).contiguous(memory_format=layout)
        seconds = []
        for _ in range(4):
            seconds.append(timed(lambda: functional.conv2d(x, weight, **settings), device))
        return flops_of(lambda: functional.conv2d(x, weight, **settings)) / min(seconds)

    formats = [(torch.float32, torch.contiguous_format), (torch.float32, torch.channels_last)]
    formats.append((torch.bfloat16, torch.channels_last))
    distinct = {(shape, tuple(module.weight.shape), module.stride): (module, shape) for module, shape in shapes}

    def run(_: int) -> float:
        with torch.no_grad():
            return max(rate(*layer, *form) for layer in distinct.values() for form in formats)

    return run


def flops_of(run: Callable[[], Any]) -> float:
    """Operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mb(device: torch.device) -> float:
    """Peak memory of this process so far: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def serve(kind: str, case: Case, gpus: int, threads: int, pipe: Connection) -> None:
    """A process of its own: takes numbers of steps, gives (seconds, result, peak MB above imports)."""
    device = devices.prepare(threads, gpus)
    importlib.import_module("torch._inductor.compile_fx")  # which torch.compile would import later
    before = peak_mb(device)
    if kind == "plain":
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's defaults, as the published loops have them
        run: Callable[[int], Any] = plain_loop(case, device)
    elif kind == "ours":
        machine = inspect_machine(device)
        precision = "bf16" if machine.fast_bf16 else "fp32"
        engine = Engine(machine.device, precision, machine.device == "cpu" and precision == "fp32", compile=True)
        devices.keep_freed_memory()
        run = our_loop(case, device, engine)
        pipe.send(str(engine))
    else:
        run = best_convolution(case, device)
    while steps := pipe.recv():
        results: list[Any] = []
        seconds = timed(lambda steps=steps, results=results: results.append(run(steps)), device)  # type: ignore[misc]
        pipe.send((seconds, results[0], peak_mb(device) - before))


def measure(case: Case, gpus: int, threads: int) -> None:
    """Prints a row."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for kind in ("ours", "plain", "convolution"):
        pipes[kind], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(kind, case, gpus, threads, theirs), daemon=True))
        processes[-1].start()
    engine = pipes["ours"].recv()

    def ask(kind: str, steps: int) -> Any:
        pipes[kind].send(steps)
        return pipes[kind].recv()

    steps = case.steps * (10 if gpus else 1)
    warm_up = ask("ours", 3)[0]
    ask("plain", 2)
    seconds, memory, best = [], {}, 0.0
    for _ in range(ROUNDS):
        pair = []
        for kind in ("ours", "plain"):
            duration, _, memory[kind] = ask(kind, steps)
            pair.append(duration)
        seconds.append(pair)
        best = max(best, ask("convolution", 1)[1])
    for pipe in pipes.values():
        pipe.send(0)
    for process in processes:
        process.join()

    model = model_of(case)
    image = torch.zeros(1, 3, case.image_size, case.image_size)
    with torch.no_grad():
        step_flops = 2 * flops_of(lambda: model(image))
    ours, plain = (case.num_images * steps / statistics.median(pair[i] for pair in seconds) for i in (0, 1))
    ratio = statistics.median(pair[1] / pair[0] for pair in seconds)
    print(
        f"| {case.name}, {case.num_images} images | {engine} | {ours:,.1f} | {plain:,.1f} | {ratio:.2f} "
        f"| {ours * step_flops / 1e9:,.0f} of {best / 1e9:,.0f} = {ours * step_flops / best:.0%} "
        f"| {memory['ours']:,.0f} / {memory['plain']:,.0f} = {memory['ours'] / memory['plain']:.0%} | {warm_up:.0f} |",
        flush=True,
    )


def main() -> None:
    """Measure every case, or those whose name contains a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", default="", help="part of a case's name")
    arguments = parser.parse_args()
    gpus = int(arguments.device == "cuda")
    if gpus and not torch.cuda.is_available():
        sys.exit("no GPU is visible to PyTorch")
    print(f"{devices.describe(devices.prepare(arguments.threads, gpus))}, torch {torch.__version__}; ", end="")
    print(f"median of {ROUNDS} alternating rounds\n")
    columns = ["case", "engine", "images·steps/s", "plain loop", "ratio", "GFLOP/s of the best convolution's"]
    columns += ["peak MB", "warm-up s"]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for case in CASES:
        if arguments.case in case.name:
            measure(case, gpus, arguments.threads)


if __name__ == "__main__":
    main()
