from pathlib import Path

import pydantic
import pytest
import yaml

from teddy_ray.errors import InputError
from teddy_ray.recipe import Part, Recipe, Role, result_fields
from teddy_ray.recipe_file import dump_recipe, load_recipe, parse_recipe

RECIPES = Path(__file__).parents[1] / "pipelines/recipes"
DIGITS = RECIPES / "digits.yaml"
SMALL = {"name": "small", "data": {"source": "sklearn:digits"}}


def walk(part=Recipe, above=()):
    """(dotted key, field, the section's roles from the top) of every field, sections included."""
    for name, info in part.model_fields.items():
        roles = [item for item in info.metadata if isinstance(item, Role)]
        yield ".".join([*(key for key, _ in above), name]), info, [*(role for _, role in above), roles]
        if isinstance(info.annotation, type) and issubclass(info.annotation, Part):
            yield from walk(info.annotation, (*above, (name, roles)))


FIELDS = {key: (info, roles) for key, info, roles in walk()}
LEAVES = [key for key in FIELDS if not any(other.startswith(f"{key}.") for other in FIELDS)]


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def load(recipe_file):
    """A small recipe with overrides."""
    return lambda *overrides: load_recipe(recipe_file(yaml.safe_dump(SMALL)), overrides)


def problems(call, *arguments):
    """Key -> (value, remedy) of everything that is refused."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    found = {problem.key: (problem.value, problem.remedy) for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "one problem per key"
    return found


# -- fields --------------------------------------------------------------------------------------------------------


def test_the_digits_recipe_loads():
    recipe = load_recipe(DIGITS)
    assert recipe.name == "digits"
    assert recipe.data.source == "sklearn:digits"
    assert recipe.pool.snapshots == (2, 4, 6, 8, 10)
    assert recipe.pool.augmentation.flip is False


def test_the_walk_reaches_the_nested_fields():
    assert {"name", "synthesis.num_workers", "labels.augmentation.crop_scale", "cluster.wait_s"} < set(LEAVES)
    assert "labels.augmentation" not in LEAVES


@pytest.mark.parametrize("key", FIELDS)
def test_every_field_has_exactly_one_role(key):
    assert len(FIELDS[key][1][-1]) == 1


@pytest.mark.parametrize("key", LEAVES)
def test_no_result_field_lies_in_an_execution_section(key):
    *sections, role = [roles[0] for roles in FIELDS[key][1]]
    assert role is Role.EXECUTION or Role.EXECUTION not in sections


@pytest.mark.parametrize("key", LEAVES)
def test_every_field_is_described(key):
    assert FIELDS[key][0].description


def test_result_fields_leave_out_execution_fields():
    def keys(fields, prefix=""):
        for name, value in fields.items():
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    expected = {key for key in LEAVES if FIELDS[key][1][-1] == [Role.RESULT]}
    assert set(keys(result_fields(load_recipe(DIGITS)))) == expected
    assert not expected & {"name", "storage", "cluster.address", "pool.num_workers", "labels.gpus_per_worker"}
    assert {"seed", "pool.threads", "synthesis.ce_weight", "labels.augmentation.flip"} < expected


@pytest.mark.parametrize("part", ["", "synthesis", "labels.augmentation"])
def test_a_recipe_is_frozen(part):
    target = load_recipe(DIGITS)
    for name in filter(None, part.split(".")):
        target = getattr(target, name)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(target, next(iter(type(target).model_fields)), 1)


def test_a_dumped_recipe_loads_as_the_same_recipe(recipe_file):
    overrides = ["synthesis.ce_weight=1e-5", "data.classes=['1', '0']", "cluster.wait_s=0", "pool.num_workers=3"]
    overrides += ["synthesis.compile=true", "synthesis.curriculum={crop_scale: [0.9, 1], image_size: 8}"]
    recipe = load_recipe(DIGITS, overrides)
    dumped = dump_recipe(recipe)
    assert load_recipe(recipe_file(dumped)) == recipe
    assert set(yaml.safe_load(dumped)) == set(Recipe.model_fields)
    assert yaml.safe_load(dumped)["evaluation"]["weight_decay"] == 0.01


# -- problems ------------------------------------------------------------------------------------------------------

WRONG = """
seed: -1
data: {source: sklearn:digits, channels: 2, image_size: "8", classes: [a, 3], image_sise: 8}
pool:
  num_workers: none
  snapshots: []
  seeds: [0, -1]
  augmentation: {crop_scale: [0.5], flip: 1}
