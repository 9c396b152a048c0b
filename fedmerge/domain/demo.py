"""Bundled synthetic domains: shops with tastes that all domains share and habits that only one domain has.

``docs/demo-data.md`` describes the generative process. The data are frozen: DEMO_VERSION is part of every
seed, and only ``Generator.random`` is used, the NumPy stream that is least likely to change.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmerge import seeding
from fedmerge.config import ATTRIBUTES, DEMO_ROOT
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.domain.demo_words import (
    BRAND_ENDS,
    BRAND_FORMS,
    BRAND_STARTS,
    STAGE_WORDS,
    STYLES,
    VOCABULARIES,
    Family,
    Vocabulary,
)
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import Interactions, make_interactions
from fedmerge.errors import DomainError
from fedmerge.storage.addresses import is_address

DEMO_VERSION = 1
DEMO_DOMAINS: tuple[str, ...] = tuple(VOCABULARIES)
# Shops of the same trades with brands, items, users and habits of their own: two small ones, and one that opened later.
DEMO_BRANCHES = {"camping-small": 150, "coffee-small": 150, "camping-new": 600}  # users
BUNDLED_DOMAINS: tuple[str, ...] = (*DEMO_DOMAINS, *DEMO_BRANCHES)
BUNDLE_FOLDER = f"demo-v{DEMO_VERSION}-{len(BUNDLED_DOMAINS)}"  # in a cache

NUM_USERS, NUM_ITEMS = 600, 400  # of a domain, unless told otherwise

MAX_DOMAINS = 1000
MIN_ITEMS, MAX_ITEMS = 20, 20_000
MIN_LENGTH, MAX_LENGTH = 5, 20
LENGTH_SCALE = 5.0  # mean of the exponential part of a user's number of interactions
NUM_BRANDS = 24
FAMILY_POWER = 3  # how unequal the shares of a user's mixture over families are

PLAIN = len(STYLES)  # the style index of an item without any style word
PLAIN_SHARE = 0.2
STYLE_FIT = (0.72, 0.20, 0.01, 0.04)  # a user's preference for: main style, second style, any other style, plain items
STAGE_SHARES = (0.5, 0.25, 0.25)  # items that are plain, starter, advanced (order of STAGE_WORDS)
# Preference for the next item's stage (column) after this one's (row).
STAGE_STEP = np.array([[1.0, 0.5, 1.2], [1.0, 0.2, 2.5], [0.7, 0.1, 2.5]])
# Family after this one: the same, its first complement, its second complement, the domain's own habit.
STEP_SHARES = (0.25, 0.50, 0.10, 0.15)
SEEN_FACTOR = 0.02  # factor on the preference for an item already bought
POPULARITY_OFFSET = 5.0
BLOCK_SIZE = 2_000_000  # user-item pairs per block; bounds the memory, does not change the result


class Mechanism(IntEnum):
    """A mechanism that chooses the next item."""

    COMPLEMENT = 0
    TASTE = 1
    BRAND = 2
    POPULAR = 3
    NOISE = 4


MECHANISM_SHARES = (0.42, 0.34, 0.10, 0.07, 0.07)  # in the order of Mechanism

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ItemTraits:
    """The hidden variables of N items.

    Attributes:
        family: (N,) index into the vocabulary's families.
        style: (N,) index into STYLES, or PLAIN.
        stage: (N,) index into STAGE_WORDS.
        brand: (N,) index into the domain's brands.
        popularity: (N,) Zipf, mean 1.
    """

    family: Integers
    style: Integers
    stage: Integers
    brand: Integers
    popularity: Floats


@dataclass(frozen=True, slots=True)
class Tastes:
    """The hidden variables of U users who share the habits of one domain with F families.

    Attributes:
        family_steps: (F, F) probability of the next family (column) by habit.
        user_families: (U, F) each user's mixture over families.
        user_style: (U,) main style of each user, index into STYLES.
    """

    family_steps: Floats
    user_families: Floats
    user_style: Integers


@dataclass(frozen=True, slots=True)
class DemoDomain:
    """One generated domain with its hidden variables, which are never written to disk."""

    catalog: Catalog
    interactions: Interactions
    traits: ItemTraits
    tastes: Tastes


def demo_names(num_domains: int) -> tuple[str, ...]:
    """Return the names of the first demo domains: DEMO_DOMAINS, then the variants ``beauty-2``, ``books-2``, …, at most
    1000.

    Raises:
        DomainError: num_domains out of range.
    """
    if not 1 <= num_domains <= MAX_DOMAINS:
        raise DomainError(
            f"demo: num_domains is {num_domains}, expected 1 to {MAX_DOMAINS}; choose a number in that range."
        )
    size = len(DEMO_DOMAINS)
    return tuple(DEMO_DOMAINS[k % size] + (f"-{k // size + 1}" if k >= size else "") for k in range(num_domains))


def write_demo(
    root: Path | str,
    *,
    num_domains: int | None = None,
    seed: int = 0,
    num_users: int | None = None,
    num_items: int = NUM_ITEMS,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write the synthetic demo domains as domain folders under ``root``; see ``docs/demo-data.md``.

    A domain's content depends on its name, seed, num_users and num_items only, not on num_domains.

    Args:
        root: parent folder of the domains; created if absent.
        num_domains: 1 to 1000; after DEMO_DOMAINS come numbered variants (same words, other brands, items and habits).
            None is BUNDLED_DOMAINS.
        seed: another seed gives other data of the same kind; the frozen demo is seed 0.
        num_users: users of each domain, at least 1; None is 600, or what DEMO_BRANCHES says.
        num_items: items of each domain, 20 to 20000.
        overwrite: replace demo domains that are already there.

    Returns:
        The names of the domains, in the order written.

    Raises:
        DomainError: a number out of range, or a folder in the way (checked before anything is written).
    """
    root, names = Path(root), BUNDLED_DOMAINS if num_domains is None else demo_names(num_domains)
    present = [name for name in names if (root / name).exists()]
    if present and not overwrite:
        raise DomainError(
            f"demo: {root} already has {', '.join(present[:5])}{' and others' if len(present) > 5 else ''}; "
            "expected none of the demo domains. Choose an empty folder or pass overwrite=True."
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
            catalog_source="given",
            overwrite=overwrite,
        )
    return names


