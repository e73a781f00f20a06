"""Which groups come next: selectors as records, so that a request, a recipe and a log can all name one."""

from typing import Annotated, Literal

from pydantic import Field

from buffer.types import Record


class Fifo(Record):
    """Oldest insert first, whether or not it was handed out before."""

    kind: Literal["fifo"] = "fifo"


class Uniform(Record):
    """Every sampleable group alike, without replacement within a draw."""

    kind: Literal["uniform"] = "uniform"


class Fresh(Record):
    """Only groups that were never handed out, oldest first."""

    kind: Literal["fresh"] = "fresh"


class Mix(Record):
    """A share of fresh groups, the rest by another selector; ids within a draw are distinct."""

    kind: Literal["mix"] = "mix"
    fresh: Annotated[float, Field(gt=0, lt=1)]
    """Share of the draw that must never have been handed out, rounded to whole groups, at least one."""
    rest: Fifo | Uniform = Uniform()


Selector = Annotated[Fifo | Uniform | Fresh | Mix, Field(discriminator="kind")]
