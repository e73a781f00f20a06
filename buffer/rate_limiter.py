"""When: the samples-per-insert limiter on both sides, and the refusal of settings that could deadlock."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from buffer.settings import Settings


class RateLimiterSettings(Settings):
    """Pacing: the error, inserts x samples_per_insert - samples, stays within error_buffer of its value at min_size.

    The definition is Reverb's SampleToInsertRatio (reverb/rate_limiters.py, arXiv 2102.04736).
    """

    samples_per_insert: Annotated[float, Field(gt=0)] = 1.0
    """How often a group is handed out over its life, on average; higher reuses more and ages more."""
    min_size: Annotated[int, Field(ge=1)] = 1
    """Sampleable groups before the first draw. With fifo it sets the age of the data."""
    error_buffer: Annotated[float, Field(gt=0)] = 64.0
    """Slack of the limiter in draws of one group: larger lets both sides run further apart."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        smallest = 2 * max(1.0, self.samples_per_insert)
        if self.error_buffer < smallest:
            raise ValueError(
                f"error_buffer={self.error_buffer:g} must be at least {smallest:g} (2 x max(1, samples_per_insert)): "
                "smaller values can block insert and sample for ever"
            )
        return self
