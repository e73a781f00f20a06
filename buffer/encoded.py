"""A drawn group whose record is still bytes: what goes from a store to the wire without being read."""

from typing import NamedTuple

from buffer.codec import read_group
from buffer.quick import made
from buffer.types import Sample, SampleInfo


class EncodedSample(NamedTuple):
    """One drawn group."""

    record: bytes
    """What `encode_group` wrote."""
    probability: float
    num_candidates: int
    times_sampled: int
    age_updates: int | None

    def info(self) -> dict[str, float | int | None]:
        """Return the SampleInfo as a plain map."""
        return {
            "probability": self.probability,
            "num_candidates": self.num_candidates,
            "times_sampled": self.times_sampled,
            "age_updates": self.age_updates,
        }

    def decoded(self) -> Sample:
        """Return the sample. Raises InvalidRecord when the record is damaged."""
        return made(Sample, {"group": read_group(self.record), "info": made(SampleInfo, self.info())})
