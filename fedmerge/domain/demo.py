"""Bundled synthetic domains: shops whose users have tastes shared by all domains and habits that only one domain knows.

The generative process is written down in ``docs/demo-data.md``. The data are frozen: DEMO_VERSION is part of every seed, and
only ``Generator.random`` is drawn from, the NumPy stream least likely ever to change.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmerge import seeding
from fedmerge.domain.catalog import ATTRIBUTES, Catalog, catalog_fingerprint
from fedmerge.domain.demo_words import BRAND_ENDS, BRAND_FORMS, BRAND_STARTS, STAGE_WORDS, STYLES, VOCABULARIES, Vocabulary
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import Interactions
from fedmerge.errors import DomainError

DEMO_VERSION = 1
DEMO_DOMAINS: tuple[str, ...] = tuple(VOCABULARIES)

MAX_DOMAINS = 1000
MIN_ITEMS, MAX_ITEMS = 50, 20_000
MIN_LENGTH, MAX_LENGTH = 5, 20
LENGTH_SCALE = 5.0  # mean of the exponential part of a user's number of interactions
NUM_BRANDS = 24
FAMILY_POWER = 3  # how unequal the shares of a user's mixture over families are

PLAIN = len(STYLES)  # the style index of an item without any style word
PLAIN_SHARE = 0.3
STYLE_FIT = (0.62, 0.23, 0.02, 0.05)  # a user's liking of: main style, second style, any other style, plain items
STAGE_SHARES = (0.5, 0.25, 0.25)  # items that are plain, starter, advanced (order of STAGE_WORDS)
STAGE_STEP = np.array([[1.0, 0.6, 1.2], [1.0, 0.3, 2.0], [0.8, 0.1, 2.0]])  # liking of the next item's stage (column) after this one (row)
STEP_SHARES = (0.25, 0.40, 0.15, 0.20)  # family after this one: the same, first complement, second complement, the domain's habit
SEEN_FACTOR = 0.02  # how much less an item already bought is liked
POPULARITY_OFFSET = 5.0


class Mechanism(NamedTuple):
    """How the next item is chosen, and how often that happens."""

    name: str
    share: float


MECHANISMS = (
    Mechanism("complement", 0.40),
    Mechanism("taste", 0.30),
    Mechanism("brand", 0.12),
    Mechanism("popular", 0.10),
    Mechanism("noise", 0.08),
)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DemoDomain:
    """One generated domain with the hidden variables it was drawn from (never written to disk).

    Attributes:
        family, style, stage, brand: (N,) of each item; indices into the vocabulary's families, STYLES (PLAIN = none),
            STAGE_WORDS and the domain's brands.
        popularity: (N,) Zipf, mean 1.
        family_steps: (F, F) probability of the next family by complement.
        user_families: (U, F) each user's mixture over families.
        user_style: (U,) main style of each user, index into STYLES.
    """

    catalog: Catalog
    interactions: Interactions
    family: Integers
    style: Integers
    stage: Integers
    brand: Integers
    popularity: Floats
    family_steps: Floats
    user_families: Floats
    user_style: Integers


def demo_names(num_domains: int) -> tuple[str, ...]:
    """Names of the first demo domains: DEMO_DOMAINS, then their variants ``beauty-2``, ``books-2``, … (up to 1000).

    Raises:
        DomainError: num_domains out of range.
    """
    if not 1 <= num_domains <= MAX_DOMAINS:
        raise DomainError(f"demo: num_domains is {num_domains}, expected 1 to {MAX_DOMAINS}; choose a number in that range.")
    rounds, size = range(num_domains), len(DEMO_DOMAINS)
    return tuple(DEMO_DOMAINS[k % size] + (f"-{k // size + 1}" if k >= size else "") for k in rounds)


def write_demo(
    root: Path | str,
    *,
    num_domains: int = 8,
    seed: int = 0,
    num_users: int = 600,
    num_items: int = 400,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write the synthetic demo domains as domain folders under ``root``; see ``docs/demo-data.md``.

    A domain's content depends on its name, seed, num_users and num_items only, not on num_domains.

    Args:
        root: folder that gets one folder a domain; created if absent.
        num_domains: 1 to 1000; beyond DEMO_DOMAINS come numbered variants (same words, other brands, items and habits).
        seed: another seed gives other data of the same kind; the frozen demo is seed 0.
        num_users: users of each domain, at least 1.
        num_items: items of each domain, 50 to 20000.
        overwrite: replace demo domains that are already there.

    Returns:
        The names of the domains, in the order written.

    Raises:
        DomainError: a number out of range, or a folder in the way (checked before anything is written).
    """
    root, names = Path(root), demo_names(num_domains)
    present = [name for name in names if (root / name).exists()]
    if present and not overwrite:
        raise DomainError(
            f"demo: {root} already has {', '.join(present[:5])}{' and others' if len(present) > 5 else ''}; "
            "expected none of the demo's domains. Choose an empty folder or pass overwrite=True."
        )
    for name in names:
        demo = generate_domain(name, seed=seed, num_users=num_users, num_items=num_items)
        source = f"fedmerge demo version {DEMO_VERSION}, seed {seed}"
        write_domain(
            root / name,
            demo.catalog,
            demo.interactions,
            public_catalog=True,
            synthetic=True,
            source=source,
            overwrite=overwrite,
        )
    return names


