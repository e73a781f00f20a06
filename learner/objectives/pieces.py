"""Which pieces an objective is made of, read from the objective itself: a list kept beside it would go stale."""

import inspect
from collections.abc import Callable, Iterable

from learner.objectives.composition import Composition, Constraint, Penalty, PolicyGradient, SquaredResidual, Term
from learner.objectives.objective import Advantage


def pieces(objective: Composition) -> tuple[str, ...]:
    """Return one line a term: its name and the pieces it chose, each as `factory(pieces it was made of)`."""
    return tuple(f"{term.name}: {', '.join(_of_term(term))}" for term in objective.terms)


def _of_term(term: Term) -> Iterable[str]:
    match term:
        case PolicyGradient():
            gates = [f"gate {named(gate)}" for gate in term.gates.values()]
            return (named(term.surrogate), named(term.advantage), named(term.aggregate), *gates)
        case Penalty():
            return (named(term.piece), named(term.aggregate))
        case Constraint():
            return (named(term.piece), named(term.aggregate), "dual ascent")
        case SquaredResidual():
            return (named(term.residual), "squared", named(term.aggregate))
    raise AssertionError(f"a term of a kind that the catalog does not know: {type(term).__name__}")


def named(piece: Callable[..., object]) -> str:
    """Return a piece's own name, or that of the function that made it, with the pieces which it was made of."""
    if isinstance(piece, Advantage):
        return named(piece.compute)
    assert inspect.isfunction(piece)
    factory, made_here, _ = piece.__qualname__.partition(".<locals>")
    if not made_here:
        return factory
    parts = [named(value) for value in inspect.getclosurevars(piece).nonlocals.values() if callable(value)]
    return f"{factory}({', '.join(parts)})" if parts else factory
