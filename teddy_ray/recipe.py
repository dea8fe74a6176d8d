"""The recipe: one YAML file, typed and frozen. Every field says whether it can change the bytes of the result.

`Result` fields enter fingerprints; `Execution` fields (workers, address, storage) never do.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teddy_ray.errors import InputError, Problem


class Role(Enum):
    """Whether a field can change the bytes of the result."""

    RESULT = "result"
    EXECUTION = "execution"


T = TypeVar("T")
Result = Annotated[T, Role.RESULT]
Execution = Annotated[T, Role.EXECUTION]

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Workers = Annotated[int, Field(ge=1)] | Literal["auto"]


class Part(BaseModel):
    """A section of the recipe: frozen, unknown keys forbidden, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Augmentation(Part):
    """A random resized crop and flip, drawn per image."""

    crop_scale: Result[tuple[Positive, Positive]] = (0.5, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    crop_ratio: Result[tuple[Positive, Positive]] = (0.75, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: Result[bool] = True
    """Mirror half of the images left to right."""


class Placed(Part):
    """A stage whose work runs on Ray workers."""

    num_workers: Execution[Workers] = "auto"
    """Workers, all of which the cluster must hold; auto: as many as it holds. Never more than there is work for."""
    gpus_per_worker: Execution[NonNegative] = 0.0
    """GPUs (or a share of one) per worker; 0 runs on CPUs."""
    threads: Result[Count] = 1
    """CPU threads per worker. They change the order of floating-point sums, hence the bytes."""


class Data(Part):
    """What is distilled."""

    source: Result[str]
    """`sklearn:digits`, a folder of class folders, or a Parquet file or folder of Parquet files."""
    test_source: Result[str | None] = None
    """The test split, in the same form. Without it `test_fraction` of the source is set aside."""
    test_fraction: Result[Fraction] = 0.2
    """Share of each class that becomes the test split where there is no `test_source`."""
    validation: Result[Fraction] = 0.1
    """Share of each class left out of training, moments, starts and controls; pool accuracies use it."""
    image_size: Result[Annotated[int, Field(ge=4)]] = 32
    """Height and width of all images, in pixels; others are resized and centre-cropped."""
    channels: Result[Literal[1, 3]] = 3
    """1 for greyscale, 3 for RGB; images are converted."""
    classes: Result[Annotated[tuple[str, ...], Field(min_length=1)] | None] = None
    """Use these classes alone, in this order."""
    limit_per_class: Result[Count | None] = None
    """Use at most so many training images of each class (those with the smallest id hashes)."""
    image_column: Result[str] = "image"
    """Parquet: column of images, either encoded bytes or struct<bytes, path>."""
    label_column: Result[str] = "label"
    """Parquet: column of labels, either integers or class names."""


class Pool(Placed):
    """The models M whose statistics S has to match."""

    generation: Result[Literal["prior"]] = "prior"
    """prior: snapshots of an early training trajectory."""
    architectures: Result[Annotated[tuple[str, ...], Field(min_length=1)]] = ("convnet",)
    """Architectures of the bases, such as `convnet:width=32` or `resnet18`."""
    seeds: Result[Annotated[tuple[Seed, ...], Field(min_length=1)]] = (0,)
    """One base per architecture and seed."""
    snapshots: Result[Annotated[tuple[Count, ...], Field(min_length=1)]] = (2, 4, 6, 8, 10)
    """Epochs after which a base is kept as a member; the last one ends its training."""
    batch_size: Result[Count] = 64
    """Images per training step."""
    learning_rate: Result[Positive] = 2e-3
    """Peak rate of AdamW, after a warm-up of one epoch; cosine to 0 at the last snapshot."""
    weight_decay: Result[NonNegative] = 0.01
    """AdamW's weight decay."""
    augmentation: Result[Augmentation] = Augmentation()
    """Augmentation of the bases' training."""


class Statistics(Placed):
    """The targets RM and RV of Eq. 7."""

    source: Result[Literal["moments", "buffers"]] = "moments"
    """moments: exact per-class moments from one pass over the data. buffers: the running statistics that BatchNorms
    keep from training, as in the paper; needs scope global and members with BatchNorms alone."""
    scope: Result[Literal["subset", "global", "blend"]] = "subset"
    """Targets of a unit: the mixture of its own classes, of all classes, or both losses blended."""
    blend: Result[Fraction] = 0.5
    """Weight of the global loss under `scope: blend`; the subset loss has the rest."""
    view: Result[Literal["augmented", "plain"]] = "augmented"
    """augmented: one draw of `synthesis.augmentation` per image; plain: the images as they are."""
    chunk_size: Result[Count | Literal["auto"]] = "auto"
    """Images per chunk: what one worker measures at a time and what is lost with it. Chunks follow the data's own
    order. auto: a 64th of the data in whole batches, 1,000 at least. Data in random order needs storage, until it is
    merged, for the moments of nearly all classes per chunk."""
    batch_size: Result[Count] = 100
    """Images per forward pass."""
    kernels: Result[bool | Literal["auto"]] = "auto"
    """On CPUs: own C++ kernels, as `synthesis.kernels`. auto: where there is a C++ compiler to build them."""
    decoders: Execution[Count] = 1
    """Threads of each worker that decode images ahead of the models."""


class Curriculum(Part):
    """Easier views in the first part of the steps. The last views are those of `synthesis.augmentation`, of which
    the statistics are taken."""

    share: Result[Fraction] = 0.5
    """Share of the steps that the curriculum takes."""
    crop_scale: Result[tuple[Positive, Positive] | None] = None
    """Crop scale at the first step; moves in a straight line to that of `synthesis.augmentation`."""
    image_size: Result[Annotated[int, Field(ge=4)] | None] = None
    """Height and width of the views in that part, in pixels: fewer make its steps cheaper. Needs models that take
    images of any size."""


class Mosaic(Part):
    """`start: mosaic`: an image starts as a grid of patches of its class, each the best of several by the pool."""

    grid: Result[Annotated[int, Field(ge=2)]] = 2
    """Patches along each side of an image; should divide data.image_size."""
    candidates: Result[Count] = 5
    """Patches drawn for each place, of which the one with the lowest cross-entropy under the pool is kept."""
    crop_scale: Result[tuple[Positive, Positive]] = (0.5, 1.0)
    """Smallest and largest share of a real image that a patch shows."""


class Synthesis(Placed):
    """Optimisation of S by Eq. 7."""

    images_per_class: Result[Count] = 10
    """Synthetic images per class (IPC)."""
    steps: Result[Count] = 500
    """Optimiser steps per unit."""
    models_per_step: Result[Count] = 1
    """n: members drawn without replacement at each step."""
    ce_weight: Result[NonNegative] = 1.0
    """u: weight of the cross-entropy."""
    first_layer_factor: Result[NonNegative] = 1.0
    """w of the first tapped layer; all others have 1 (SRe2L uses 10)."""
    normalise_layers: Result[bool] = False
    """Divide each layer's term by the root of its channels, so that u carries over between architectures."""
    tv_weight: Result[NonNegative] = 0.0
    """Weight of a prior: total variation, the summed absolute differences of neighbouring pixels of an image."""
    l2_weight: Result[NonNegative] = 0.0
    """Weight of a prior: summed squared distances of an image's pixels from grey."""
    learning_rate: Result[Positive] = 0.02
    """Peak rate of Adam (0.5, 0.9), in units of the pixel range [0, 1]; cosine to 0."""
    start: Result[Literal["real", "mosaic", "noise"]] = "real"
    """What the images start from: random real images of their class, mosaics of scored patches, or noise."""
    mosaic: Result[Mosaic] = Mosaic()
    """How mosaics are made."""
    augmentation: Result[Augmentation] = Augmentation()
    """A: what S passes through before the models see it."""
    curriculum: Result[Curriculum] = Curriculum()
    """Easier views in the first part of the steps; none by default."""
    classes_per_unit: Result[Count] = 10
    """Classes optimised together. Units of disjoint classes run at the same time."""
    slots_per_unit: Result[Count] = 10
    """Images of each class optimised together. A larger IPC keeps the units of a smaller one
    wherever this divides it; small blocks carry poor statistics."""
    precision: Result[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of activations and weights; statistics, losses and images are fp32 always. auto: what the device does fast."""
    compile: Result[bool | Literal["auto", "graphs"]] = "auto"
    """Compile the models with torch.compile; graphs: into CUDA graphs. auto: where a unit's work is worth the
    warm-up, without graphs."""
    kernels: Result[bool | Literal["auto"]] = "auto"
    """On CPUs in fp32: own C++ kernels, 3x3 convolutions by Winograd's algorithm and statistics in one pass. auto:
    where there is a C++ compiler to build them."""
    checkpoint_s: Execution[NonNegative] = 60.0
    """Seconds between two checkpoints of a unit: what a lost worker costs at most."""


class Labels(Placed):
    """Soft labels of the ensemble, one per image and view."""

    views: Result[Count] = 100
    """Augmented views per image that are labelled. A student's epochs take them in turn, from the first again
    after the last."""
    temperature: Result[Positive] = 1.0
    """tau of the softmax, for labels and students alike."""
    augmentation: Result[Augmentation] = Augmentation()
    """What makes a view of an image."""
    batch_size: Result[Count] = 100
    """Images per labelling batch; batches follow the image ids."""
    images_per_file: Result[Count] = 1000
    """Images per Parquet file of a labelled set."""


Control = Literal["random_soft", "random_hard", "full_data"]


class Evaluation(Placed):
    """What the distilled set is worth: accuracy of students on the test split, beside controls."""

    students: Result[Annotated[tuple[str, ...], Field(min_length=1)]] = ("convnet",)
    """Architectures of the students; the first one gives the headline."""
    seeds: Result[Annotated[tuple[Seed, ...], Field(min_length=1)]] = (0, 1, 2)
    """One student per seed; random controls draw a new subset for each."""
    epochs: Result[Count] = 300
    """Passes over a small set; the last one counts."""
    batch_size: Result[Count] = 25
    """Images per student step."""
    learning_rate: Result[Positive] = 2e-3
    """Peak rate of AdamW; cosine to 0."""
    weight_decay: Result[NonNegative] = 0.01
    """AdamW's weight decay."""
    controls: Result[tuple[Control, ...]] = ("random_soft", "random_hard", "full_data")
    """What is trained beside the distilled set, under the same student recipe."""
    full_data_epochs: Result[Count] = 30
    """Passes over the whole training set for `full_data`."""


class Cluster(Part):
    """Where the work runs."""

    address: Execution[str | None] = None
    """Address of a running Ray cluster (`auto` to find it); none starts Ray on this machine."""
    wait_s: Execution[NonNegative] = 600.0
    """Seconds to wait for an autoscaler to bring resources; without one nothing is waited for."""


class Recipe(Part):
    """A whole distillation."""

    name: Execution[Name]
    """Name of the run: results go to runs/<name>/."""
    seed: Result[Seed] = 0
    """Seed of every draw after the pool."""
    storage: Execution[str] = "."
    """Where artifacts/ and runs/ lie: a path or any URI that pyarrow.fs opens."""
    data: Result[Data]
    pool: Result[Pool] = Pool()
    statistics: Result[Statistics] = Statistics()
    synthesis: Result[Synthesis] = Synthesis()
    labels: Result[Labels] = Labels()
    evaluation: Result[Evaluation] = Evaluation()
    cluster: Execution[Cluster] = Cluster()


def load_recipe(path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply `a.b=value` overrides (values are YAML), then `values` by dotted key, as they are.

    Raises InputError with every problem: unknown keys, wrong types, values out of range, contradictions.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Problem("RECIPE", str(path), f"name a readable YAML file ({error})")]) from None
    tree = _parse_yaml("RECIPE", text)
    if not isinstance(tree, dict):
        raise InputError([Problem("RECIPE", str(path), "write a mapping of sections, such as data: and synthesis:")])
    problems: list[Problem] = []
    settings: list[tuple[str, Any]] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        try:
            if not separator or not key:
                raise InputError([Problem("--set", override, "write it as section.key=value")])
            settings.append((key, _parse_yaml(key, text)))
        except InputError as error:
            problems += error.problems
    for key, value in [*settings, *(values or {}).items()]:
        try:
            _set_key(tree, key, value)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return parse_recipe(tree)


def parse_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Check a nested mapping and freeze it. Raises InputError with every problem."""
    tree = _with_empty_sections(Recipe, tree)
    try:
        # By way of JSON, so that strict checking still takes a list where a tuple is meant.
        text = json.dumps(tree, default=str)
    except (TypeError, ValueError) as error:
        raise InputError([Problem("RECIPE", str(tree)[:80], f"write plain keys and values ({error})")]) from None
    try:
        recipe = Recipe.model_validate_json(text)
    except ValidationError as error:
        raise InputError(_merge(_to_problem(detail) for detail in error.errors())) from None
    if problems := list(_contradictions(recipe)):
        raise InputError(problems)
    return recipe


def _with_empty_sections(part: type[Part], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A section whose keys are all commented out is null in YAML: it means the defaults."""
    filled = dict(tree)
    for key, info in part.model_fields.items():
        if isinstance(info.default, Part) and key in tree:
            value = {} if tree[key] is None else tree[key]
            filled[key] = _with_empty_sections(type(info.default), value) if isinstance(value, dict) else value
    return filled


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default resolved."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def result_fields(part: Part) -> dict[str, Any]:
    """The fields of a part that can change bytes, nested, as plain JSON values."""
    fields: dict[str, Any] = {}
    for name, info in type(part).model_fields.items():
        if Role.RESULT not in info.metadata:
            continue
        value = getattr(part, name)
        fields[name] = result_fields(value) if isinstance(value, Part) else value
    return fields


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-3 is a number, and that a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse_yaml(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise InputError([Problem(key, text[:80], f"write valid YAML ({' '.join(str(error).split())})")]) from None


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise InputError([Problem(key, value, f"{section!r} holds a value in the recipe, not further keys")])
    tree[leaf] = value


_ALTERNATIVE = re.compile(r"literal\[.*\]|constrained-.*|bool")
"""Pydantic's names for the types of a key that may be of several, which stand behind the key."""


def _to_problem(detail: Any) -> Problem:
    pieces = [str(piece) for piece in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        return Problem(".".join(pieces), detail["input"], _closest_key(detail["loc"]))
    key = ".".join(piece for piece in pieces if not _ALTERNATIVE.fullmatch(piece))
    if detail["type"] == "tuple_type":
        return Problem(key, detail["input"], f"should be a list, such as [{detail['input']}]")
    if detail["type"] == "missing":
        return Problem(key, None, "this key is required")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(key, detail["input"], message.replace("input should", "should").replace("string should", "should"))


def _merge(problems: Iterable[Problem]) -> Iterable[Problem]:
    """One problem per key: a key of several possible types has one for each."""
    by_key: dict[str, Problem] = {}
    for problem in problems:
        other = by_key.get(problem.key)
        by_key[problem.key] = (
            problem if other is None else Problem(other.key, other.value, f"{other.remedy}, or {problem.remedy}")
        )
    return by_key.values()


def _closest_key(location: tuple[int | str, ...]) -> str:
    part: Any = Recipe
    for piece in location[:-1]:
        part = part.model_fields[str(piece)].annotation
    valid = list(part.model_fields)
    close = difflib.get_close_matches(str(location[-1]), valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key; {hint}valid here: {', '.join(valid)}"


def _contradictions(recipe: Recipe) -> Iterable[Problem]:
    """What no single field's type can say."""
    augmentations = {
        "pool.augmentation": recipe.pool.augmentation,
        "synthesis.augmentation": recipe.synthesis.augmentation,
        "labels.augmentation": recipe.labels.augmentation,
    }
    scales: dict[str, tuple[float, float] | None] = {
        "synthesis.mosaic.crop_scale": recipe.synthesis.mosaic.crop_scale,
        "synthesis.curriculum.crop_scale": recipe.synthesis.curriculum.crop_scale,
    }
    for key, augmentation in augmentations.items():
        scales[f"{key}.crop_scale"] = augmentation.crop_scale
        if augmentation.crop_ratio[0] > augmentation.crop_ratio[1]:
            yield Problem(f"{key}.crop_ratio", list(augmentation.crop_ratio), "should be [low, high] with low <= high")
    for key, scale in scales.items():
        if scale is not None and not scale[0] <= scale[1] <= 1:
            yield Problem(key, list(scale), "should be [low, high] with low <= high <= 1")
    if recipe.statistics.source == "buffers" and recipe.statistics.scope != "global":
        remedy = "should be global where statistics.source is buffers: they know no classes"
        yield Problem("statistics.scope", recipe.statistics.scope, remedy)
    size, grid = recipe.data.image_size, recipe.synthesis.mosaic.grid
    if recipe.synthesis.start == "mosaic" and size % grid:
        yield Problem("synthesis.mosaic.grid", grid, f"should divide data.image_size, {size}")
    view_size = recipe.synthesis.curriculum.image_size
    if view_size is not None and view_size > size:
        yield Problem("synthesis.curriculum.image_size", view_size, f"should be at most data.image_size, {size}")
    for stage in ("pool", "statistics", "synthesis", "labels", "evaluation"):
        gpus = getattr(recipe, stage).gpus_per_worker
        if gpus > 1 and gpus != int(gpus):
            yield Problem(f"{stage}.gpus_per_worker", gpus, "should be a share below 1 or a whole number")
    if list(recipe.pool.snapshots) != sorted(set(recipe.pool.snapshots)):
        yield Problem("pool.snapshots", list(recipe.pool.snapshots), "should be epochs in rising order, each once")
    lists: dict[str, tuple[Any, ...]] = {
        "pool.seeds": recipe.pool.seeds,
        "pool.architectures": recipe.pool.architectures,
        "evaluation.seeds": recipe.evaluation.seeds,
        "evaluation.students": recipe.evaluation.students,
        "evaluation.controls": recipe.evaluation.controls,
        "data.classes": recipe.data.classes or (),
    }
    for key, values in lists.items():
        if len(set(values)) < len(values):
            yield Problem(key, list(values), "should name each only once")
    num_members = len(recipe.pool.architectures) * len(recipe.pool.seeds) * len(recipe.pool.snapshots)
    if recipe.synthesis.models_per_step > num_members:
        yield Problem(
            "synthesis.models_per_step",
            recipe.synthesis.models_per_step,
            f"should be at most {num_members}, the members of the pool (architectures x seeds x snapshots)",
        )
