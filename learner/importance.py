"""How much each group of a weighted draw counts, so that the draw does not change what is estimated.

Legend: G groups of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def importance_weights(draw_rates: Sequence[float], exponent: float) -> Tensor | None:
    """Return [G] float32 (1 / (N p))^exponent of groups that were drawn at rates N p; None = all are 1.

    Their mean over many draws is 1 for an exponent of 1 (E[1 / p] = N), whatever it is in one batch: dividing by that
    of the batch would favour again what is drawn often, the more the fewer groups a batch has (arXiv 1511.05952).
    """
    weights = torch.tensor(draw_rates, dtype=torch.float64).pow(-exponent).float()
    return None if bool((weights == 1.0).all()) else weights
