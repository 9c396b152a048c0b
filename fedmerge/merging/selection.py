"""Exact order statistics of rows in pieces, with one piece in memory at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch

DIGIT_BITS = 16
RADIX = 1 << DIGIT_BITS


def order_statistics(
    pieces: Callable[[], Iterable[torch.Tensor]], places: Callable[[int], Sequence[int]], magnitudes: bool = False
) -> torch.Tensor:
    """Return the values at given places of every row's ascending order, exact to the last bit.

    Radix selection from the most significant digit: each pass counts the next 16 bits of all values that share the
    digits found so far. float32 takes two passes, float64 four. Memory is K · J · 65,536 counters.

    Args:
        pieces: every call yields the same (K, n_i) tensors, finite, float32 or float64.
        places: n = Σ n_i -> J places, 0 for the smallest value, n - 1 for the largest.
        magnitudes: True orders the absolute values.

    Returns:
        (K, J), in the dtype of the pieces.
    """
    found: torch.Tensor | None = None  # (K, J) digits so far
    wanted: torch.Tensor | None = None  # (K, J) place among the values with these digits
    step, num_digits, dtype = 0, 1, torch.float32
    while found is None or step < num_digits:
        counts = None
        for piece in pieces():
            dtype, num_digits = piece.dtype, 8 * piece.element_size() // DIGIT_BITS
            if counts is None:
                counts = torch.zeros(
                    len(piece), 1 if found is None else found.shape[1], RADIX, dtype=torch.int64, device=piece.device
                )
            _count(piece, magnitudes, found, DIGIT_BITS * (num_digits - 1 - step), counts)
        if counts is None:
            raise ValueError("order_statistics: found no piece, expected at least one")
        if wanted is None:
            wanted = torch.tensor([list(places(int(counts[0].sum())))] * len(counts), device=counts.device)  # (K, J)
            counts = counts.expand(*wanted.shape, RADIX)
        upto = counts.cumsum(-1)
        digit = torch.searchsorted(upto, wanted[..., None], right=True)  # (K, J, 1): first count above wanted
        wanted = wanted - (upto.gather(-1, digit) - counts.gather(-1, digit)).squeeze(-1)
        digit = digit.squeeze(-1)
        found = digit - RADIX // 2 if found is None else (found << DIGIT_BITS) | digit
        step += 1
    return _values(found, dtype)


def _count(piece: torch.Tensor, magnitudes: bool, found: torch.Tensor | None, shift: int, counts: torch.Tensor) -> None:
    """Count each digit at ``shift`` that follows the digits ``found``, into ``counts`` (K, J, RADIX)."""
    for row, values in enumerate(piece):
        keys = _keys(values.abs() if magnitudes else values)
        for column in range(counts.shape[1]):
            if found is None:  # the first digit holds the sign
                digits = (keys >> shift) + RADIX // 2
            else:
                digits = (keys[keys >> (shift + DIGIT_BITS) == found[row, column]] >> shift) & (RADIX - 1)
            counts[row, column] += torch.bincount(digits, minlength=RADIX)


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Integers in the same order as the values: (n,) int64."""
    bits = (values + 0.0).view(torch.int32 if values.dtype == torch.float32 else torch.int64)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 63 if bits.dtype == torch.int64 else bits >> 31) & torch.iinfo(bits.dtype).max)).long()


def _values(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo :func:`_keys`."""
    if dtype == torch.float32:
        small = keys.to(torch.int32)
        return (small ^ ((small >> 31) & torch.iinfo(torch.int32).max)).view(dtype)
    return (keys ^ ((keys >> 63) & torch.iinfo(torch.int64).max)).view(dtype)
