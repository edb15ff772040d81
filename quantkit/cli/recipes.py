"""`quantkit recipes`: the shipped recipes, and lint for the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Reply, render_json
from quantkit.cli.helping import HelpfulCommand, HelpfulGroup
from quantkit.cli.layout import make_table
from quantkit.cli.options import JsonOption, OverridesOption, QuietOption, given
from quantkit.errors import RecipeError
from quantkit.ggml_types import GGUF
from quantkit.recipe import (
    Recipe,
    find_recipe,
    json_schema,
    load_recipe,
    read_recipe_text,
    shipped_recipes,
)

app = typer.Typer(
    name="recipes",
    cls=HelpfulGroup,
    help="List, show and check recipes.",
    epilog="Example: quantkit recipes list",
)


_HEADINGS = ("recipe", "scheme", "group", "method", "what it is for")


@app.command("list", cls=HelpfulCommand, epilog="Example: quantkit recipes list")
def list_recipes(json: JsonOption = False, quiet: QuietOption = False) -> Reply:
    """List the shipped recipes."""
    rows = [(path, load_recipe(path)) for path in shipped_recipes()]
    document = [
        {"name": path.stem, "summary": _summary(path), "recipe": recipe.model_dump(mode="json")}
        for path, recipe in rows
    ]
    cells = [
        (path.stem, *_describe(recipe), recipe.quantize.method, _summary(path))
        for path, recipe in rows
    ]
    return Reply(document, [make_table([_HEADINGS, *cells], has_titles=True)])


def _describe(recipe: Recipe) -> tuple[str, str]:
    """The scheme or the types of GGUF files, and the group size where there is one."""
    quantize = recipe.quantize
    types = [str(export.type) for export in recipe.export if export.format == GGUF]
    if recipe.only_gguf:
        return ", ".join(types), ""
    return ", ".join([quantize.scheme, *types]), str(quantize.group_size)


@app.command(
    "show", cls=HelpfulCommand, epilog="Example: quantkit recipes show awq4 > my-recipe.yaml"
)
def show_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name, or a file.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Print a recipe, to read it or to start from it."""
    path = find_recipe(recipe)
    text = read_recipe_text(path)
    return Reply({"name": path.stem, "path": str(path), "text": text}, [text.rstrip("\n")])


@app.command("check", cls=HelpfulCommand, epilog="Example: quantkit recipes check my-recipe.yaml")
def check_recipes(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names or files.")],
    overrides: OverridesOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Check recipes: their keys, types and values, without a model."""
    checked: list[tuple[str, Recipe]] = []
    problems: list[str] = []
    for name in recipes:
        try:
            checked.append((name, load_recipe(name, **given(overrides=overrides))))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    document = [
        {"name": name, "recipe": recipe.model_dump(mode="json")} for name, recipe in checked
    ]
    return Reply(document, [f"{name}: ok" for name, _ in checked])


@app.command(
    "schema", cls=HelpfulCommand, epilog="Example: quantkit recipes schema > recipe.schema.json"
)
def print_schema(json: JsonOption = False, quiet: QuietOption = False) -> Reply:
    """Print the JSON schema of recipes, for editors to complete and check them."""
    schema = json_schema()
    return Reply(schema, [render_json(schema).rstrip("\n")])


def _summary(path: Path) -> str:
    """The first comment line of a recipe."""
    for line in read_recipe_text(path).splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
