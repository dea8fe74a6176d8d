"""The command line. Status 0 done, 1 failed while running, 2 wrong input, 130 interrupted."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import teddy_ray
from teddy_ray.comparison.file import load_comparison
from teddy_ray.comparison.runs import expand
from teddy_ray.errors import InputError, StageError
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import load_recipe

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM is how a job is stopped
        signal.signal(signal_number, _interrupt)
    if os.getcwd() not in sys.path:  # a recipe may name functions of modules that lie here; Ray's workers look too
        sys.path.append(os.getcwd())
    try:
        arguments.run(arguments)
    except InputError as error:
        for problem in error.problems:
            print(f"teddy-ray: error: {problem}", file=sys.stderr)
        return 2
    except StageError as error:
        print(f"teddy-ray: failed: {error}", file=sys.stderr)
        if arguments.resumes:
            print(f"What is finished is kept; this resumes: teddy-ray {shlex.join(argv)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f" What is finished is kept; this resumes: teddy-ray {shlex.join(argv)}" if arguments.resumes else ""
        print(f"\nInterrupted.{kept}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Once: an impatient second Ctrl-C must not keep Ray from being shut down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="teddy-ray", description=teddy_ray.__doc__)
    parser.add_argument("--version", action="version", version=teddy_ray.__version__)
    parser.set_defaults(resumes=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a dotted key"
    )
    options.add_argument("--storage", metavar="URI", help="where artifacts/ and runs/ lie")
    options.add_argument("--address", metavar="ADDR", help="a running Ray cluster; without it Ray starts here")
    recipe_options = argparse.ArgumentParser(add_help=False, parents=[options])
    recipe_options.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as pipelines/recipes/digits.yaml")

    distill = commands.add_parser("distill", parents=[recipe_options], help="distil a data set and evaluate it")
    distill.set_defaults(run=_distill, resumes=True)
    plan = commands.add_parser(
        "plan", parents=[recipe_options], help="show what distill would do, and how long it takes"
    )
    plan.add_argument(
        "--workers", type=_counts, metavar="N,N,...", help="numbers of workers to predict times for, such as 1,8,64"
    )
    rates = plan.add_mutually_exclusive_group()
    rates.add_argument("--rates", metavar="NAME", help="the run in the storage that was measured; else that of RECIPE")
    rates.add_argument(
        "--teraflops", type=_positive, metavar="N", help="suppose so many per second of a GPU, or of a CPU thread"
    )
    plan.set_defaults(run=_plan)
    compare = commands.add_parser("compare", parents=[options], help="methods side by side, beside the paper's figures")
    compare.add_argument("file", metavar="COMPARISON", help="such as pipelines/comparisons/digits.yaml")
    compare.set_defaults(run=_compare, resumes=True)
    sweep = commands.add_parser("sweep", parents=[recipe_options], help="try other values of some keys, on Ray Tune")
    sweep.set_defaults(run=_sweep, resumes=True)
    export = commands.add_parser("export", help="write a distilled data set in the form that other loaders want")
    export.add_argument("path", metavar="RUN", help="a path or URI such as runs/digits or runs/digits/distilled")
    export.add_argument(
        "--format", required=True, choices=("imagefolder", "parquet"), help="without soft labels, or with"
    )
    export.add_argument("destination", metavar="DEST", help="a folder that is empty or not there yet, or its URI")
    export.set_defaults(run=_export)
    check = commands.add_parser("check", help="verify a distilled data set")
    check.add_argument("path", metavar="PATH", help="a path or URI such as runs/digits/distilled")
    check.set_defaults(run=_check)
    return parser


def _counts(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} should be whole numbers from 1, such as 1,8,64")
    return tuple(map(int, numbers))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} should be a number above 0")
    return number


def _load(arguments: argparse.Namespace) -> Recipe:
    flags = {"storage": arguments.storage, "cluster.address": arguments.address}
    given = {key: value for key, value in flags.items() if value is not None}
    return load_recipe(arguments.recipe, arguments.overrides, given)


def _distill(arguments: argparse.Namespace) -> None:
    recipe = _load(arguments)
    # imported after the recipe is known to be right: torch and Ray take seconds
    from teddy_ray.flow import distill
    from teddy_ray.progress import Progress
    from teddy_ray.storage import Storage
    from teddy_ray.tables import results_table

    print(results_table(distill(recipe, Progress(form=recipe.logs.form)), Storage(recipe.storage)))


def _plan(arguments: argparse.Namespace) -> None:
    recipe = _load(arguments)
    from teddy_ray.flow import prepare
    from teddy_ray.progress import Progress
    from teddy_ray.sweeps.checked import preview, winner_name
    from teddy_ray.tables import plan_table

    # the folder of its name is the sweep's
    alone = recipe if recipe.sweep is None else recipe.model_copy(update={"name": winner_name(recipe)})
    prepared = prepare(alone, Progress().say)
    if recipe.sweep is not None:
        print("The recipe without its sweep:\n")
    plan, storage = prepared.plan, prepared.storage
    print(plan_table(plan, storage, workers=arguments.workers, run=arguments.rates, teraflops=arguments.teraflops))
    if recipe.sweep is not None:
        print(f"\n{preview(recipe, Progress())}")


def _compare(arguments: argparse.Namespace) -> None:
    comparison = load_comparison(arguments.file, arguments.overrides, arguments.storage)
    given = {} if arguments.address is None else {"cluster.address": arguments.address}
    layout = expand(comparison, arguments.file, arguments.overrides, given)
    from teddy_ray.comparison.compare import compare
    from teddy_ray.progress import Progress

    text, failures = compare(layout, Progress())
    print(text)
    if failures:
        reasons = "; ".join(f"run {name}: {reason}" for name, reason in failures.items())
        raise StageError("compare", f"{len(failures)} of {len(layout.runs)} runs", reasons)


def _sweep(arguments: argparse.Namespace) -> None:
    recipe = _load(arguments)
    from teddy_ray.sweeps.space import sweep_of

    sweep_of(recipe)  # before torch and Ray are imported
    from teddy_ray.progress import Progress
    from teddy_ray.sweeps.sweep import sweep

    text, failures = sweep(recipe, Progress(form=recipe.logs.form))
    print(text)
    if failures:
        reasons = "; ".join(f"trial {number}: {reason}" for number, reason in failures.items())
        raise StageError("sweep", f"{len(failures)} trials", reasons)


def _export(arguments: argparse.Namespace) -> None:
    from teddy_ray.exports import export

    print(export(arguments.path, arguments.format, arguments.destination))


def _check(arguments: argparse.Namespace) -> None:
    from teddy_ray.published import card_is_published, check_set

    facts = check_set(arguments.path)
    num_images = facts["images_per_class"] * len(facts["classes"])
    print(
        f"{arguments.path}: {num_images} images of {len(facts['classes'])} classes, "
        f"{_labels_of(facts['labels'])}; every byte of them is as published"
    )
    if not card_is_published(arguments.path, facts):
        print("The card README.md is not the published one: it was edited, which it may be, or is gone.")


def _labels_of(labels: Mapping[str, Any]) -> str:
    if labels["mode"] == "none":
        return "labelled by the members that lie beside them"
    return "one soft label each" if labels["averaged"] else f"{labels['num_views']} labelled views each"


if __name__ == "__main__":
    sys.exit(main())
