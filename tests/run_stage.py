"""One stage of a recipe, on artifacts of the stages before it: python run_stage.py STAGE RECIPE."""

import contextlib
import sys
from importlib import import_module

from teddy_ray.flow import prepare
from teddy_ray.progress import Progress
from teddy_ray.recipe_file import load_recipe
from teddy_ray.stages.session import Session

if __name__ == "__main__":
    stage, path = sys.argv[1:]
    recipe = load_recipe(path)
    prepared = prepare(recipe)
    module = import_module(f"teddy_ray.stages.{stage}")
    with contextlib.closing(
        Session(prepared.plan, prepared.source, prepared.storage, Progress(form=prepared.plan.recipe.logs.form))
    ) as session:
        module.run(session)
    prepared.storage.close_session()
