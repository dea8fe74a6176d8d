"""The files of cluster/: every field is one that exists, and commands, paths and recipes in them are right. Offline."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from teddy_ray.cli import _parser
from teddy_ray.plan import STAGES
from teddy_ray.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
KUBERAY = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")
RAY_UP = ("aws.yaml", "gcp.yaml")
FILLED_IN = {
    "IMAGE": "registry.example/teddy-ray:1",
    "AMI": "ami-0123456789abcdef0",
    "PROJECT": "a-project",
    "DATA": "s3://bucket/imagenet",
    "STORAGE": "s3://bucket/teddy",
    "OPTIONS": "",
}
"""What a person exports before the commands of the README."""

REFUSED = (ValidationError, ValueError, AssertionError)
"""The schemas' word, and Ray's own two."""


@functools.cache
def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def schema(name: str) -> Draft202012Validator:
    content = yaml.safe_load((ROOT / "tests" / "schemas" / name).read_text())
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


KUBERAY_SCHEMA, RAY_UP_SCHEMA = schema("kuberay.yaml"), schema("ray_up.yaml")


def check(name: str, content: Any) -> None:
    """Raises one of REFUSED where a field is none or has a wrong value."""
    if name in KUBERAY:
        KUBERAY_SCHEMA.validate(content)
    else:
        RAY_UP_SCHEMA.validate(content)
        validate_config(prepare_config(copy.deepcopy(content)))


def keys(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from keys(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from keys(value, (*path, index))


def parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path[:-1]:
        tree = tree[step]
    return tree


def own_copy(tree: Any) -> Any:
    """YAML's anchors make one object of several places; here each is its own."""
    return json.loads(json.dumps(tree))


@pytest.mark.parametrize("name", [*KUBERAY, *RAY_UP])
def test_every_field_exists(name: str) -> None:
    check(name, read(name))


@pytest.mark.parametrize("name", [*KUBERAY, *RAY_UP])
def test_a_misspelt_field_is_refused(name: str) -> None:
    passed = []
    for path in keys(read(name)):
        if path[:2] == ("spec", "rayClusterSpec") and len(path) > 2:  # the other file's, and checked there
            continue
        content = own_copy(read(name))
        holder = parent(content, path)
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
        try:
            check(name, content)
        except REFUSED:
            continue
        passed.append(path)
    assert passed == []


@pytest.mark.parametrize(
    "path", [("idle_timeout_minutes",), ("docker", "image"), ("available_node_types", "gpu", "resources")]
)
@pytest.mark.parametrize("name", RAY_UP)
def test_rays_own_validation_refuses_a_misspelt_field(name: str, path: tuple[str, ...]) -> None:
    content = own_copy(read(name))
    validate_config(prepare_config(own_copy(content)))
    holder = parent(content, path)
    holder[f"{path[-1]}x"] = holder.pop(path[-1])
    with pytest.raises(REFUSED):
        validate_config(prepare_config(content))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("authOptions", "mode"), "tokens"),
        (("autoscalerOptions", "version"), "2"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("workerGroupSpecs", 0, "minReplicas"), "0"),
        (("workerGroupSpecs", 0, "template", "spec", "tolerations", 0, "effect"), "NoSchedul"),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"), "36GB"),
        (("rayVersion",), "2.60"),
    ],
)
def test_a_wrong_value_is_refused(path: tuple[Any, ...], value: Any) -> None:
    content = own_copy(read("kuberay/raycluster.yaml"))
    parent(content["spec"], path)[path[-1]] = value
    with pytest.raises(ValidationError):
        check("kuberay/raycluster.yaml", content)


def cluster_spec() -> Any:
    return read("kuberay/raycluster.yaml")["spec"]


def test_both_kuberay_files_describe_one_cluster() -> None:
    assert read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"] == cluster_spec()


def test_kuberay_runs_the_version_of_ray_that_the_image_has() -> None:
    assert f"ray=={cluster_spec()['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()


def test_workers_are_where_the_head_must_not_be_on_spot_nodes() -> None:
    def terms(group: Any) -> Any:
        affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
        return affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    (head,), workers = terms(cluster_spec()["headGroupSpec"]), terms(cluster_spec()["workerGroupSpecs"][0])
    spot = [expression for term in workers for expression in term["matchExpressions"]]
    assert len(spot) == len(workers), "terms are alternatives, expressions of one are not"
    assert [{**one, "operator": "NotIn"} for one in spot] == head["matchExpressions"]


