"""Modules import only downwards: the floors of the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import teddy_ray

PACKAGE = Path(teddy_ray.__file__).parent
FLOORS = (
    {
        "__init__",
        "recipe",
        "recipe_file",
        "contradictions",
        "errors",
        "retries",
        "records",
        "fingerprints",
        "pool_plan",
        "plan",
        "image_sets",
        "student_plan",
        "rows",
        "scores",
        "judgement",
        "randomness",
        "progress",
    },
    {
        "augment",
        "data_parallel",
        "device",
        "engine",
        "formation",
        "frozen",
        "kernels",
        "labels",
        "views",
        "replay",
        "matching",
        "models",
        "moments",
        "pool",
        "pixels",
        "priors",
        "pruning",
        "schedules",
        "starts",
        "statistics",
        "students",
        "synthesis",
        "taps",
        "training",
        "work",
    },
    {
        "stores",
        "storage",
        "checkpoints",
        "weights",
        "stored_moments",
        "sources",
        "dataset",
        "published",
        "distilled",
        "exports",
        "members",
        "given",
    },
    {"stages"},
    {
        "summary",
        "scaling",
        "tables",
        "card",
        "report",
        "gallery",
        "plots",
        "publication",
        "tensorboard",
        "flow",
        "comparison",
        "sweeps",
        "cli",
    },
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
FORBIDDEN = ({"torch", "torchvision", "safetensors", "ray"}, {"ray"}, {"ray"}, set(), set())
LAZY = {("__init__.py", "teddy_ray"), ("__init__.py", "teddy_ray.distilled")}
"""teddy_ray.load imports its module when it is called: the package's own door."""
PATHS = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """Top-level module or subpackage that the file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree, package):
    """Dotted names of everything imported anywhere in a file that lies in `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            if base == "teddy_ray":
                yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("teddy_ray."):
            yield node.value.partition(":")[0]  # by importlib


def faults(path, source, floor):
    package = ("teddy_ray", *path.relative_to(PACKAGE).parts[:-1])
    for name in imported(ast.parse(source), package):
        top, _, rest = name.partition(".")
        if top in FORBIDDEN[floor]:
            yield f"{path.name} (floor {floor}) imports {name}"
        if (path.relative_to(PACKAGE).as_posix(), name) in LAZY:
            continue
        if top == "teddy_ray" and FLOOR.get(rest.partition(".")[0] or "__init__", 0) > floor:
            yield f"{path.name} (floor {floor}) imports {name}, which lies above"


def test_every_module_has_a_floor():
    assert {module_of(path) for path in PATHS} == set(FLOOR)
    assert len(FLOOR) == sum(len(modules) for modules in FLOORS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_only_downwards(path):
    assert list(faults(path, path.read_text(), FLOOR[module_of(path)])) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("recipe.py", "import torch.nn"),
        ("recipe.py", "def f():\n    from ray import train"),
        ("plan.py", "from teddy_ray import storage"),
        ("plan.py", "from . import storage"),
        ("plan.py", "import teddy_ray.models.convnet"),
        ("matching.py", "from ray.data import Dataset"),
        ("matching.py", "def f():\n    from teddy_ray.storage import sha256"),
        ("storage.py", "if x:\n    import ray"),
        ("sources/folder.py", "from ..stages.pool import run"),
        ("sources/folder.py", "importlib.import_module('teddy_ray.stages')"),
        ("stages/pool.py", "from teddy_ray.flow import distill"),
        ("stages/pool.py", "importlib.import_module(f'teddy_ray.report.{x}')"),
    ],
)
def test_an_import_upwards_is_found(file, source):
    path = PACKAGE / file
    assert len(list(faults(path, source, FLOOR[module_of(path)]))) == 1


@pytest.mark.parametrize("floor", [0, 1, 2])
def test_the_lower_floors_load_nothing_that_is_forbidden_there(floor):
    modules = [f"teddy_ray.{module}" for module in sorted(FLOORS[floor] - {"__init__"})]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(*({FORBIDDEN[floor]!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