def domains_root(root: str, cache_dir: str) -> Path:
    """Return the folder of ``domains.root``; for "demo" that of the bundled domains, written on first use.

    Raises:
        DomainError: it is an address, where :func:`domain_folder` alone finds domains.
    """
    if is_address(root):
        raise DomainError(
            f"{root}: an address, expected a folder here. Copy the domains first: fedmerge pull {root}/NAME NAME"
        )
    return bundled_demo(Path(cache_dir).expanduser()) if root == DEMO_ROOT else Path(root).expanduser()


def domain_folder(root: str, name: str, cache_dir: str) -> Path:
    """Return the folder of a domain below ``domains.root``; one at an address is copied to ``cache_dir`` first.

    Raises:
        StorageError: as :func:`fedmerge.storage.fetching.local_folder`.
    """
    if not is_address(root):
        return domains_root(root, cache_dir) / name
    from fedmerge.storage.fetching import local_folder  # noqa: PLC0415 - the server's process imports this module

    return local_folder(f"{root.rstrip('/')}/{name}", cache_dir, "domains")


def bundled_demo(cache_dir: Path) -> Path:
    """Return the root of the bundled demo domains, written on first use; several processes may call this at once.

    Args:
        cache_dir: created if absent.
    """
    root = cache_dir / BUNDLE_FOLDER
    if not root.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-partial-", dir=cache_dir) as unfinished:
            write_demo(Path(unfinished) / "demo")
            try:
                os.rename(Path(unfinished) / "demo", root)
            except OSError:
                if not root.is_dir():  # otherwise another process wrote the same content first
                    raise
    return root


def generate_domain(
    name: str, *, seed: int = 0, num_users: int | None = None, num_items: int = NUM_ITEMS
) -> DemoDomain:
    """Generate one demo domain in memory, hidden variables included.

    Args:
        name: one of BUNDLED_DOMAINS, or a variant such as ``toys-2``.
        seed: see :func:`write_demo`.
        num_users: at least 1; None is 600, or what DEMO_BRANCHES says.
        num_items: 20 to 20000.

    Raises:
        DomainError: an unknown name, or a number out of range.
    """
    if name not in BUNDLED_DOMAINS and name not in demo_names(MAX_DOMAINS):
        raise DomainError(
            f"demo: no domain {name!r}; expected one of {', '.join(BUNDLED_DOMAINS)}, or a variant such as toys-2."
        )
    num_users = DEMO_BRANCHES.get(name, NUM_USERS) if num_users is None else num_users
    if num_users < 1:
        raise DomainError(f"demo: num_users is {num_users}, expected at least 1. Ask for more users.")
    if not MIN_ITEMS <= num_items <= MAX_ITEMS:
        raise DomainError(
            f"demo: num_items is {num_items}, expected {MIN_ITEMS} to {MAX_ITEMS}. Choose a number in that range."
        )
    vocabulary = VOCABULARIES[name.partition("-")[0]]
    rng = seeding.generator(seed, "demo", DEMO_VERSION, name, "items")
    brands = _draw_brands(rng)
    traits = _draw_traits(rng, len(vocabulary.families), num_items)
    attributes = _write_texts(rng, vocabulary, brands, traits)
    rng = seeding.generator(seed, "demo", DEMO_VERSION, name, "users")
    tastes = _draw_tastes(rng, vocabulary, num_users)
    return DemoDomain(
        catalog=make_catalog(name, [f"{name}-i{item:05d}" for item in range(num_items)], attributes),
        interactions=make_interactions(
            [f"{name}-u{user:05d}" for user in range(num_users)], _draw_sequences(rng, traits, tastes)
        ),
        traits=traits,
        tastes=tastes,
    )


