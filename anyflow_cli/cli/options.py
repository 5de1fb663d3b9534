"""What every verb shares: options, the recipe behind them, and the register of what is printed.

How a verb's file looks (``recipes.py`` is the model), e.g. ``cli/distill.py``::

    EXAMPLES = examples("anyflow distill", "anyflow distill --recipe mine.yaml --set distill.steps=200")

    def distill(
        recipe: RecipeOption = DEFAULT_RECIPE,
        assignments: SetOption = None,
        runs: RunsOption = DEFAULT_RUNS,
        seed: SeedOption = None,
        dry_run: DryRunOption = False,
        as_json: JsonOption = False,
        debug: DebugOption = False,
    ) -> None:
        '''Stage 2: on-policy distillation of an any-step model.'''      # the first line is the help
        settings = resolve(recipe, assignments, {"--seed": ("distill.seed", seed)})
        paths = RunPaths(runs, settings.name)
        if dry_run:
            return print_dry_run("distill", {"steps": settings.distill.steps, ...}, as_json=as_json)
        from anyflow_cli.train... import ...                              # heavy imports here, never above
        with Progress("distill", settings.distill.steps) as progress:
            model = run(settings, paths, on_step=progress.update)
        print_result({"model": model}, as_json=as_json)

and a line of its own in the table of ``app.py``. The function takes parsed options, has no tensors, and lets
every error pass: ``app.main`` words them. Results go to stdout by ``print_result``; everything else is logged
(``logging.getLogger(__name__).info``), which ends on stderr. A test calls ``app.main([...])``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from anyflow_cli.cli.console import print_dry_run, print_result, set_debug
from anyflow_cli.errors import UsageError

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe

__all__ = ["examples", "load_settings", "parse_steps", "print_dry_run", "print_result"]

DEFAULT_RECIPE = "tiny"
DEFAULT_RUNS = Path("runs")
RECIPE_PANEL = "Recipe"
OUTPUT_PANEL = "Output"

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", metavar="NAME|PATH", rich_help_panel=RECIPE_PANEL,
        help="A shipped recipe (`anyflow recipes list`) or a YAML file.",
    ),
]  # fmt: skip
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", rich_help_panel=RECIPE_PANEL, show_default=False,
        help="Override one value of the recipe, e.g. distill.steps=100; may be repeated.",
    ),
]  # fmt: skip
RunsOption = Annotated[
    Path,
    typer.Option(
        "--runs", metavar="DIR", rich_help_panel=OUTPUT_PANEL,
        help="Where all runs lie; this one in DIR/RECIPE.",
    ),
]  # fmt: skip
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="N", rich_help_panel=RECIPE_PANEL, show_default=False,
        help="Seed instead of the recipe's.",
    ),
]  # fmt: skip
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", rich_help_panel=OUTPUT_PANEL, help="Check everything, print what would be done."
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT_PANEL, help="Print the result as JSON.")
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", rich_help_panel=OUTPUT_PANEL, callback=set_debug, envvar="ANYFLOW_DEBUG",
        show_envvar=False, help="Log more, and show the traceback of an error.",
    ),
]  # fmt: skip


def load_settings(
    recipe: str,
    assignments: Iterable[str] | None = None,
    options: Mapping[str, tuple[str, Any]] | None = None,
) -> Recipe:
    """Load a recipe with the command line's overrides.

    Args:
        recipe: What ``--recipe`` gave.
        assignments: What ``--set`` gave.
        options: Other options that stand for a key, as ``{"--nfe": ("sample.nfe", (1, 4))}``; None leaves the
            recipe's value. They win over ``--set``, and a bad value is reported under the option's name.
    """
    from anyflow_cli.recipe.load import Override, load_recipe

    given = ((option, key, value) for option, (key, value) in (options or {}).items() if value is not None)
    return load_recipe(
        recipe, [*(assignments or ()), *(Override(key, value, option) for option, key, value in given)]
    )


def parse_steps(text: str | None) -> tuple[int, ...] | None:
    """Read ``--nfe 1,4,32``; whether the numbers are in range is for the recipe to say."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--nfe takes step counts such as 1,4,32, not {text!r}.", "Write --nfe 1,4,32."
        ) from None


def examples(*lines: str) -> str:
    """Write the examples that end a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [dim]$[/dim] {escape(line)}" for line in lines)])
