"""Which drawn groups may be trained on: the age gate once more after prefetch, and what this model can read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from buffer.staleness import age_updates, is_too_old
from buffer.types import Group, PolicyVersion, Sample, Trajectory
from learner.tokens import DIVERGENCES, Column


class Refusal(StrEnum):
    """Why a drawn group is not trained on; each is counted under its own name."""

    OVER_AGE = "over_age"
    FROM_THE_FUTURE = "from_the_future"
    TOO_LONG = "too_long"
    UNKNOWN_TOKEN = "unknown_token"
    NO_DISTRIBUTION = "no_distribution"

    def __bool__(self) -> bool:
        raise TypeError("a Refusal is not a truth value: compare it with None")


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The bounds that a group must keep to be trained on."""

    max_age_updates: int | None
    """The table's hard age gate; None = no gate."""
    vocab_size: int
    max_positions: int
    """Longest sequence of the model, prompt and response, in tokens."""
    columns: frozenset[Column] = frozenset()
    """What the objective needs: its divergences need distributions."""

    def split(
        self, samples: Sequence[Sample], *, clock: PolicyVersion
    ) -> tuple[list[Sample], Counter[Refusal], list[str]]:
        """Return the admitted samples, the refused ones by reason, and one sentence for each refused one."""
        admitted: list[Sample] = []
        refused: Counter[Refusal] = Counter()
        sentences: list[str] = []
        for sample in samples:
            refusal = self._refusal(sample.group, clock)
            if refusal is None:
                admitted.append(sample)
            else:
                refused[refusal[0]] += 1
                sentences.append(f"group {sample.group.group_id} is not trained on: {refusal[1]}")
        return admitted, refused, sentences

    def _refusal(self, group: Group, clock: PolicyVersion) -> tuple[Refusal, str] | None:
        if is_too_old(clock, group.oldest_version, self.max_age_updates):
            age = age_updates(clock, group.oldest_version)
            return Refusal.OVER_AGE, f"it is {age} updates old, the gate is at {self.max_age_updates}"
        if group.newest_version is not None and group.newest_version > clock:
            return Refusal.FROM_THE_FUTURE, f"it claims version {group.newest_version}, the learner is at {clock}"
        for trajectory in group.trajectories:
            length = len(trajectory.prompt_ids) + len(trajectory.response_ids)
            if length > self.max_positions:
                return Refusal.TOO_LONG, f"{length} tokens, the model has {self.max_positions} positions"
            ids = [trajectory.prompt_ids, trajectory.response_ids]
            if trajectory.kept_token_ids is not None:
                ids.append(trajectory.kept_token_ids)
            if trajectory.distribution_logprobs is not None and trajectory.kept_token_ids is None:
                ids.append(np.asarray([len(trajectory.distribution_logprobs) // len(trajectory.response_ids) - 1]))
            largest = max(int(array.max()) for array in ids if len(array))
            if largest >= self.vocab_size:
                return Refusal.UNKNOWN_TOKEN, f"token id {largest}, the model has {self.vocab_size}"
            if self._lacks_distribution(trajectory):
                return Refusal.NO_DISTRIBUTION, "it lacks the distributions that the objective needs"
        return None

    def _lacks_distribution(self, trajectory: Trajectory) -> bool:
        if not self.columns & DIVERGENCES:
            return False
        part_will_do = self.columns & DIVERGENCES == {Column.KL_LOWER_BOUND}
        return trajectory.distribution_logprobs is None or not (part_will_do or trajectory.distribution_is_complete)
