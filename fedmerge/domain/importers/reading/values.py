"""Columns of any Arrow type as ids, texts and numbers, without loss: 101 and 101.0 are one id, 0 is a value."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.parquet import LONGEST_TEXT
from fedmerge.errors import DomainError

WHOLE_WITH_POINT = r"^([+-]?\d+)\.0*$"
SCIENTIFIC = r"^[+-]?\d(\.\d+)?[eE]\+\d+$"  # as spreadsheets and pandas write long whole numbers
INT64_DIGITS = r"^-?(\d{1,18}|[1-8]\d{18})$"
DECIMAL_DIGITS = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
NO_TEXTS = ("nan", "NaN", "<NA>", r"\N")  # what pandas and databases write for no value
NO_IDS = (*NO_TEXTS, "None", "null", "NULL")
INT64 = pa.int64()
EXACT = 2.0**53  # whole numbers up to it are exact as float64


def is_text(kind: pa.DataType) -> bool:
    """True for every Arrow type of text."""
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """True for integers, floats and decimals."""
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))


def is_time(kind: pa.DataType) -> bool:
    """True for dates and timestamps."""
    return bool(pt.is_date(kind) or pt.is_timestamp(kind))


def check_type(where: str, name: str, kind: pa.DataType) -> None:
    """Raise DomainError for a column that holds neither text nor numbers nor points in time."""
    value = kind.value_type if pt.is_dictionary(kind) else kind
    if pt.is_list(value) or pt.is_large_list(value):
        value = value.value_type if is_text(value.value_type) else value
    if not (is_text(value) or is_number(value) or is_time(value) or pt.is_null(value)):
        raise DomainError(
            f"{where}: column {name!r} is of type {value}, expected text, numbers or points in time. Convert "
            "the column."
        )


def to_ids(where: str, name: str, column: pa.Array) -> pa.Array:
    """Return a column as ids, text; null where there is none.

    White space around an id is removed. Whole numbers are written without a decimal point, whatever type they have, so
    that 101, 101.0 and "101.0" are one id. Other decimals are no ids, and neither are the words for no value (NO_IDS).

    Raises:
        DomainError: whole numbers stored as float64 beyond 2^53, whose last digits are lost.
    """
    if pt.is_dictionary(column.type):  # each text is converted once
        return to_ids(where, name, column.dictionary).take(column.indices)
    kind = column.type
    if pt.is_floating(kind):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        finite = np.isfinite(values)
        whole = finite & (np.floor(np.where(finite, values, 0)) == values)
        if np.any(np.abs(values[whole]) > EXACT):
            raise DomainError(
                f"{where}: column {name!r} holds whole numbers above 2^53 as decimals, so their last digits are lost. "
                "Write these ids as whole numbers or text."
            )
        return pa.array(np.where(whole, values, 0).astype(np.int64), mask=~whole).cast(pa.string())
    if is_time(kind) or pt.is_list(kind) or pt.is_large_list(kind):
        raise DomainError(
            f"{where}: column {name!r} is of type {kind}, expected text or whole numbers as ids. Name another column."
        )
    text = column.cast(pa.string())
    if pt.is_integer(kind):
        return text
    text = pc.utf8_trim_whitespace(text)
    if pc.any(pc.match_substring(text, ".")).as_py():
        text = pc.replace_substring_regex(text, pattern=WHOLE_WITH_POINT, replacement=r"\1")
    if pt.is_decimal(kind):
        kept = pc.match_substring_regex(text, r"^-?\d+$")
    else:
        kept = pc.invert(pc.is_in(text, pa.array(["", *NO_IDS])))
    return pc.if_else(kept, text, pa.scalar(None, pa.string()))


def is_too_long(ids: pa.Array) -> pa.Array:
    """Return where an id has more characters than a domain folder holds: an id cannot be cut."""
    return pc.fill_null(pc.greater(pc.utf8_length(ids), LONGEST_TEXT), False)


def has_lost_digits(ids: pa.Array) -> pa.Array:
    """Return where an id is a number in scientific notation, as 1.23457E+17, which stands for many ids."""
    return pc.fill_null(pc.match_substring_regex(ids, SCIENTIFIC), False)


def to_texts(column: pa.Array, bad: BadRows) -> list[str]:
    """Return a column as texts with single spaces; "" where a value is null or NaN. The texts of a list are joined.

    Args:
        column: any type that check_type accepts.
        bad: counts the texts that are cut, since no catalog holds them whole.
    """
    if pt.is_dictionary(column.type):
        texts = to_texts(column.dictionary, bad)
        return ["" if index is None else texts[index] for index in column.indices.to_pylist()]
    return [bad.cut(" ".join(_text(value).split())) for value in column.to_pylist()]


def to_keys(column: pa.Array, bad: BadRows) -> pa.Array:
    """Return a column with the same texts by to_texts in a type that Arrow groups by: no views, no lists."""
    if pt.is_dictionary(column.type):
        return to_keys(column.dictionary_decode(), bad)
    if is_text(column.type):
        return column.cast(pa.string())
    return pa.array(to_texts(column, bad)) if pt.is_nested(column.type) or pt.is_null(column.type) else column


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return "" if value in NO_TEXTS else value
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < EXACT else str(value)
    if isinstance(value, list):
        return " ".join(_text(part) for part in value)
    return str(value)


def to_numbers(column: pa.Array) -> pa.Array:
    """Return a column as float64; null where a value is no finite number. A decimal comma is read as a point."""
    if pt.is_dictionary(column.type):
        return to_numbers(column.dictionary).take(column.indices)
    if is_text(column.type):
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        text = pc.replace_substring_regex(text, pattern=r"^([+-]?\d+),(\d+)$", replacement=r"\1.\2")
        column = matching(text, DECIMAL_DIGITS)
    values = column.cast(pa.float64())
    return pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))


def matching(text: pa.Array, pattern: str) -> pa.Array:
    """Return the texts that match a pattern; null elsewhere."""
    return pc.if_else(pc.match_substring_regex(text, pattern), text, pa.scalar(None, pa.string()))


def map_distinct(text: pa.Array, convert: Callable[[str], Any], kind: pa.DataType = INT64) -> pa.Array:
    """Return a column of converted texts, each distinct text once; null where that raises ValueError."""

    def value(item: str | None) -> Any:
        try:
            return None if item is None else convert(item)
        except (ValueError, OverflowError):
            return None

    encoded = text.dictionary_encode()
    return pa.array([value(item) for item in encoded.dictionary.to_pylist()], kind).take(encoded.indices)
