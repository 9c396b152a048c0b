"""Parameters of merging methods and aggregation rules: defaults, bounds, checks, and how tables show them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmerge.errors import ConfigError

Value = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        default: value and type. None means an optional integer, or with ``number`` an optional number.
        low: smallest value.
        high: largest value.
        above: value that it must exceed.
        choices: allowed strings; empty for any text.
        number: True if any finite number is allowed although the default is an integer or None.
        optional: True if None is allowed although the default is not None.
    """

    default: Value
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[str, ...] = ()
    number: bool = False
    optional: bool = False


def checked_parameters(where: str, parameters: Mapping[str, Parameter], given: Mapping[str, Value]) -> dict[str, Value]:
    """Check given values and fill in the defaults of the others.

    Raises:
        ConfigError: a value that is out of bounds, or given for an unknown parameter.
    """
    unknown = sorted(given.keys() - parameters.keys())
    if unknown:
        expected = ", ".join(parameters) or "none"
        raise ConfigError(f"{where}: found parameters {', '.join(unknown)}, expected {expected}")
    chosen = {key: given.get(key, parameter.default) for key, parameter in parameters.items()}
    for key, value in chosen.items():
        check_parameter(f"{where}: {key}", parameters[key], value)
    return chosen


def check_parameter(where: str, parameter: Parameter, value: Value) -> None:
    """Raise unless a value has the type of its parameter's default and lies within the bounds and choices.

    Raises:
        ConfigError: names ``where``, the value and what was expected.
    """
    default = parameter.default
    if isinstance(default, str):
        good = isinstance(value, str) and (not parameter.choices or value in parameter.choices)
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    else:
        good = False
        number = parameter.number or isinstance(default, float)
        if isinstance(value, int) or (isinstance(value, float) and number and math.isfinite(value)):
            good = not isinstance(value, bool) and value > parameter.above and parameter.low <= value <= parameter.high
    if default is None or parameter.optional:
        good = good or value is None
    if not good:
        raise ConfigError(f"{where}: found {value!r}, expected {_expected(parameter)}")


def _expected(parameter: Parameter) -> str:
    default = parameter.default
    if isinstance(default, str):
        return f"one of {', '.join(parameter.choices)}" if parameter.choices else "text"
    if isinstance(default, bool):
        return "true or false"
    kind = "a finite number" if parameter.number or isinstance(default, float) else "an integer"
    bounds = (f"at least {parameter.low}", f"above {parameter.above}", f"at most {parameter.high}")
    expected = ", ".join([kind, *(bound for bound in bounds if "inf" not in bound)])
    return f"{expected}, or None" if default is None or parameter.optional else expected


def parameter_text(parameter: Parameter) -> str:
    """Return default and bounds of a parameter as text for tables."""
    bounds = _expected(parameter)
    if isinstance(parameter.default, float):
        bounds = bounds.removeprefix("a finite number").removeprefix(", ")
    return f"{parameter.default} ({bounds})" if bounds else str(parameter.default)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def parse_parameters(texts: Sequence[str]) -> dict[str, Value]:
    """Read ``key=value`` texts: numbers, ``true``, ``false`` and ``none`` as such, anything else as text."""
    return {key.strip(): _value(text.strip()) for key, _, text in (each.partition("=") for each in texts)}


def _value(text: str) -> Value:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
