"""Gradients that are far longer than those before them: a batch gone wrong, which clipping would only shrink."""

from collections import deque
from collections.abc import Sequence
from statistics import median

from learner.errors import GradientSpike

WINDOW_UPDATES = 64
"""Norms that the usual one is the median of."""
FEWEST_UPDATES = 16
"""Norms before there is a usual one: the first gradients of a run are of any length."""


class SpikeGuard:
    """Remembers the norms of the updates that were made; zeros (nothing to learn from) are not among them."""

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._norms: deque[float] = deque(maxlen=WINDOW_UPDATES)

    @property
    def norms(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self._norms)

    def restore(self, norms: Sequence[float]) -> None:
        """Take over the norms of a checkpoint."""
        self._norms = deque(norms, maxlen=WINDOW_UPDATES)

    def admit(self, norm: float) -> None:
        """Remember the norm of an update that will be made. Raises GradientSpike when it must not be."""
        if self._factor is not None and len(self._norms) >= FEWEST_UPDATES:
            usual = median(self._norms)
            if norm > self._factor * usual:
                raise GradientSpike(
                    f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}",
                    hint="lower learner.optimizer.lr, or raise learner.optimizer.spike_factor",
                )
        if norm > 0:
            self._norms.append(norm)
