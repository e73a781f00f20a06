"""What can go wrong while learning; each message says what was seen and what to do."""

from buffer.errors import StalewiseError


class NonFiniteGradient(StalewiseError, ArithmeticError):
    """A gradient is nan or infinite; the weights were left as they were."""

    exit_code = 4


class GradientSpike(StalewiseError, ArithmeticError):
    """A gradient is far longer than those before it; the weights were left as they were."""

    exit_code = 4


class TooManySkips(StalewiseError):
    """So many updates in a row were skipped that the run gets nowhere."""

    exit_code = 4


class TrustRegionClosed(StalewiseError):
    """A gate closed every token for so many updates that the run learns nothing any more."""

    exit_code = 5


class RankLost(StalewiseError):
    """Another rank of the same learner is gone: what can be known of it stands in its own log."""

    exit_code = 6


class CorruptCheckpoint(StalewiseError):
    """A checkpoint directory is not one that this learner wrote for this model."""

    exit_code = 2
