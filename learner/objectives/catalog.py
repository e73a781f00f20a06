"""What the recipes say of themselves: a row each, or one in full."""

from dataclasses import dataclass

from learner.objectives.recipes import RECIPES, build_objective, recipe_named


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogRow:
    """One recipe in a table; its columns are those of its default options."""

    name: str
    paper: str
    loss: str
    columns: tuple[str, ...]
    denominator: str
    use: str


def catalog() -> tuple[CatalogRow, ...]:
    """Return all recipes, those for stale data first."""
    return tuple(
        CatalogRow(
            name=name,
            paper=recipe.paper,
            loss=recipe.sentence,
            columns=tuple(sorted(build_objective(name, {}).columns)),
            denominator=recipe.denominator,
            use=recipe.use,
        )
        for name, recipe in RECIPES.items()
    )


def described(name: str) -> str:
    """Return one recipe in full, as text: its sentence, source, denominator, options. Raises InvalidSettings."""
    recipe = recipe_named(name)
    columns = ", ".join(sorted(build_objective(name, {}).columns))
    options = [f"  {option} = {field.default}: {field.description}" for option, field in recipe.model_fields.items()]
    return "\n".join(
        [
            f"{name} ({recipe.paper})",
            recipe.__doc__ or "",
            f"loss = {recipe.sentence}",
            f"divided by: {recipe.denominator}",
            f"needs: {columns or 'no column but the log-probs'}",
            f"use: {recipe.use}",
            "options:",
            *options,
        ]
    )
