"""The look of a method: one table of colours and shapes, so that a method looks the same on every page.

A method that is not in the table takes the colour of the longest name there that it begins with (``task-arithmetic
0.5`` that of ``task-arithmetic``), any other name a colour by its hash. Only methods of one colour on one page can
compete for a shape; then one of them takes the next that is free.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NUM_COLOURS, NUM_SHAPES = 8, 8
_INK, _RUST, _BLUE, _PLUM, _VIOLET, _AMBER, _GREEN, _CYAN = range(NUM_COLOURS)
# Colour -> its methods, one per shape. The most frequent methods have colours of their own.
METHODS: Mapping[int, tuple[str, ...]] = {
    _INK: ("backbone", "popularity", "last item", "item-knn", "sasrec", "recent items", "text", "joint"),
    _RUST: (
        "expert",
        "head on the expert",
        "head on the expert, fused",
        "head on the backbone",
        "head on the backbone, fused",
        "head",
        "weave",
        "alone",
    ),
    _BLUE: ("average", "weighted-average", "median", "trimmed-mean", "krum", "multi-krum", "federated", "livar-style"),
    _PLUM: (
        "task-arithmetic",
        "knots-task-arithmetic",
        "linear-by-layer",
        "slerp",
        "multi-slerp",
        "fedavgm",
        "fedadam",
        "fedyogi",
    ),
    _VIOLET: (
        "mergerec",
        "adamerging",
        "rmm-style",
        "emr-unified",
        "consensus",
        "pcb",
        "localize-and-stitch",
        "breadcrumbs",
    ),
    _AMBER: ("ties", "dare", "dare-ties", "della", "della-linear", "knots-ties", "knots-dare", "knots-dare-ties"),
    _GREEN: ("tsv", "iso-c", "iso-cts", "fedit", "ffa-lora", "flora", "flexlora", "hetlora"),
    _CYAN: (
        "served (with fallback)",
        "head on the merge",
        "head on the merge, fused",
        "federated head",
        "federated head, fused",
        "personal merge",
        "fedecider-style",
        "woven merge",
    ),
}


@dataclass(frozen=True, slots=True)
class Look:
    """Numbers of a colour and of a shape; the shape also decides the dashes of a line."""

    colour: int
    shape: int


# The first method of every colour also has another shape than those of the other colours: none differ by colour alone.
_KNOWN = {
    name: Look(colour, (colour + place) % NUM_SHAPES)
    for colour, names in METHODS.items()
    for place, name in enumerate(names)
}


def assign_looks(methods: Iterable[str]) -> dict[str, Look]:
    """Return method -> its look, in the order of the methods; different as long as a colour has free shapes.

    >>> assign_looks(["ties", "task-arithmetic 0.5", "average"])["average"] == assign_looks(["average"])["average"]
    True
    """
    names = list(dict.fromkeys(methods))
    found: dict[str, Look] = {}
    for name in sorted(names, key=lambda name: (name not in _KNOWN, name)):
        wanted = _preferred(name)
        shapes = [(wanted.shape + turn) % NUM_SHAPES for turn in range(NUM_SHAPES)]
        free = (look for shape in shapes if (look := Look(wanted.colour, shape)) not in found.values())
        found[name] = next(free, wanted)
    return {name: found[name] for name in names}


def in_order(names: Iterable[str]) -> dict[str, Look]:
    """Return name -> look by its place, for names that are no methods, such as domains."""
    chromatic = NUM_COLOURS - 1
    return {name: Look(1 + place % chromatic, place % NUM_SHAPES) for place, name in enumerate(dict.fromkeys(names))}


def _preferred(name: str) -> Look:
    """Return the look of the name itself, of the longest known name that it begins with, or by its hash."""
    beginnings = [known for known in _KNOWN if name == known or re.match(rf"{re.escape(known)}[^a-z0-9]", name)]
    if beginnings:
        return _KNOWN[max(beginnings, key=len)]
    digest = hashlib.sha256(name.encode()).digest()
    return Look(1 + digest[0] % (NUM_COLOURS - 1), digest[1] % NUM_SHAPES)
