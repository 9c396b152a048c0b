"""Flower and Ray around :mod:`fedmerge`, which is imported before anything else here: it says how threads wait."""

import fedmerge  # noqa: F401  # see above