def generate_domain(name: str, *, seed: int = 0, num_users: int = 600, num_items: int = 400) -> DemoDomain:
    """Generate one demo domain in memory, hidden variables included.

    Args:
        name: one of DEMO_DOMAINS, or a variant of it such as ``toys-2``.
        seed: see :func:`write_demo`.
        num_users: at least 1.
        num_items: 50 to 20000.

    Raises:
        DomainError: an unknown name, or a number out of range.
    """
    word, _, number = name.partition("-")
    if word not in VOCABULARIES or (number and name not in demo_names(MAX_DOMAINS)):
        raise DomainError(f"demo: no domain {name!r}; expected one of {', '.join(DEMO_DOMAINS)}, or a variant such as toys-2.")
    if num_users < 1:
        raise DomainError(f"demo: num_users is {num_users}, expected at least 1.")
    if not MIN_ITEMS <= num_items <= MAX_ITEMS:
        raise DomainError(f"demo: num_items is {num_items}, expected {MIN_ITEMS} to {MAX_ITEMS}.")
    vocabulary = VOCABULARIES[word]
    num_families = len(vocabulary.families)

    rng = seeding.generator(seed, "demo", DEMO_VERSION, name, "items")
    brands = _draw_brands(rng)
    family = _draw(np.ones(num_families), rng.random(num_items))
    style = _draw([(1 - PLAIN_SHARE) / PLAIN] * PLAIN + [PLAIN_SHARE], rng.random(num_items))
    stage = _draw(STAGE_SHARES, rng.random(num_items))
    brand = _draw(1 / np.arange(3, NUM_BRANDS + 3), rng.random(num_items))
    family[:num_families] = np.arange(num_families)  # no family is empty
    popularity = 1 / (POPULARITY_OFFSET + np.argsort(rng.random(num_items)))
    popularity /= popularity.mean()
    attributes = _write_texts(rng, vocabulary, brands, family, style, stage, brand)
    item_ids = tuple(f"{name}-i{index:05d}" for index in range(num_items))
    catalog = Catalog(name, item_ids, attributes, catalog_fingerprint(item_ids, attributes))

    rng = seeding.generator(seed, "demo", DEMO_VERSION, name, "users")
    family_steps = _draw_family_steps(rng, vocabulary)
    base = 0.5 + rng.random(num_families)  # some families sell better than others in this domain
    user_families = base * _exponential(rng.random((num_users, num_families))) ** FAMILY_POWER
    user_families /= user_families.sum(axis=1, keepdims=True)
    user_style = _draw(0.5 + rng.random(PLAIN), rng.random(num_users))  # and so do some styles
    lengths = np.minimum(MIN_LENGTH + (LENGTH_SCALE * _exponential(rng.random(num_users))).astype(np.int64), MAX_LENGTH)

    fit = np.full((num_users, PLAIN + 1), STYLE_FIT[2])
    fit[:, PLAIN] = STYLE_FIT[3]
    fit[np.arange(num_users), user_style] = STYLE_FIT[0]
    fit[np.arange(num_users), (user_style + 1) % PLAIN] = STYLE_FIT[1]
    liking = fit[:, style] * np.sqrt(popularity)  # (U, N): what a user likes within any family

    sequences = np.full((num_users, MAX_LENGTH), -1)
    novelty = np.ones((num_users, num_items))
    for step in range(MAX_LENGTH):
        users = np.flatnonzero(lengths > step)
        if len(users) == 0:
            break
        uniform = rng.random((3, num_users))[:, users]
        mechanism = _draw([m.share for m in MECHANISMS], uniform[0])
        weights = liking[users]
        if step == 0:  # no item to start from: taste decides
            next_family = _draw(user_families[users], uniform[1])
            weights *= next_family[:, None] == family
        else:
            last = sequences[users, step - 1]
            weights *= STAGE_STEP[stage[last]][:, stage]
            by_family = mechanism <= 1
            complement = (mechanism == 0)[:, None]
            next_family = _draw(np.where(complement, family_steps[family[last]], user_families[users]), uniform[1])
            weights[by_family] *= next_family[by_family, None] == family
            weights[mechanism == 2] *= brand[last[mechanism == 2], None] == brand
            weights[mechanism == 3] = popularity
            weights[mechanism == 4] = 1.0
        chosen = _draw(weights * novelty[users], uniform[2])
        novelty[users, chosen] = SEEN_FACTOR
        sequences[users, step] = chosen

    interactions = Interactions(
        user_ids=tuple(f"{name}-u{index:05d}" for index in range(num_users)),
        items=sequences[sequences >= 0].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return DemoDomain(
        catalog, interactions, family, style, stage, brand, popularity, family_steps, user_families, user_style
    )


def _draw(weights: npt.ArrayLike, uniform: Floats) -> Integers:
    """Indices drawn by inverse cumulative weights, which need not sum to one.

    Args:
        weights: (C,) for all draws or (D, C) one row a draw; non-negative, not all zero.
        uniform: (D,) in [0, 1).

    Returns:
        (D,) int64; an index of weight zero is never drawn.
    """
    cumulative = np.cumsum(np.asarray(weights, dtype=np.float64), axis=-1)
    if cumulative.ndim == 1:
        return np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    drawn: Integers = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(axis=1)
    return drawn


def _exponential(uniform: Floats) -> Floats:
    """Standard exponential variables from uniform ones in [0, 1)."""
    return -np.log1p(-uniform)


def _draw_brands(rng: np.random.Generator) -> tuple[str, ...]:
    """NUM_BRANDS different invented brand names."""
    pairs = np.argsort(rng.random(len(BRAND_STARTS) * len(BRAND_ENDS)))[:NUM_BRANDS]
    forms = _draw(np.ones(len(BRAND_FORMS)), rng.random(NUM_BRANDS))
    return tuple(
        BRAND_FORMS[form].format(BRAND_STARTS[pair // len(BRAND_ENDS)] + BRAND_ENDS[pair % len(BRAND_ENDS)])
        for pair, form in zip(pairs, forms, strict=True)
    )


def _draw_family_steps(rng: np.random.Generator, vocabulary: Vocabulary) -> Floats:
    """(F, F) row-stochastic: the same family, its two complements, and one habit drawn for this domain."""
    leaves = [family.leaf.split(" > ")[-1] for family in vocabulary.families]
    steps = np.zeros((len(leaves), len(leaves)))
    habits = _draw(np.ones(len(leaves) - 1), rng.random(len(leaves)))
    for index, family in enumerate(vocabulary.families):
        habit = (index + 1 + int(habits[index])) % len(leaves)  # any family but itself
        successors = [index, *map(leaves.index, family.complements), habit]
        for successor, share in zip(successors, STEP_SHARES, strict=True):
            steps[index, successor] += share
    return steps


def _write_texts(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    brands: tuple[str, ...],
    family: Integers,
    style: Integers,
    stage: Integers,
    brand: Integers,
) -> dict[str, tuple[str, ...]]:
    """Title, brand and category of each item; items with the text of an earlier one are drawn again until all differ."""
    rows: list[tuple[str, str, str]] = []
    taken: set[tuple[str, str, str]] = set()
    for item in range(len(family)):
        style_words = ()
        if style[item] < PLAIN:
            style_words = (*STYLES[style[item]].words, vocabulary.style_words[style[item]])
        kind = vocabulary.families[family[item]]
        row = None
        while row is None or row in taken:
            uniform = rng.random(9)
            row = _write_text(uniform, vocabulary, kind.nouns, style_words, STAGE_WORDS[stage[item]], brands[brand[item]], kind.leaf)
        taken.add(row)
        rows.append(row)
    return dict(zip(ATTRIBUTES, zip(*rows, strict=True), strict=True))


def _write_text(
    uniform: Floats,
    vocabulary: Vocabulary,
    nouns: Sequence[str],
    style_words: Sequence[str],
    stage_words: Sequence[str],
    brand: str,
    leaf: str,
) -> tuple[str, str, str]:
    """(title, brand, category) of one item, as a shop would write it: the order varies and parts may be missing."""

    def pick(words: Sequence[str], u: float) -> str:
        return words[int(u * len(words))] if words else ""

    noun, qualifier = pick(nouns, uniform[0]), pick(vocabulary.qualifiers, uniform[1])
    variant = pick(vocabulary.variants, uniform[2])
    style, stage = pick(style_words, uniform[3]), pick(stage_words, uniform[4])
    maker = brand if uniform[5] < 0.6 else ""
    if uniform[6] < 0.6:
        title = _join(maker, style, stage, qualifier, noun) + f", {variant}"
    elif uniform[6] < 0.8:
        title = _join(style, stage, qualifier, noun, maker and f"by {maker}") + f" - {variant}"
    else:
        title = _join(maker, stage, qualifier, noun) + f" ({style + ', ' if style else ''}{variant})"
    parts = [vocabulary.department, *leaf.split(" > ")]
    if uniform[8] < 0.06:
        parts = []
    elif uniform[8] < 0.16:
        parts = parts[:-1]  # filed under the parent, as careless sellers do
    return title, brand if uniform[7] >= 0.08 else "", " > ".join(parts)


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def bundled_demo(cache_dir: Path) -> Path:
    """The root of the bundled demo domains, written on first use; safe when several processes ask at once.

    Args:
        cache_dir: created where missing.
    """
    root = cache_dir / f"demo-v{DEMO_VERSION}"
    if not root.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-partial-", dir=cache_dir) as partial:
            write_demo(Path(partial) / "demo")
            try:
                os.rename(Path(partial) / "demo", root)
            except OSError:
                if not root.is_dir():  # otherwise another process was faster with the same content
                    raise
    return root
