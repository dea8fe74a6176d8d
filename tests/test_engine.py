"""Which engine is chosen, and that the choice depends on nothing but recipe, unit and machine."""

from dataclasses import replace

import pytest
import torch

from teddy_ray import engine
from teddy_ray.engine import (
    Engine,
    Machine,
    check_machine,
    choose,
    choose_kernels,
    inspect_machine,
    mean_step_flops,
)
from teddy_ray.errors import InputError
from teddy_ray.matching import member_loss
from teddy_ray.recipe_file import parse_recipe

CPU = Machine(device="cpu", threads=1, fast_bf16=False, compiler=True, kernels=True)
GPU = Machine(device="cuda", threads=1, fast_bf16=True, compiler=True, kernels=False)


def make_recipe(architectures=("convnet:width=32",), image_size=32, **synthesis):
    return parse_recipe(
        {
            "name": "test",
            "data": {"source": "sklearn:digits", "image_size": image_size},
            "pool": {"architectures": list(architectures)},
            "synthesis": synthesis,
        }
    )


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (CPU, ("fp32", True)),
        (replace(CPU, fast_bf16=True), ("bf16", False)),
        (replace(CPU, kernels=False), ("fp32", False)),
        (GPU, ("bf16", False)),
        (replace(GPU, fast_bf16=False), ("fp32", False)),
    ],
)
def test_auto_takes_what_the_machine_does_fast(machine, expected):
    chosen = choose(make_recipe(compile=False), 10, 100, machine)
    assert (chosen.precision, chosen.kernels) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_the_recipe_says_is_taken(machine, precision):
    chosen = choose(make_recipe(precision=precision, kernels=False, compile=True), 10, 100, machine)
    assert chosen == Engine(machine.device, precision, kernels=False, compile=True)
    assert chosen.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_compilation_pays_from_a_certain_work_of_the_unit(machine):
    small = make_recipe(steps=10)
    large = make_recipe(steps=1_000_000)
    assert not choose(small, 10, 100, machine).compile
    assert choose(large, 10, 100, machine).compile
    assert not choose(large, 10, 100, replace(machine, compiler=False)).compile
    # what is left to do, or how many units there are, plays no part: more classes do not change the choice
    assert choose(small, 10, 100, machine) == choose(small, 20_000, 100, machine)
    assert not choose(make_recipe(steps=10, images_per_class=500), 10, 100, machine).compile


def test_a_further_architecture_has_to_pay_for_its_own_compilation():
    flops = mean_step_flops(make_recipe(), 10)
    steps = int(1.5 * engine.FLOPS_WORTH_COMPILING["cpu"] / flops / 100)
    assert choose(make_recipe(steps=steps), 10, 100, CPU).compile
    two = ("convnet:width=32", "convnet:width=32,norm=group")
    assert not choose(make_recipe(two, steps=steps), 10, 100, CPU).compile


def test_work_of_a_step_is_that_of_the_convolutions_there_and_back():
    recipe = make_recipe(["convnet:width=8,depth=1"], image_size=16)
    forward = 2 * 16 * 16 * 8 * 3 * 9 + 2 * 8 * 8 * 8 * 10
    assert mean_step_flops(recipe, 10) == 2 * forward


@pytest.mark.parametrize(
    ("machine", "part", "told"),
    [
        (replace(CPU, compiler=False), {"compile": True}, "synthesis.compile: found True; needs g++ on every node"),
        (replace(GPU, compiler=False), {"compile": True}, "synthesis.compile: found True; needs Triton and a GPU of"),
        (CPU, {"compile": "graphs"}, "synthesis.compile: found 'graphs'; is for GPUs"),
        (replace(CPU, kernels=False), {"kernels": True}, "synthesis.kernels: found True; cannot be built; install g++"),
        (GPU, {"kernels": True}, "synthesis.kernels: found True; is for CPUs in fp32, not for cuda in bf16"),
        (CPU, {"kernels": True, "precision": "bf16"}, "synthesis.kernels: found True; is for CPUs in fp32, not"),
    ],
)
def test_what_the_machine_cannot_do_is_told(machine, part, told):
    with pytest.raises(InputError) as caught:
        choose(make_recipe(**part), 10, 100, machine)
    assert str(caught.value).startswith(told)


def test_another_stages_key_is_named_for_its_kernels():
    assert choose_kernels("statistics.kernels", "auto", "fp32", CPU)
    assert not choose_kernels("statistics.kernels", "auto", "fp32", GPU)
    assert not choose_kernels("statistics.kernels", False, "fp32", CPU)
    with pytest.raises(InputError, match=r"^statistics\.kernels: found True; cannot be built"):
        choose_kernels("statistics.kernels", True, "fp32", replace(CPU, kernels=False))


def test_a_machine_of_another_kind_is_refused():
    here = inspect_machine(torch.device("cpu"))
    check_machine(torch.device("cpu"), here, None)
    with pytest.raises(InputError, match=r"^cluster\.address: found 'auto'; has nodes of different kinds, Machine\("):
        check_machine(torch.device("cpu"), replace(here, kernels=not here.kernels), "auto")


def test_graphs_are_taken_only_where_asked_for():
    assert choose(make_recipe(compile="graphs"), 10, 100, GPU).compile == "graphs"
    assert choose(make_recipe(steps=1_000_000), 10, 100, GPU).compile is True


def test_this_machine_is_what_torch_says():
    machine = inspect_machine(torch.device("cpu"))
    assert machine.device == "cpu"
    assert machine.threads == torch.get_num_threads()


def test_text_names_what_was_chosen():
    assert str(Engine("cpu", "fp32", kernels=True, compile=True)) == "fp32, own kernels, compiled"
    assert str(Engine("cuda", "bf16", kernels=False, compile=False)) == "bf16"
    assert str(Engine("cuda", "bf16", kernels=False, compile="graphs")) == "bf16, compiled into CUDA graphs"
    assert Engine("cpu", "fp32", kernels=False, compile=False).loss is member_loss
