"""Drawing tokens: vLLM's semantics and order, vectorised over rows with settings of their own.

Legend: B rows (one next token each), V vocabulary.

temperature first; then min_p, top_k and top_p, each over what the one before it kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buffer.types import SamplingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """Sampling settings as columns."""

    temperature: Tensor  # [B, 1] float32
    top_p: Tensor  # [B, 1] float32
    top_k: Tensor  # [B, 1] int64, V where off
    min_p: Tensor  # [B, 1] float32
    truncates: Tensor  # [B, 1] bool
    any_truncates: bool

    @staticmethod
    def of(settings: Sequence[SamplingSettings], *, vocab_size: int) -> "RowSettings":
        """Stack the settings of B rows."""
        return RowSettings(
            temperature=torch.tensor([[s.temperature] for s in settings]),
            top_p=torch.tensor([[s.top_p] for s in settings]),
            top_k=torch.tensor([[min(s.top_k or vocab_size, vocab_size)] for s in settings]),
            min_p=torch.tensor([[s.min_p] for s in settings]),
            truncates=torch.tensor([[s.truncates] for s in settings]),
            any_truncates=any(s.truncates for s in settings),
        )

    def rows(self, index: Tensor) -> "RowSettings":
        """Return the settings of some rows; `index` is [b] int64."""
        truncates = self.truncates[index]
        return RowSettings(
            temperature=self.temperature[index],
            top_p=self.top_p[index],
            top_k=self.top_k[index],
            min_p=self.min_p[index],
            truncates=truncates,
            any_truncates=bool(truncates.any()),
        )


def sampling_logprobs(logits: Tensor, settings: RowSettings) -> Tensor:
    """Return log-probs [B, V] float32 of the distribution that is really sampled: -inf where truncation cut.

    A cut distribution is renormalised over the kept tokens.
    """
    scaled = logits.float() / settings.temperature
    if settings.any_truncates:
        scaled = scaled.masked_fill(~_kept(scaled, settings), -torch.inf)
    return scaled.log_softmax(-1)


def draw(logprobs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per row; return ids [B] int64 and their log-probs [B] float32."""
    ids = torch.multinomial(logprobs.exp(), 1, generator=generator)
    return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1)


def _kept(scaled: Tensor, settings: RowSettings) -> Tensor:
    """Return bool [B, V]: the tokens that survive truncation; the most likely one always does."""
    ascending, order = scaled.sort(-1)
    # P < min_p P_max, in logits
    ascending = ascending.masked_fill(ascending < ascending[:, -1:] + settings.min_p.log(), -torch.inf)
    threshold = ascending.gather(1, ascending.shape[1] - settings.top_k)
    ascending = ascending.masked_fill(ascending < threshold, -torch.inf)  # ties at the threshold stay
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
    cut &= settings.top_p < 1  # rounding: with top_p off a tiny probability may sum to 0
    cut[:, -1] = False
    return (~cut & (ascending > -torch.inf)).scatter(1, order, ~cut & (ascending > -torch.inf))
