"""Flower and Ray around :mod:`fedmerge`, which is imported before anything else here: it says how threads wait."""

import gc

import fedmerge  # noqa: F401  # see above

gc.set_threshold(50_000, *gc.get_threshold()[1:])  # imports make a million objects, to be looked through every 700