def _draw_traits(rng: np.random.Generator, num_families: int, num_items: int) -> ItemTraits:
    family = _draw(np.ones(num_families), rng.random(num_items))
    family[:num_families] = np.arange(num_families)  # no family is empty
    style = _draw([(1 - PLAIN_SHARE) / PLAIN] * PLAIN + [PLAIN_SHARE], rng.random(num_items))
    stage = _draw(STAGE_SHARES, rng.random(num_items))
    brand = _draw(1 / np.arange(3, NUM_BRANDS + 3), rng.random(num_items))
    popularity = 1 / (POPULARITY_OFFSET + np.argsort(rng.random(num_items)))
    return ItemTraits(family, style, stage, brand, popularity / popularity.mean())


def _draw_tastes(rng: np.random.Generator, vocabulary: Vocabulary, num_users: int) -> Tastes:
    num_families = len(vocabulary.families)
    family_steps = _draw_family_steps(rng, vocabulary)
    demand = 0.5 + rng.random(num_families)  # some families sell better than others in this domain
    user_families = demand * _exponential(rng.random((num_users, num_families))) ** FAMILY_POWER
    user_families /= user_families.sum(axis=1, keepdims=True)
    user_style = _draw(0.5 + rng.random(PLAIN), rng.random(num_users))  # and so do some styles
    return Tastes(family_steps, user_families, user_style)


def _draw_family_steps(rng: np.random.Generator, vocabulary: Vocabulary) -> Floats:
    """Draw (F, F) row-stochastic steps: the same family, its two complements, and one habit of this domain."""
    leaves = [family.leaf.split(" > ")[-1] for family in vocabulary.families]
    steps = np.zeros((len(leaves), len(leaves)))
    habits = _draw(np.ones(len(leaves) - 1), rng.random(len(leaves)))
    for index, family in enumerate(vocabulary.families):
        habit = (index + 1 + int(habits[index])) % len(leaves)  # any family but itself
        successors = [index, *map(leaves.index, family.complements), habit]
        for successor, share in zip(successors, STEP_SHARES, strict=True):
            steps[index, successor] += share
    return steps


