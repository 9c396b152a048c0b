"""Shared parts of the sections: strictness, the file forms of tuples and None, and names that several sections use."""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

Split = Literal["valid", "test"]

DOMAIN_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # fits a folder, a comma-separated list and a record key
ATTRIBUTES = ("title", "brand", "category")  # of an item, unless a domain has its own
ATTRIBUTE = r"^[^\W_](?:[\w .-]{0,62}\w)?(?:=[1-9][0-9]{0,4})?$"  # of a template: a name, and a limit of its tokens


class Section(BaseModel):
    """One section of an experiment. Frozen; unknown keys are errors; the file forms of tuples and None are accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    LATER: ClassVar[tuple[str, ...]] = ()  # keys that are younger than the caches whose keys hold this section

    @model_validator(mode="before")
    @classmethod
    def _from_file_form(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            key: _parse(value, cls.model_fields[key].annotation) if key in cls.model_fields else value
            for key, value in data.items()
        }

    def cache_inputs(self) -> dict[str, Any]:
        """Return the settings for the key of a cache, without LATER ones at their defaults: old entries stay valid."""
        fields = type(self).model_fields
        return self.model_dump(exclude={key for key in self.LATER if getattr(self, key) == fields[key].default})


def twice(names: Sequence[str]) -> str:
    """Return the names that occur more than once, sorted and joined with commas."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def _parse(value: Any, annotation: Any) -> Any:
    """Turn a value of a file into the Python form of a field: "none" into None, a list in one string into a tuple."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, bool) and {int, float} & {annotation, *arguments}:
        return str(value).lower()  # text, which pydantic refuses; it would accept the boolean true as 1
    if not isinstance(value, str):
        # --set reads a single 0.5 as a number, also where the field is a list
        return (value,) if origin is tuple and isinstance(value, (int, float)) else value
    if value.strip() == "none" and (origin in (typing.Union, types.UnionType)) and type(None) in arguments:
        return None
    if origin is tuple:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
