"""How much each group of a weighted draw counts, so that the draw does not change what is estimated.

Legend: G groups of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def importance_weights(probabilities: Sequence[float], exponent: float) -> Tensor | None:
    """Return [G] (1 / probability)^exponent with mean 1; None when all groups count alike.

    The number of groups in the table, which 1 / (N p) starts with, drops out: dividing by the mean weight of the batch
    (self-normalised importance sampling) keeps the size of a step. Groups of probability 1 were chosen without lots,
    as the fresh part of a mix is: they count 1, and the mean is taken over the others.
    """
    by_lot = torch.tensor([probability < 1.0 for probability in probabilities])
    inverse = torch.tensor(probabilities, dtype=torch.float64).pow(-exponent)
    if not by_lot.any() or bool((inverse[by_lot] == inverse[by_lot][0]).all()):
        return None
    return torch.where(by_lot, inverse / inverse[by_lot].mean(), 1.0).float()
