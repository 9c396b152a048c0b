"""Training signals: how strongly the steps of a training moved each factor of an adapter along its gradient.

LIVAR weighs clients by them, see :func:`fedmerge.merging.signals.livar`. They are kept in the report of every training
and leave the client only if a merge of the run needs them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fedmerge.adapter import Adapter
from fedmerge.client.local_domain import LocalDomain
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.seeding import generator

SPREAD_USERS = 1000  # users of a spread, at most


class SignalSums:
    """Sums over steps of |⟨∇_A L, A_before - A_after⟩| and |⟨∇_B L, B_before - B_after⟩|, for every module.

    The gradient is the one of the step, before the optimiser changes it.

    Source: LIVAR, arXiv:2507.06813, section on training signals.
    """

    def __init__(
        self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], start: tuple[float, ...] | None = None
    ) -> None:
        """Take the factors of every module, which the optimiser changes in place, and the sums so far.

        Args:
            factors: module -> lora_A, lora_B.
            start: :attr:`values` of an earlier part of the training; None: zeros.
        """
        self._names = list(factors)
        self._factors = [factor for pair in factors.values() for factor in pair]
        self._sums = torch.zeros(len(self._factors), dtype=torch.float64)
        if start is not None:
            self._sums = torch.tensor(start, dtype=torch.float64)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the optimiser step that is made inside."""
        before = [factor.detach().clone() for factor in self._factors]
        yield
        products = [
            torch.zeros((), device=earlier.device)
            if factor.grad is None
            else torch.dot(factor.grad.flatten().float(), (earlier - factor.detach()).flatten().float())
            for factor, earlier in zip(self._factors, before, strict=True)
        ]
        self._sums += torch.stack(products).abs().cpu().double()

    @property
    def values(self) -> tuple[float, ...]:
        """The sums so far, A and B of one module after the other; exact in JSON."""
        return tuple(self._sums.tolist())

    def of_modules(self) -> dict[str, tuple[float, float]] | None:
        """Return module -> (I_A, I_B), rounded to float32; None if a sum is not finite or not known."""
        sums = self._sums.float()
        if not sums.isfinite().all():
            return None
        return {name: (pair[0], pair[1]) for name, pair in zip(self._names, sums.view(-1, 2).tolist(), strict=True)}


def spread_of_users(domain: LocalDomain, adapter: Adapter, seed: int) -> float:
    """Compute 1 - ‖mean u‖² over vectors of length 1 of up to 1,000 training users: the trace of their covariance.

    Args:
        domain: the client's domain; it has a training user.
        adapter: the expert that encodes the users.
        seed: seed of the experiment, from which the users are drawn.

    Returns:
        A number in [0, 1], of float32 precision; 0 if all users have one vector.

    Source: LIVAR, arXiv:2507.06813, variance of features by class.
    Differs: a text encoder has no classes, so there is one number a client.
    """
    sequences = domain.training_sequences
    drawn = generator(seed, "client", domain.manifest.name, "spread").permutation(len(sequences))[:SPREAD_USERS]
    packed = domain.packed([sequences[user] for user in sorted(drawn.tolist())])
    with applied(domain.backbone, adapter):
        mean = encode(domain.backbone, packed).double().mean(dim=0)  # (d,)
    return float((1 - mean @ mean).clamp(0, 1).float())
