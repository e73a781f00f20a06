"""Groups with random tokens and log-probs: valid, incompressible, of a stated size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from buffer.types import FinishReason, Group, SamplingSettings, Split, Trajectory, VersionSpan

RUN_ID = "benchmark"
_VOCABULARY = 151_936
_SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)


@dataclass(frozen=True)
class Payload:
    """The shape of a group."""

    name: str
    group_size: int
    tokens: int
    """Response tokens of each trajectory."""
    prompt_tokens: int = 64

    def groups(self, count: int, *, seed: int = 0) -> Iterator[Group]:
        """Yield distinct groups; the arrays of 16 groups take turns, since making them costs more than all else."""
        rng = np.random.default_rng(seed)
        members = [[self._trajectory(rng, i) for i in range(self.group_size)] for _ in range(min(count, 16))]
        for number in range(count):
            yield Group(
                run_id=RUN_ID,
                group_id=f"{seed:04}-{number:08}",
                prompt_id=f"p{number % 1000}",
                split=Split.TRAIN,
                trajectories=tuple(members[number % len(members)]),
            )

    def _trajectory(self, rng: np.random.Generator, number: int) -> Trajectory:
        return Trajectory(
            trajectory_id=f"t{number}",
            prompt_ids=rng.integers(0, _VOCABULARY, self.prompt_tokens, np.int32),
            response_ids=rng.integers(0, _VOCABULARY, self.tokens, np.int32),
            response_mask=np.ones(self.tokens, np.bool_),
            behavior_logprobs=-rng.random(self.tokens, np.float32),
            spans=(VersionSpan(start=0, end=self.tokens, version=0),),
            sampling=_SAMPLING,
            reward=float(number % 2),
            finish_reason=FinishReason.STOP,
        )


SIZES = {
    2: Payload("2 KB", 1, 155),
    20: Payload("20 KB", 8, 212),
    200: Payload("200 KB", 8, 2710),
}
"""By KB of the encoded group: what is compared with Reverb, whose items are as many random bytes."""

SHAPES = [Payload(f"8 x {tokens}", 8, tokens) for tokens in (128, 1024, 8192)]
TINY = Payload("tiny", 1, 4, 2)
