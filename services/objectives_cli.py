"""`stalewise objectives`: list the recipes, show one, compute one on a batch from a file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from services.settings import parse_assignments

objectives_app = typer.Typer(help="The losses: list them, show one, compute one on a batch from a file.")


@objectives_app.callback(invoke_without_command=True)
def list_objectives(context: typer.Context) -> None:
    """List all recipes."""
    if context.invoked_subcommand is not None:
        return
    from learner.objectives.catalog import catalog

    for row in catalog():
        needs = ", ".join(row.columns) or "no column"
        head = f"{row.name}   {row.paper}; divided by {row.denominator}; needs {needs}"
        print("\n    ".join((head, row.loss, *row.pieces, row.use)) + "\n")


@objectives_app.command()
def show(name: str) -> None:
    """Print one recipe: the sentence of its loss, its source, its options."""
    from learner.objectives.catalog import described

    print(described(name))


@objectives_app.command("eval")
def evaluate(
    name: str,
    batch: Annotated[Path, typer.Argument(help="JSON file; docs/objectives.md has the format.")],
    options: Annotated[
        list[str], typer.Option("--set", metavar="OPTION=VALUE", help="Override one option; may be repeated.")
    ] = [],  # noqa: B006  typer never changes it
) -> None:
    """Print loss, d loss / d log-prob of every token, and metrics as JSON."""
    from learner.objectives.batch_file import evaluated

    print(json.dumps(evaluated(name, parse_assignments(options), batch), indent=2))