statistics: 3
synthesis:
  {steps: 0, ce_weight: .nan, num_workers: 0, start: reel, compile: maybe, precision: fp16, checkpoint_s: -1,
   normalise_layers: 1, tv_weight: -1, l2_weight: "0",
   mosaic: {grid: 1, candidates: 0, crop_scale: 0.5}, curriculum: {share: 1, crop_scale: [0, 1], image_size: 3}}
evaluation:
  {controls: [random_softt], loss: mse, ce_weight: -1, optimiser: adam, momentum: 1, schedule: linear,
   steps: {at: [], factor: 1}, warmup_epochs: -1, ema: 1}
"""


def test_every_problem_is_reported_at_once_with_key_value_and_remedy(recipe_file):
    found = problems(load_recipe, recipe_file(WRONG))
    assert found.pop("data.image_sise")[0] == 8
    value, remedy = found.pop("synthesis.ce_weight")
    assert value != value
    assert remedy == "should be a finite number"
    value, remedy = found.pop("pool.snapshots")
    assert value == []
    assert remedy == "should have at least 1 item"
    value, remedy = found.pop("evaluation.steps.at")
    assert value == []
    assert remedy == "should have at least 1 item"
    assert found == {
        "name": (None, "this key is required"),
        "seed": (-1, "should be greater than or equal to 0"),
        "data.channels": (2, "should be 1 or 3"),
        "data.image_size": ("8", "should be a valid integer"),
        "data.classes.1": (3, "should be a valid string"),
        "pool.num_workers": ("none", "should be a valid integer, or should be 'auto'"),
        "pool.seeds.1": (-1, "should be greater than or equal to 0"),
        "pool.augmentation.crop_scale.1": (None, "this key is required"),
        "pool.augmentation.flip": (1, "should be a valid boolean"),
        "statistics": (
            3,
            "should be a mapping, with keys among num_workers, gpus_per_worker, threads, source, scope, blend, view, "
            "chunk_size, batch_size, kernels, decoders",
        ),
        "synthesis.steps": (0, "should be greater than or equal to 1"),
        "synthesis.num_workers": (0, "should be greater than or equal to 1, or should be 'auto'"),
        "synthesis.start": ("reel", "should be 'real', 'mosaic' or 'noise'"),
        "synthesis.compile": ("maybe", "should be a valid boolean, or should be 'auto' or 'graphs'"),
        "synthesis.precision": ("fp16", "should be 'auto', 'fp32' or 'bf16'"),
        "synthesis.checkpoint_s": (-1, "should be greater than or equal to 0"),
        "synthesis.normalise_layers": (1, "should be a valid boolean"),
        "synthesis.tv_weight": (-1, "should be greater than or equal to 0"),
        "synthesis.l2_weight": ("0", "should be a valid number"),
        "synthesis.mosaic.grid": (1, "should be greater than or equal to 2"),
        "synthesis.mosaic.candidates": (0, "should be greater than or equal to 1"),
        "synthesis.mosaic.crop_scale": (0.5, "should be a list, such as [0.5]"),
        "synthesis.curriculum.share": (1, "should be less than 1"),
        "synthesis.curriculum.crop_scale.0": (0, "should be greater than 0"),
        "synthesis.curriculum.image_size": (3, "should be greater than or equal to 4"),
        "evaluation.loss": ("mse", "should be 'kl' or 'logit_mse'"),
        "evaluation.ce_weight": (-1, "should be greater than or equal to 0"),
        "evaluation.optimiser": ("adam", "should be 'adamw' or 'sgd'"),
        "evaluation.momentum": (1, "should be less than 1"),
        "evaluation.schedule": ("linear", "should be 'cosine', 'half_cosine', 'steps' or 'constant'"),
        "evaluation.steps.factor": (1, "should be less than 1"),
        "evaluation.warmup_epochs": (-1, "should be greater than or equal to 0"),
        "evaluation.ema": (1, "should be less than 1"),
        "evaluation.controls.0": (
            "random_softt",
            "should be 'random_soft', 'random_hard', 'start_soft', "
            "'start_hard', 'distilled_hard', 'distilled_plain', 'random_plain' or 'full_data'",
        ),
    }


def test_a_missing_key_of_a_section_is_named():
    assert problems(parse_recipe, {"name": "a", "data": {}}) == {"data.source": (None, "this key is required")}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sed", "did you mean 'seed'? "),
        ("synthesis.stepps", "did you mean 'steps'? "),
        ("labels.augmentation.flipp", "did you mean 'flip'? "),
        ("cluster.adress", "did you mean 'address'? "),
        ("synthesis.mosaic.gridd", "did you mean 'grid'? "),
        ("synthesis.curriculum.crop_size", "did you mean 'crop_scale'? "),
        ("synthesis.bool", ""),  # also the name of a type
        ("data.qqq", ""),
    ],
)
def test_an_unknown_key_is_answered_with_the_closest_and_all_valid_keys(load, key, hint):
    (name, (value, remedy)), *others = problems(load, f"{key}=7").items()
    assert (name, value, others) == (key, 7, [])
    section = Recipe
    for piece in key.split(".")[:-1]:
        section = section.model_fields[piece].annotation
    assert remedy == f"unknown key; {hint}valid here: {', '.join(section.model_fields)}"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_ray_client_is_refused_with_what_to_do_instead(load, address):
    """Neither Ray Train nor Ray Data runs through it."""
    ((name, (value, remedy)),) = problems(load, f"cluster.address={address}").items()
    assert (name, value) == ("cluster.address", address)
    assert remedy.startswith("should be host:port of the cluster, given on one of its nodes")
    assert "ray job submit --address http://host:8265" in remedy
    assert load("cluster.address=head:6379").cluster.address == "head:6379"


@pytest.mark.parametrize("value", ["1.5", "'3'", "true", "null", "[1]", "1e3"])
def test_types_are_not_converted_silently(load, value):
    assert set(problems(load, f"synthesis.steps={value}")) == {"synthesis.steps"}


def test_a_whole_number_serves_where_a_fraction_is_meant(load):
    weight = load("synthesis.ce_weight=2").synthesis.ce_weight
    assert (weight, type(weight)) == (2.0, float)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "a~1", "a\n"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name):
    assert set(problems(parse_recipe, {**SMALL, "name": name})) == {"name"}


@pytest.mark.parametrize(
    "key", ["data.test_fraction", "data.validation", "statistics.blend", "synthesis.curriculum.share"]
)
@pytest.mark.parametrize("value", ["0", "1", "-0.1", ".inf"])
def test_a_fraction_lies_between_0_and_1(load, key, value):
    assert set(problems(load, f"{key}={value}")) == {key}


# -- contradictions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("pool.snapshots=[4, 2]", "rising order"),
        ("pool.snapshots=[2, 2]", "rising order"),
        ("pool.seeds=[1, 1]", "only once"),
        ("pool.architectures=[convnet, convnet]", "only once"),
        ("evaluation.seeds=[0, 1, 0]", "only once"),
        ("evaluation.students=[convnet, convnet]", "only once"),
        ("evaluation.controls=[full_data, full_data]", "only once"),
        ("data.classes=['1', '1']", "only once"),
        ("pool.augmentation.crop_scale=[0.9, 0.2]", "low <= high <= 1"),
        ("labels.augmentation.crop_scale=[0.5, 1.5]", "low <= high <= 1"),
        ("synthesis.augmentation.crop_ratio=[2, 1]", "low <= high"),
        ("synthesis.mosaic.crop_scale=[0.5, 1.01]", "should be [low, high] with low <= high <= 1"),
        ("synthesis.mosaic.crop_scale=[0.6, 0.5]", "should be [low, high] with low <= high <= 1"),
        ("synthesis.curriculum.crop_scale=[0.5, 1.01]", "should be [low, high] with low <= high <= 1"),
        ("synthesis.curriculum.crop_scale=[0.6, 0.5]", "should be [low, high] with low <= high <= 1"),
        ("synthesis.curriculum.image_size=33", "should be at most data.image_size, 32"),
        ("synthesis.models_per_step=6", "at most 5, the members of the pool"),
        ("evaluation.steps.at=[0.9, 0.8]", "should be shares in rising order, each once"),
        ("evaluation.steps.at=[0.5, 0.5]", "should be shares in rising order, each once"),
        ("evaluation.warmup_epochs=30", "should be below evaluation.full_data_epochs, 30"),
        ("evaluation.learning_rate=[0.001, 0.001]", "should name each only once"),
        ("evaluation.loss=logit_mse", "needs labels.ensemble logits"),
    ],
)
def test_a_contradiction_is_refused_with_its_key_and_value(load, override, remedy):
    key, _, value = override.partition("=")
    found = problems(load, override)
    assert set(found) == {key}
    assert found[key][0] == yaml.safe_load(value)
    assert remedy in found[key][1]


def test_warm_up_may_be_longer_than_a_training_that_is_not_asked_for(load):
    overrides = ["evaluation.controls=[]", "evaluation.warmup_epochs=299"]
    assert load(*overrides).evaluation.warmup_epochs == 299
    told = {"evaluation.warmup_epochs": (299, "should be below evaluation.epochs, 299")}
    assert problems(load, *overrides, "evaluation.epochs=299") == told


@pytest.mark.parametrize(
    ("override", "key", "value", "remedy"),
    [
        ("data.image_size=9", "synthesis.formation", 2, "should divide data.image_size, 9"),
        ("evaluation.epochs=3", "evaluation.epochs", 3, "should be at least 4"),
        ("synthesis.mosaic.grid=4", "synthesis.mosaic.grid", 4, "should be synthesis.formation, 2"),
        ("labels.views=30", "labels.views", 30, "should be a multiple of 4"),
        ("labels.averaged=true", "labels.averaged", True, "one label for several images"),
        (
            "evaluation.controls=[distilled_plain]",
            "evaluation.controls",
            ["distilled_plain"],
            "should be without distilled_plain",
        ),
    ],
)
def test_what_images_within_images_cannot_go_with_is_refused(load, override, key, value, remedy):
    start = "mosaic" if "mosaic" in key else "real"
    held = ["synthesis.formation=2", f"synthesis.start={start}", "data.image_size=8", "labels.views=40"]
    assert load(*held).synthesis.formation == 2
    ((found, (given, said)),) = problems(load, *held, override).items()
    assert (found, given) == (key, value)
    assert remedy in said


def test_mosaics_whose_grid_does_not_divide_the_images_are_refused(load):
    overrides = ["synthesis.start=mosaic", "synthesis.mosaic.grid=5", "data.image_size=28"]
    assert problems(load, *overrides) == {"synthesis.mosaic.grid": (5, "should divide data.image_size, 28")}
    assert load(*overrides, "synthesis.mosaic.grid=7").synthesis.mosaic.grid == 7


@pytest.mark.parametrize("start", ["real", "noise"])
def test_a_grid_does_not_matter_where_there_are_no_mosaics(load, start):
    assert load(f"synthesis.start={start}", "synthesis.mosaic.grid=5").synthesis.mosaic.grid == 5


def test_views_of_a_curriculum_may_be_as_large_as_the_images(load):
    assert load("synthesis.curriculum.image_size=32").synthesis.curriculum.image_size == 32


def test_all_contradictions_are_reported_at_once(load):
    overrides = ["pool.snapshots=[2, 1]", "pool.seeds=[0, 0]", "synthesis.models_per_step=9"]
    assert set(problems(load, *overrides)) == {"pool.snapshots", "pool.seeds", "synthesis.models_per_step"}


def test_models_per_step_may_be_the_whole_pool(load):
    overrides = ["pool.seeds=[0, 1]", "pool.snapshots=[1, 2, 3]", "synthesis.models_per_step=6"]
    assert load(*overrides).synthesis.models_per_step == 6


def test_an_empty_list_of_classes_is_refused(load):
    assert set(problems(load, "data.classes=[]")) == {"data.classes"}


# -- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("synthesis.ce_weight=1e-3", 1e-3),
        ("synthesis.ce_weight=1E3", 1000.0),
        ("synthesis.ce_weight=.5e-1", 0.05),
        ("pool.seeds=[3, 4]", (3, 4)),
        ("evaluation.controls=[]", ()),
        ("cluster.address=null", None),
        ("cluster.address=", None),
        ("synthesis.augmentation.flip=false", False),
        ("synthesis.num_workers=auto", "auto"),
        ("synthesis.compile=auto", "auto"),
        ("synthesis.compile=true", True),
        ("synthesis.compile=false", False),
        ("synthesis.precision=bf16", "bf16"),
        ("synthesis.mosaic.crop_scale=[0.2, 1]", (0.2, 1.0)),
        ("synthesis.curriculum.crop_scale=null", None),
        ("synthesis.curriculum.crop_scale=[1, 1]", (1.0, 1.0)),
        ("synthesis.checkpoint_s=0", 0.0),
        ("data.source=s3://bucket/a=b", "s3://bucket/a=b"),
    ],
)
def test_an_override_is_yaml_and_makes_the_sections_it_needs(load, override, value):
    found = load(override)
    for piece in override.partition("=")[0].split("."):
        found = getattr(found, piece)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_of_a_key_counts_and_values_come_after(recipe_file):
    path = recipe_file(yaml.safe_dump({**SMALL, "storage": "file"}))
    assert load_recipe(path, ["storage=first", "storage=second"]).storage == "second"
    assert load_recipe(path, ["storage=first"], {"storage": "1e3", "cluster.address": "auto"}).storage == "1e3"


@pytest.mark.parametrize("override", ["synthesis.steps", "=3"])
def test_an_override_that_is_no_assignment_is_refused(load, override):
    assert problems(load, override) == {"--set": (override, "write it as section.key=value")}


def test_an_override_of_broken_yaml_is_named_by_its_key(load):
    value, remedy = problems(load, "pool.seeds=[1")["pool.seeds"]
    assert value == "[1"
    assert "valid YAML" in remedy


def test_an_override_through_a_value_is_refused(load):
    value, remedy = problems(load, "name.x=3")["name.x"]
    assert value == 3
    assert "'name' holds a value" in remedy


# -- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "name: a\ndata: {source: s, source: t}\n"])
def test_a_key_given_twice_is_refused(recipe_file, text):
    assert "stands twice" in problems(load_recipe, recipe_file(text))["RECIPE"][1]


@pytest.mark.parametrize("value", ["!!python/object/apply:os.mkdir [{0}]", "!!python/name:os.mkdir", "!custom x"])
def test_a_tag_that_could_run_code_is_refused_and_runs_nothing(recipe_file, tmp_path, load, value):
    trap = tmp_path / "trap"
    value = value.format(trap)
    assert "valid YAML" in problems(load_recipe, recipe_file(f"name: {value}\ndata: {{source: s}}"))["RECIPE"][1]
    assert "valid YAML" in problems(load, f"name={value}")["name"][1]
    assert not trap.exists()


@pytest.mark.parametrize("text", ["", "[]", "3", "a: ["])
def test_a_file_that_holds_no_mapping_is_refused(recipe_file, text):
    assert set(problems(load_recipe, recipe_file(text))) == {"RECIPE"}


@pytest.mark.parametrize("text", ["2020-01-01: x\n", "seed: &a [*a]\n"], ids=["date as key", "list inside itself"])
def test_yaml_that_has_no_plain_form_is_refused(recipe_file, text):
    assert problems(load_recipe, recipe_file(f"{text}name: a\ndata: {{source: s}}\n"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        assert problems(load_recipe, path)["RECIPE"][0] == str(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    assert set(problems(load_recipe, tmp_path / "binary.yaml")) == {"RECIPE"}


def test_sections_without_a_key_mean_their_defaults_at_every_depth():
    tree = {"name": "a", "data": {"source": "sklearn:digits"}}
    empty = {**tree, "pool": None, "synthesis": {"curriculum": None, "mosaic": None, "augmentation": {}}}
    assert parse_recipe(empty) == parse_recipe(tree)
    assert problems(parse_recipe, {**tree, "synthesis": {"curriculum": 3}}).keys() == {"synthesis.curriculum"}


@pytest.mark.parametrize("scope", ["subset", "blend"])
def test_buffers_know_no_classes(scope):
    tree = {"name": "a", "data": {"source": "sklearn:digits"}, "statistics": {"source": "buffers", "scope": scope}}
    told = "should be global where statistics.source is buffers: they know no classes"
    assert problems(parse_recipe, tree) == {"statistics.scope": (scope, told)}


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("labels.members={epoch: [1]}", "labels.members.epoch", "did you mean 'epochs'? valid here: architectures"),
        ("labels.members={epochs: 1}", "labels.members.epochs", "should be a list"),
        ("labels.members={epochs: []}", "labels.members.epochs", "at least 1 item"),
        ("evaluation.learning_rate=[1e-3, 0]", "evaluation.learning_rate.1", "should be greater than 0"),
        ("evaluation.steps={att: [0.5]}", "evaluation.steps.att", "did you mean 'at'?"),
    ],
)
def test_inside_a_key_of_several_types_the_problem_is_named_alone(load, override, key, remedy):
    found = problems(load, override)
    assert set(found) == {key}
    assert remedy in found[key][1]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_come_along_are_right_and_named_as_their_files(path):
    assert load_recipe(path, []).name == path.stem


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*_sre2l.yaml")), ids=lambda path: path.stem)
def test_sre2l_variants_have_the_data_and_students_of_their_recipe(path):
    ours = load_recipe(path, [])
    theirs = load_recipe(path.with_name(path.name.replace("_sre2l", "")), [])
    assert (ours.data.source, ours.data.image_size) == (theirs.data.source, theirs.data.image_size)
    for key in ("students", "epochs", "longer_epochs", "batch_size", "learning_rate", "schedule", "optimiser"):
        assert getattr(ours.evaluation, key) == getattr(theirs.evaluation, key), key
    assert ours.synthesis.images_per_class == theirs.synthesis.images_per_class
    assert (ours.synthesis.start, ours.synthesis.first_layer_factor) == ("noise", 10)
    assert (ours.statistics.source, ours.statistics.scope) == ("buffers", "global")
