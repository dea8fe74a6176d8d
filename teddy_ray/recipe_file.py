"""Recipes as YAML: read with overrides, checked, every problem named by its dotted key; and written."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from teddy_ray.contradictions import contradictions
from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Part, Recipe

P = TypeVar("P", bound=Part)


def load_recipe(path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply `a.b=value` overrides (values are YAML), then `values` by dotted key, as they are.

    Raises InputError with every problem: unknown keys, wrong types, values out of range, contradictions.
    """
    tree = read_mapping("RECIPE", path, "write a mapping of sections, such as data: and synthesis:")
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
            set_key(tree, key, value)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return parse_recipe(tree)


def parse_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Check a nested mapping and freeze it. Raises InputError with every problem."""
    recipe = check_part(Recipe, _with_empty_sections(Recipe, tree), "RECIPE")
    if problems := list(contradictions(recipe)):
        raise InputError(problems)
    return recipe


def read_mapping(what: str, path: str | Path, remedy: str) -> dict[Any, Any]:
    """The mapping that a YAML file holds. `what` is the file's name on the command line."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Problem(what, str(path), f"name a readable YAML file ({error})")]) from None
    tree = _parse_yaml(what, text)
    if not isinstance(tree, dict):
        raise InputError([Problem(what, str(path), remedy)])
    return tree


def check_part(part: type[P], tree: Mapping[str, Any], what: str) -> P:
    """The mapping as a typed part. Raises InputError with every unknown key and every value that cannot be."""
    try:
        # By way of JSON, so that strict checking still takes a list where a tuple is meant.
        text = json.dumps(tree, default=str)
    except (TypeError, ValueError) as error:
        raise InputError([Problem(what, str(tree)[:80], f"write plain keys and values ({error})")]) from None
    try:
        return part.model_validate_json(text)
    except ValidationError as error:
        raise InputError(_merge(_to_problem(part, detail) for detail in error.errors())) from None


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


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Raises InputError where a part of it holds a value."""
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise InputError([Problem(key, value, f"{section!r} holds a value in the recipe, not further keys")])
    tree[leaf] = value


_ALTERNATIVE = re.compile(r"literal\[.*\]|constrained-.*|bool|tuple\[.*\]|LabelMembers")
"""Pydantic's names for the types of a key that may be of several, which stand behind the key."""


def _to_problem(part: type[Part], detail: Any) -> Problem:
    *pieces, last = (str(piece) for piece in detail["loc"])
    key = ".".join(piece for piece in pieces if not _ALTERNATIVE.fullmatch(piece))
    key += f".{last}" if key else last
    if detail["type"] == "extra_forbidden":
        return Problem(key, detail["input"], closest_key(part, detail["loc"]))
    if _ALTERNATIVE.fullmatch(last):
        key = key.rpartition(".")[0]
    if detail["type"] == "tuple_type":
        return Problem(key, detail["input"], f"should be a list, such as [{detail['input']}]")
    if detail["type"] == "too_short":
        return Problem(key, detail["input"], f"should have at least {detail['ctx']['min_length']} item")
    if detail["type"] == "model_type":
        return Problem(
            key, detail["input"], f"should be a mapping, with keys among {', '.join(_keys_at(part, detail['loc']))}"
        )
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
    # of several types the one whose inside is wrong was meant
    return [problem for key, problem in by_key.items() if not any(other.startswith(f"{key}.") for other in by_key)]


def closest_key(part: type[Part], location: Sequence[int | str]) -> str:
    """What to do about a key that its part does not have."""
    valid = _keys_at(part, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key; {hint}valid here: {', '.join(valid)}"


def _keys_at(part: type[Part], location: Sequence[int | str]) -> list[str]:
    """The keys that what stands at a place has."""
    for piece in location:
        if isinstance(piece, str) and piece in part.model_fields:  # not a place in a list, nor one of several types
            part = part_within(part.model_fields[piece].annotation) or part
    return list(part.model_fields)


def part_within(annotation: Any) -> type[Part] | None:
    """The part of a field that holds one, a list of them, or one among other types; None where it holds none."""
    return next(_parts_within(annotation), None)


def _parts_within(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts_within(inner)
