"""Which groups a weighted draw takes next, in the memory of one process: the meaning of buffer/lua/weighting.lua.

Every group has an exponential clock that goes off at a rate of its weight; a draw takes the groups whose clocks go off
next and starts these clocks again (Efraimidis and Spirakis 2006, kept running from draw to draw). What is kept of a
clock is what is left of it times the weight, an exponential variable of mean 1 whatever the weight is: a new weight
changes how fast it runs, not what is left. A clock that goes off twice within one draw is owed, and drawn next time:
so the share of a group in all draws is its weight / total weight, until that means more than once in every draw.
"""

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from buffer.prompts import PromptCounts
from buffer.selectors import Choice
from buffer.types import Group, PolicyVersion
from buffer.weighting import DifficultyWeighting, RankWeighting, RecencyWeighting, Weighting, difficulty

MOST_OWED = 8.0
"""Draws that a group is owed at most: one whose share is above one per draw must not be owed ever more."""

MAX_REWEIGHED = 64
"""Stored groups of a prompt, newest first, whose weight follows its success rate: bounds the cost of an insert."""

_MAX_OCTAVES = 1000.0
"""Weights lie within 2 ^ +-1000 of a reference, inside float64; beyond, nothing is ever drawn anyway."""


@dataclass(slots=True)
class _Place:
    """A group in the index."""

    number: float
    """Its weight; log2 of it where the weighting is recency; the priority where it is rank."""
    left: float
    """What is left of its clock x weight."""
    prompt_id: str
    uses: int = 0
    rests_until: PolicyVersion = -1


class WeightedIndex:
    """The groups of a MemoryTable by sequence number, with what a weighted draw needs to know of them."""

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting
        self._places: dict[int, _Place] = {}
        self._resting: set[int] = set()
        self._by_prompt: dict[str, list[int]] = {}  # ascending
        self._top = 0.0
        self.left_behind = 0

    @property
    def num_eligible(self) -> int:
        """Groups that a draw may take."""
        return len(self._eligible())

    def add(self, sequence: int, group: Group, latest: PolicyVersion, prompt: PromptCounts, lot: float) -> None:
        """Enter a new group; `prompt` are the counts of its prompt, this group included."""
        self._places[sequence] = _Place(self._first_number(group, latest, prompt), lot, group.prompt_id)
        siblings = self._by_prompt.setdefault(group.prompt_id, [])
        if isinstance(self._weighting, DifficultyWeighting):
            for sibling in siblings[-MAX_REWEIGHED:]:
                self._places[sibling].number = self._places[sequence].number
            self.left_behind += max(0, len(siblings) - MAX_REWEIGHED)
        siblings.append(sequence)

    def remove(self, sequence: int) -> None:
        """Take a group out."""
        siblings = self._by_prompt[self._places.pop(sequence).prompt_id]
        siblings.remove(sequence)
        self._resting.discard(sequence)

    def set_number(self, sequence: int, number: float, lot: float) -> None:
        """Give a group another weight or priority; the lot counts if it had weight 0 before."""
        place = self._places[sequence]
        if not place.number:
            place.left = lot
        place.number = number
        self._top = max(self._top, number)

    def hand_out(self, sequence: int, clock: PolicyVersion) -> None:
        """Note one use, whichever selector it came by."""
        place = self._places[sequence]
        place.uses += 1
        if isinstance(self._weighting, RankWeighting) and self._weighting.cool_down_updates:
            place.rests_until = clock + self._weighting.cool_down_updates
            self._resting.add(sequence)

    def wake(self, clock: PolicyVersion) -> None:
        """Let the groups be drawn again whose cool-down is over."""
        self._resting = {sequence for sequence in self._resting if self._places[sequence].rests_until > clock}

    def draw(self, num_groups: int, taken: Collection[int], lots: Sequence[float]) -> list[Choice]:
        """Choose `num_groups` groups, none of them `taken`."""
        if isinstance(self._weighting, RankWeighting):
            ranked = sorted((-self._rank(i, self._weighting), i) for i in self._eligible() if i not in taken)
            return [Choice(sequence) for _, sequence in ranked[:num_groups]]
        weights = self._weights()
        total = sum(weights.values()) - sum(weights.get(sequence, 0.0) for sequence in taken)
        due = {sequence: self._places[sequence].left / weight for sequence, weight in weights.items()}
        first = heapq.nsmallest(num_groups + len(taken), ((due[i], i) for i in weights))
        drawn: list[int] = []
        passed = []
        for _, sequence in first:
            if len(drawn) < num_groups:
                passed.append(sequence)
                if sequence not in taken:
                    drawn.append(sequence)
        self._run(weights, max(0.0, due[passed[-1]]))
        for sequence, lot in zip(passed, lots, strict=False):
            place = self._places[sequence]
            # what went off while it could not be drawn is void, what it is owed beyond the bound is forgiven
            place.left = lot + (0.0 if sequence in taken else max(place.left, -MOST_OWED))
        num_candidates = len(weights.keys() - taken)
        return [Choice(sequence, min(1.0, weights[sequence] / total), num_candidates) for sequence in drawn]

    def _run(self, weights: dict[int, float], time: float) -> None:
        """Let all clocks run for `time`."""
        for sequence, weight in weights.items():
            self._places[sequence].left -= weight * time

    def _first_number(self, group: Group, latest: PolicyVersion, prompt: PromptCounts) -> float:
        match self._weighting:
            case RecencyWeighting(half_life_updates=half_life):
                version = max(latest, 0) if group.oldest_version is None else group.oldest_version
                return version / half_life
            case DifficultyWeighting():
                return difficulty(prompt.seen, prompt.solved)
            case _:
                return self._top or 1.0

    def _weights(self) -> dict[int, float]:
        """Return the weight of each group that has one above 0."""
        if not isinstance(self._weighting, RecencyWeighting):
            return {sequence: place.number for sequence, place in self._places.items() if place.number}
        newest = max(place.number for place in self._places.values())
        return {i: 2.0 ** max(place.number - newest, -_MAX_OCTAVES) for i, place in self._places.items()}

    def _eligible(self) -> list[int]:
        if isinstance(self._weighting, RankWeighting):
            return [sequence for sequence in self._places if sequence not in self._resting]
        if isinstance(self._weighting, RecencyWeighting):
            return list(self._places)
        return [sequence for sequence, place in self._places.items() if place.number]

    def _rank(self, sequence: int, weighting: RankWeighting) -> float:
        place = self._places[sequence]
        return place.number - weighting.decay_per_use * place.uses
