"""Ten thousand malformed messages: nothing but the named errors, and bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import LayoutMismatchError
from sim.app.messages.records import array_values

PROGRAM = Path(__file__).with_name("malformed.py")
GIB = 2**30


@pytest.mark.long
@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.e2e)])
def test_malformed_messages_end_in_named_errors_and_bounded_memory(number: int) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(number), "24"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["crashes"] == []
    assert sum(told["outcomes"].values()) == number
    assert told["outcomes"]["refused"] > number / 2  # most harms are seen; others leave a message that can be read
    assert {"ClientError", "DomainError", "LayoutMismatchError"} <= set(told["errors"])
    assert told["peak_bytes"] < GIB


def with_header(text: str) -> Array:
    header = text.encode("latin1", "replace")
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
    return Array("float32", (2, 3), "numpy.ndarray", data)


def read(array: Array) -> None:
    array_values(array, "x.lora_A", np.dtype(np.float32), 2)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'shape': (",
        '"""',
        "[" * 9000,
        "if 1:\n x\n  y",
        "\\",
        "{'a': 1L",
        "{" * 9000,
        "0" * 9999,
        "\x00",
    ],
)
def test_a_damaged_npy_header_is_refused_by_name(text: str) -> None:
    with pytest.raises(LayoutMismatchError) as caught:
        read(with_header(text))
    assert "x.lora_A" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numpy_itself_raises_errors_that_are_not_of_values() -> None:
    """The reason why TokenError is named: it is neither a ValueError nor an OSError."""
    import io  # noqa: PLC0415

    with pytest.raises(TokenError):
        np.lib.format.read_array_header_1_0(io.BytesIO(with_header("{'descr': (").data[8:]))


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(st.characters(max_codepoint=255), max_size=200), st.text("({['\"\\\n #:,0Lbf", max_size=60)))
def test_no_npy_header_breaks_the_reader(text: str) -> None:
    with pytest.raises(LayoutMismatchError):
        read(with_header(text))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_of_a_header_is_refused_or_harmless(place: int, bit: int) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = Array(values)
    data = bytearray(whole.data)
    data[place % (len(data) - values.nbytes)] ^= 1 << bit
    try:
        found = array_values(Array("float32", (2, 3), "numpy.ndarray", bytes(data)), "x", np.dtype(np.float32), 2)
    except LayoutMismatchError:
        return
    assert np.array_equal(found, values)
