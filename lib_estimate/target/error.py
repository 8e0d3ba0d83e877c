"""The error of vectors: how far what the U-Net predicts under them is from what it predicts under the prompt."""

from __future__ import annotations

from torch import Tensor

from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import Conditioning, Session
from lib_estimate.target.bank import Bank, noise_under


def denoising_error(session: Session, bank: Bank, conditioning: Conditioning) -> float:
    """E||eps(E) - eps(target)||^2 / E||eps(empty) - eps(target)||^2 over a bank's entries."""
    return share_of_empty(noise_under(session, bank.x, bank.timestep, conditioning), bank)


def share_of_empty(eps: Tensor, bank: Bank) -> float:
    whole = (bank.empty - bank.target).square().sum()
    if whole <= 1e-9 * bank.target.square().sum():
        raise RequestError(
            "The prompt does nothing: the model answers it as it answers an empty prompt. Check its weights and words."
        )
    return float((eps - bank.target).square().sum() / whole)


def recovered_share(error: float, unweighted_error: float | None) -> float | None:
    """1 - error / unweighted_error: 1 carries the whole emphasis, 0 as much as the prompt without weights."""
    return None if not unweighted_error else 1 - error / unweighted_error
