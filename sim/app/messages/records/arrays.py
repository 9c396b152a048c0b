"""Read arrays that arrived as Flower records."""

import io
import math
from tokenize import TokenError
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray

from fedmerge.errors import LayoutMismatchError
from fedmerge.escaping import one_line
from sim.app.messages.records.fields import LONGEST_SHOWN, ONE_VERSION

T_Scalar = TypeVar("T_Scalar", bound=np.generic)
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

# NumPy evaluates the header as a Python literal, after it has tokenised it if that fails.
_DAMAGED = (LookupError, ValueError, TypeError, OSError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError)


def read_tensor(array: Array, name: str) -> torch.Tensor:
    return torch.from_numpy(array_values(array, name, np.dtype(np.float32), 2))


def array_values(array: Array, name: str, dtype: np.dtype[T_Scalar], num_axes: int) -> NDArray[T_Scalar]:
    """Return the values of an array that arrived, copied.

    Args:
        array: as Flower holds it.
        name: for the message.
        dtype: expected.
        num_axes: expected.

    Raises:
        LayoutMismatchError: another type or shape than announced or expected.
    """
    if array.dtype != str(dtype) or len(array.shape) != num_axes:
        what = {1: "vector", 2: "matrix"}[num_axes]
        raise LayoutMismatchError(
            f"{name} is {array.dtype} of shape {tuple(array.shape)}, expected a {dtype} {what}; {ONE_VERSION}"
        )
    if array.stype != "numpy.ndarray":
        raise LayoutMismatchError(
            f"{name} cannot be read: it is serialised as {array.stype!r}, expected numpy.ndarray; {ONE_VERSION}"
        )
    stream = io.BytesIO(array.data)
    try:  # the header first: nothing is allocated for more than what came
        shape, fortran_order, found = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
    except _DAMAGED as error:
        reason = one_line(f"{type(error).__name__}: {error}", LONGEST_SHOWN)
        raise LayoutMismatchError(f"{name} cannot be read ({reason}); {ONE_VERSION}") from error
    values = array.data[stream.tell() :]
    in_order = not fortran_order or num_axes == 1
    if (
        shape != tuple(array.shape)
        or found != dtype
        or not in_order
        or len(values) != dtype.itemsize * math.prod(shape)
    ):
        raise LayoutMismatchError(
            f"{name} announces {dtype} {tuple(array.shape)} but holds {found} {shape} in {len(values)} bytes; "
            f"{ONE_VERSION}"
        )
    return np.frombuffer(values, dtype=dtype).reshape(shape).copy()
