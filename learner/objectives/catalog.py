"""What the recipes say of themselves: a row each, or one in full."""

from dataclasses import dataclass

from learner.objectives.pieces import pieces
from learner.objectives.recipes import RECIPES, build_objective, recipe_named


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogRow:
    """One recipe in a table; its pieces and columns are those of its default options."""

    name: str
    paper: str
    loss: str
    pieces: tuple[str, ...]
    """One line a term."""
    columns: tuple[str, ...]
    denominator: str
    use: str


def catalog() -> tuple[CatalogRow, ...]:
    """Return all recipes, those for stale data first."""
    rows = []
    for name, recipe in RECIPES.items():
        objective = build_objective(name, {})
        rows.append(
            CatalogRow(
                name=name,
                paper=recipe.paper,
                loss=recipe.sentence,
                pieces=pieces(objective),
                columns=tuple(sorted(objective.columns)),
                denominator=recipe.denominator,
                use=recipe.use,
            )
        )
    return tuple(rows)


def described(name: str) -> str:
    """Return one recipe in full, as text. Raises InvalidSettings for an unknown name."""
    recipe = recipe_named(name)
    objective = build_objective(name, {})
    columns = ", ".join(sorted(objective.columns))
    options = [f"  {option} = {field.default}: {field.description}" for option, field in recipe.model_fields.items()]
    return "\n".join(
        [
            f"{name} ({recipe.paper})",
            recipe.__doc__ or "",
            f"loss = {recipe.sentence}",
            "pieces, by default:",
            *(f"  {line}" for line in pieces(objective)),
            f"divided by: {recipe.denominator}",
            f"needs: {columns or 'no column but the log-probs'}",
            f"use: {recipe.use}",
            "options:",
            *options,
        ]
    )
