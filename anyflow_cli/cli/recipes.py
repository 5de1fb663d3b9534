"""``anyflow recipes``: list, show, copy and check recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result
from anyflow_cli.errors import UsageError

recipes_app = typer.Typer(help="List, show, copy and check recipes.", rich_markup_mode="rich")


@recipes_app.callback(invoke_without_command=True)
def _list_if_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list", epilog=options.examples("anyflow recipes list"))
def list_recipes(as_json: options.JsonOption = False, debug: options.DebugOption = False) -> None:
    """List the shipped recipes and what each is for."""
    from anyflow_cli.recipe.load import recipe_names

    found = {name: options.load_settings(name).description for name in recipe_names()}
    print_result(found, as_json=as_json)


@recipes_app.command(
    "show",
    epilog=options.examples("anyflow recipes show tiny", "anyflow recipes show tiny --set distill.steps=9"),
)
def show(
    recipe: options.RecipeArgument = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Print a recipe with all its values resolved, as YAML that is itself a recipe."""
    from anyflow_cli.recipe.compare import dump

    settings = options.load_settings(recipe, assignments)
    print_result(settings.model_dump(mode="json"), as_json=as_json, text=dump(settings).rstrip())


@recipes_app.command("copy", epilog=options.examples("anyflow recipes copy tiny mine.yaml"))
def copy(
    recipe: options.RecipeArgument,
    target: options.TargetArgument,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Copy a recipe to a file of your own, to edit and to use by its path."""
    from anyflow_cli.recipe.load import find_recipe
    from anyflow_cli.recipe.yaml_source import recipe_text

    text = recipe_text(*find_recipe(recipe))
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target} is not the name of a recipe file.", f"Name it {target}.yaml.")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{target} exists and was not changed.", "Choose another name.") from error
    except FileNotFoundError as error:
        raise UsageError(f"There is no directory {target.parent}.", "Create it first.") from error
    print_result({"recipe": target}, as_json=as_json, text=str(target))


@recipes_app.command(
    "validate",
    epilog=options.examples("anyflow recipes validate mine.yaml", "anyflow recipes validate tiny tiny-long"),
)
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Shipped recipes or YAML files.")],
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Check recipes and report all their mistakes at once."""
    wrong: list[UsageError] = []
    for recipe in recipes:
        try:
            options.load_settings(recipe)
        except UsageError as error:
            wrong.append(error)
    if wrong:
        raise UsageError("\n".join(error.message for error in wrong), wrong[0].hint)
    print_result(
        {"valid": recipes}, as_json=as_json, text="\n".join(f"{recipe}: valid" for recipe in recipes)
    )
