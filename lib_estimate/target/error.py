"""The error of vectors: how far what the U-Net predicts under them is from what it predicts under the prompt.

Two ways to sum it up over noise levels, because they predict different things. Weighted by dsigma^2, what each step
moves sigma by, it is what the finished latents are off by, to first order (d xhat = eps dsigma, Karras et al. 2022):
among prompts it says which pictures differ. Pooled, every level counts alike: among vectors made for one prompt it
ranks best which come closest.
"""

from __future__ import annotations

from torch import Tensor

from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import Conditioning, Session
from lib_estimate.target.bank import Bank, noise_under


def squared(eps: Tensor, bank: Bank, *, weighted: bool) -> float:
    """Sum over a bank's entries of |eps - eps(target)|^2, each times dsigma^2 where `weighted`."""
    each = (eps - bank.target).square().flatten(1).sum(1)
    return float((each * bank.weight.to(each) if weighted else each).sum())


def share_of_empty(eps: Tensor, bank: Bank, *, weighted: bool = False) -> float:
    """The squared error as a share of the empty prompt's. eps `[M, c, h, w]`."""
    whole = squared(bank.empty, bank, weighted=weighted)
    if whole <= 1e-9 * squared(bank.target * 2, bank, weighted=weighted):
        raise RequestError(
            "The prompt does nothing: the model answers it as it answers an empty prompt. Check its weights and words."
        )
    return squared(eps, bank, weighted=weighted) / whole


def denoising_error(session: Session, bank: Bank, conditioning: Conditioning) -> float:
    """E||eps(E) - eps(target)||^2 / E||eps(empty) - eps(target)||^2 over a bank's entries."""
    return share_of_empty(noise_under(session, bank.x, bank.timestep, conditioning), bank)


def recovered_share(error: float, unweighted_error: float | None) -> float | None:
    """1 - error / unweighted_error: 1 carries the whole emphasis, 0 as much as the prompt without weights."""
    return None if not unweighted_error else 1 - error / unweighted_error