def _draw_sequences(rng: np.random.Generator, traits: ItemTraits, tastes: Tastes) -> list[Integers]:
    """Draw each user's items, oldest first."""
    num_users, num_items = len(tastes.user_style), len(traits.family)
    extra = LENGTH_SCALE * _exponential(rng.random(num_users))
    lengths = np.minimum(MIN_LENGTH + extra.astype(np.int64), MAX_LENGTH)
    uniform = rng.random((num_users, MAX_LENGTH, 3))
    sequences: list[Integers] = []
    for users in np.array_split(np.arange(num_users), -(-num_users * num_items // BLOCK_SIZE)):
        block = Tastes(tastes.family_steps, tastes.user_families[users], tastes.user_style[users])
        items = _walk(traits, block, lengths[users], uniform[users])
        sequences += [row[:length] for row, length in zip(items, lengths[users], strict=True)]
    return sequences


def _walk(traits: ItemTraits, tastes: Tastes, lengths: Integers, uniform: Floats) -> Integers:
    """Draw all sequences of a block of users step by step.

    Args:
        traits: of the N items.
        tastes: of the U users of the block.
        lengths: (U,) items to draw.
        uniform: (U, MAX_LENGTH, 3) in [0, 1); chooses mechanism, family and item at each step.

    Returns:
        (U, MAX_LENGTH) item indices, oldest first; values beyond a user's length are meaningless.
    """
    everyone = np.arange(len(lengths))
    fit = np.full((len(lengths), PLAIN + 1), STYLE_FIT[2])
    fit[:, PLAIN] = STYLE_FIT[3]
    fit[everyone, tastes.user_style] = STYLE_FIT[0]
    fit[everyone, (tastes.user_style + 1) % PLAIN] = STYLE_FIT[1]
    liking = fit[:, traits.style] * np.sqrt(traits.popularity)  # (U, N)
    novelty = np.ones_like(liking)
    items = np.zeros((len(lengths), MAX_LENGTH), np.int64)
    for step in range(int(lengths.max())):
        users = np.flatnonzero(lengths > step)
        mechanism = _draw(MECHANISM_SHARES, uniform[users, step, 0])
        weights = liking[users]
        families = tastes.user_families[users]
        if step == 0:
            mechanism[:] = Mechanism.TASTE  # there is no previous item
        else:
            last = items[users, step - 1]
            weights *= STAGE_STEP[traits.stage[last]][:, traits.stage]
            by_habit = mechanism == Mechanism.COMPLEMENT
            families[by_habit] = tastes.family_steps[traits.family[last[by_habit]]]
            by_brand = mechanism == Mechanism.BRAND
            weights[by_brand] *= traits.brand[last[by_brand], None] == traits.brand
        in_family = mechanism <= Mechanism.TASTE
        weights[in_family] *= _draw(families, uniform[users, step, 1])[in_family, None] == traits.family
        weights[mechanism == Mechanism.POPULAR] = traits.popularity
        weights[mechanism == Mechanism.NOISE] = 1.0
        items[users, step] = _draw(weights * novelty[users], uniform[users, step, 2])
        novelty[users, items[users, step]] = SEEN_FACTOR
    return items


def _draw(weights: npt.ArrayLike, uniform: Floats) -> Integers:
    """Draw indices by inverse cumulative weights, which need not sum to one.

    Args:
        weights: (C,) for all draws or (D, C), one row per draw; non-negative, not all zero.
        uniform: (D,) in [0, 1).

    Returns:
        (D,) int64; an index of weight zero is never drawn.
    """
    cumulative = np.cumsum(np.asarray(weights, dtype=np.float64), axis=-1)
    if cumulative.ndim == 1:
        return np.asarray(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), dtype=np.int64)
    return np.asarray((cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(axis=1), dtype=np.int64)


def _exponential(uniform: Floats) -> Floats:
    """Return standard exponential variables from uniform ones in [0, 1)."""
    return -np.log1p(-uniform)


def _draw_brands(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw NUM_BRANDS different invented brand names."""
    pairs = np.argsort(rng.random(len(BRAND_STARTS) * len(BRAND_ENDS)))[:NUM_BRANDS]
    forms = _draw(np.ones(len(BRAND_FORMS)), rng.random(NUM_BRANDS))
    return tuple(
        BRAND_FORMS[form].format(BRAND_STARTS[pair // len(BRAND_ENDS)] + BRAND_ENDS[pair % len(BRAND_ENDS)])
        for pair, form in zip(pairs, forms, strict=True)
    )


def _write_texts(
    rng: np.random.Generator, vocabulary: Vocabulary, brands: Sequence[str], traits: ItemTraits
) -> dict[str, tuple[str, ...]]:
    """Write title, brand and category of each item; a text that an earlier item has is drawn again."""
    texts: dict[tuple[str, str, str], None] = {}  # in order
    for kind, style, stage, brand in zip(traits.family, traits.style, traits.stage, traits.brand, strict=True):
        write = partial(
            _write_text,
            vocabulary=vocabulary,
            family=vocabulary.families[kind],
            style_words=() if style == PLAIN else (*STYLES[style].words, vocabulary.style_words[style]),
            stage_words=STAGE_WORDS[stage],
            brand=brands[brand],
        )
        while (text := write(rng.random(11))) in texts:
            pass
        texts[text] = None
    return dict(zip(ATTRIBUTES, zip(*texts, strict=True), strict=True))


def _write_text(
    uniform: Floats,
    *,
    vocabulary: Vocabulary,
    family: Family,
    style_words: Sequence[str],
    stage_words: Sequence[str],
    brand: str,
) -> tuple[str, str, str]:
    """Return (title, brand, category) of one item as a shop might write them: order varies, parts may be missing."""
    noun, style, stage = map(_pick, (family.nouns, style_words, stage_words), uniform)
    qualifier = _pick(vocabulary.qualifiers, uniform[3]) if uniform[4] < 0.6 else ""
    variant = _pick(vocabulary.variants, uniform[5]) if uniform[6] < 0.6 else ""
    maker = brand if uniform[7] < 0.4 else ""
    if uniform[8] < 0.6:
        title = _join(", ", _join(" ", maker, style, stage, qualifier, noun), variant)
    elif uniform[8] < 0.8:
        title = _join(" - ", _join(" ", style, stage, qualifier, noun, maker and f"by {maker}"), variant)
    else:
        note = _join(", ", style, variant)
        title = _join(" ", maker, stage, qualifier, noun, note and f"({note})")
    category = [vocabulary.department, *family.leaf.split(" > ")]
    if uniform[9] < 0.06:
        category = []
    elif uniform[9] < 0.16:
        category = category[:-1]  # filed under the parent, as careless sellers do
    return title, brand if uniform[10] >= 0.08 else "", " > ".join(category)


def _pick(words: Sequence[str], uniform: float) -> str:
    return words[int(uniform * len(words))] if words else ""


def _join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)