@pytest.mark.parametrize("name", [*KUBERAY, *RAY_UP])
def test_gpu_workers_grow_from_none(name: str) -> None:
    if name in RAY_UP:
        content = read(name)
        gpu = content["available_node_types"]["gpu"]
        assert (gpu["min_workers"], gpu["max_workers"]) == (0, content["max_workers"])
        assert content["available_node_types"][content["head_node_type"]]["resources"] == {"CPU": 0}
        return
    assert cluster_spec()["enableInTreeAutoscaling"]
    assert cluster_spec()["workerGroupSpecs"][0]["minReplicas"] == 0
    assert cluster_spec()["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_workers_alone_are_on_spot_capacity() -> None:
    aws, gcp = (read(name)["available_node_types"] for name in RAY_UP)
    assert aws["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]


def test_every_node_asks_for_the_token() -> None:
    assert cluster_spec()["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text().splitlines()
    for name in RAY_UP:
        assert read(name)["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_nothing_listens_for_the_world_and_nothing_is_reported() -> None:
    text = "\n".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file() and path.name != "README.md")
    assert "0.0.0.0" not in text
    starts = [line for line in text.replace("\n    ", " ").splitlines() if re.search(r"ray start\b", line)]
    heads = [line for line in starts if "--head" in line]
    assert len(heads) == 2  # slurm.sh has its flags apart; test_cluster_slurm.py looks at them
    assert all("--dashboard-host=127.0.0.1" in line for line in heads)
    assert all("--disable-usage-stats" in line for line in starts if "ulimit" in line)
    assert "RAY_USAGE_STATS_ENABLED=0" in text
    for name in RAY_UP:
        assert "security_group" not in read(name)["provider"]


# -- the image ---------------------------------------------------------------------------------------------------


def instructions(word: str) -> list[str]:
    text = re.sub(r"(?m)^#.*\n", "", (CLUSTER / "Dockerfile").read_text()).replace("\\\n", " ")
    return [line.removeprefix(word).strip() for line in text.splitlines() if line.startswith(f"{word} ")]


def test_the_base_image_is_pinned_to_a_python_that_the_constraints_are_of() -> None:
    (base,) = instructions("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert copied == sent
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_is_no_roots_and_has_what_runs_in_it() -> None:
    assert instructions("USER")[-1] == "1000"
    assert "useradd --uid 1000" in "".join(instructions("RUN"))
    assert {"g++", "rsync", "openssh-client", "wget"} <= set("".join(instructions("RUN")).split())
    pod = cluster_spec()["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 1000)


def test_everything_in_the_image_is_of_the_constraints() -> None:
    installs = [line for line in instructions("RUN") if line.startswith("pip install")]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in line for line in installs)
    (_, extras), required = installs, (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in required for extra in re.search(r"\[([a-z,]+)\]", extras).group(1).split(","))  # type: ignore[union-attr]


# -- commands ----------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The shell commands of a Markdown file's indented blocks, continued lines joined."""
    return [
        line.strip()
        for block in re.findall(r"(?m)(?:^ {4}.*\n)+", text)
        for line in block.replace("\\\n", " ").splitlines()
        if not line.strip().startswith("#")
    ]


def filled_in(text: str) -> str:
    for name, value in {**FILLED_IN, "OPTIONS": trial_options()}.items():
        text = re.sub(rf"\${name}\b", value, text)
    return text.replace("$PWD/", "")


def trial_options() -> str:
    (line,) = (line for line in commands(README) if line.startswith('export OPTIONS="'))
    return line.removeprefix('export OPTIONS="').removesuffix('"')


def own_commands() -> list[list[str]]:
    """What is said to `teddy-ray` anywhere in cluster/: subcommand and arguments."""
    lines = [filled_in(line) for line in commands(README)]
    lines += [line.removeprefix("#").strip() for line in (CLUSTER / "slurm.sh").read_text().splitlines()]
    lines += [filled_in(re.sub(r"\b([A-Z]{4,})\b", r"$\1", read("kuberay/rayjob.yaml")["spec"]["entrypoint"]))]
    found = []
    for line in lines:
        if "pipelines/recipes/" not in line:
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "teddy-ray":
            found.append(words[1:])
        else:
            entry = next(i for i, word in enumerate(words) if word.endswith(("distill.py", "slurm.sh")))
            assert (ROOT / words[entry].removeprefix("/home/ray/")).is_file()
            found.append(["distill", *words[entry + 1 :]])
    return found


def test_the_commands_are_found() -> None:
    assert [words[0] for words in own_commands()].count("plan") == 1
    assert len(own_commands()) == 6


@pytest.mark.parametrize("words", own_commands(), ids=" ".join)
def test_commands_flags_recipes_and_keys_are_right(words: list[str]) -> None:
    arguments = _parser().parse_args(words)
    recipe = ROOT / arguments.recipe.removeprefix("/home/ray/")
    load_recipe(str(recipe), arguments.overrides, {"storage": arguments.storage})


def test_every_worker_of_the_recipe_fits_a_node_and_a_training_all_of_them() -> None:
    arguments = _parser().parse_args(own_commands()[-1])
    recipe = load_recipe(str(ROOT / arguments.recipe.removeprefix("/home/ray/")), arguments.overrides, {})
    (group,) = cluster_spec()["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    for part in (getattr(recipe, stage) for stage in STAGES):
        assert part.threads <= int(limits["cpu"])
        assert 0 < part.gpus_per_worker <= int(limits["nvidia.com/gpu"]) == 1
    counts = {group["maxReplicas"], *(read(name)["max_workers"] for name in RAY_UP)}
    assert min(counts) >= recipe.pool.workers_per_base


@pytest.mark.parametrize("name", [*KUBERAY, *RAY_UP])
def test_the_readme_fills_in_all_that_is_left_open(name: str) -> None:
    (line,) = (line for line in commands(README) if line.startswith("sed ") and f"cluster/{name}" in line)
    command = re.split(r"[|>]", line)[0]
    environment = {**FILLED_IN, "OPTIONS": trial_options(), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    content = yaml.safe_load(done.stdout)
    check(name, content)
    left = re.findall(rf"\b({'|'.join(FILLED_IN)})\b", json.dumps(content))
    assert left == []
    assert FILLED_IN["IMAGE"] in done.stdout


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (CLUSTER / target).exists()] == []
