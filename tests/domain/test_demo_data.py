"""The demo data: frozen, plausible, and structured as docs/demo-data.md describes."""

import time
from pathlib import Path

import numpy as np
import pytest

from fedmerge.config import ATTRIBUTES
from fedmerge.domain import demo
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.demo import (
    BUNDLED_DOMAINS,
    DEMO_BRANCHES,
    DEMO_DOMAINS,
    DEMO_VERSION,
    DemoDomain,
    demo_names,
    generate_domain,
    write_demo,
)
from fedmerge.domain.demo_words import STAGE_WORDS, STYLES, VOCABULARIES
from fedmerge.domain.folder import domain_info, list_domains, read_manifest
from fedmerge.domain.interactions import interactions_fingerprint, load_interactions
from fedmerge.errors import DomainError

# Catalog and interactions at the default size and seed. They change only together with DEMO_VERSION.
FROZEN = {
    "beauty": (
        "66ea3da2c4076e50f257b0b233e7a1793d5769e9483a7b43d20072401795e7ad",
        "944c20d2d75c3d09a0c705a5cac3f610603d9b8ad38b1b828215322e6744a92e",
    ),
    "camping": (
        "852e4c0436123973284925aa2b36e9eb50f1072cb9ebf603c1b241e8e2e2ddac",
        "b748384f7b75ecd173c4e46a532ad8a28135e60f22e1abaee95a48aa19ca6f79",
    ),
    "toys-2": (
        "0209efe106f100160d598069dd344fc12f01c45fbbb49bfb64dcb94293a2e6ff",
        "c9d23a39016c6b79c06bb326e8be2c23284a16826b780b72a09448082fc37f43",
    ),
}

# The shops of the same trades, at their own sizes.
FROZEN_BRANCHES = {
    "camping-small": (
        "8b36a0079b1d4032a24e76449dd5d2bbfc05cb782d92a1ac2e40f34c3c4c1db9",
        "f396b2b4966984671b8709fe3994eb923448477b851d0c3f8d8aeaf9fbceef65",
    ),
    "coffee-small": (
        "e1b139ba168e730555a7d98ffc5b26b59955d24670850dca188814613bbadc68",
        "f9afa68f3f1ea43bf3f2afff250ef9f675e247dab21da614c167fa116ff38131",
    ),
    "camping-new": (
        "03e2bbe6c2724701c63a6f850f656441f71ace52fc58f3cb7bac326063a122aa",
        "9bfbce860c512b7eb40ac5edcdc6233ab0f4604b214ed0f24f8712ad72eed260",
    ),
}

# Small domains, as for trials of large federations: 60 users and 40 items.
FROZEN_SMALL = {
    "camping-20": (
        "c62f8bdacb6e9757211043eb2b641d63672c453648b148581eb295bef2669f0e",
        "717eceba87fccbafdb679b95c9d901e02ee08e97171842a10d80fccf25599e7f",
    ),
    "office-100": (
        "a0176e5b1e9b25c1da40d397edd3708686df5af49f405855840747b5c82d5849",
        "78d8b6d7d143ac628e1cf9fd1c647d6e90194b600a84b2b679589679e0ce4acc",
    ),
}


@pytest.fixture(scope="module")
def domains() -> dict[str, DemoDomain]:
    return {name: generate_domain(name) for name in (*DEMO_DOMAINS, "toys-2")}


def steps(domain: DemoDomain) -> tuple[np.ndarray, np.ndarray]:
    """Return the (previous, next) item of every consecutive pair within a user."""
    items, offsets = domain.interactions.items, domain.interactions.offsets
    inside = np.setdiff1d(np.arange(len(items) - 1), offsets[1:-1] - 1)
    return items[inside], items[inside + 1]


def lift(trait_before: np.ndarray, trait_after: np.ndarray) -> float:
    """Return how much more often the traits are equal than if they were independent."""
    share_after = np.bincount(trait_after, minlength=int(trait_before.max()) + 1) / len(trait_after)
    return float((trait_before == trait_after).mean() / share_after[trait_before].mean())


def test_content_is_frozen(domains: dict[str, DemoDomain]) -> None:
    assert DEMO_VERSION == 1
    frozen, made = FROZEN | FROZEN_BRANCHES, domains | {name: generate_domain(name) for name in DEMO_BRANCHES}
    found = {name: (made[name].catalog.sha256, interactions_fingerprint(made[name].interactions)) for name in frozen}
    assert found == frozen
    small = {name: generate_domain(name, num_users=60, num_items=40) for name in FROZEN_SMALL}
    assert {
        name: (domain.catalog.sha256, interactions_fingerprint(domain.interactions)) for name, domain in small.items()
    } == FROZEN_SMALL


def test_a_seed_is_reproducible_and_another_seed_differs() -> None:
    one, two, other = (generate_domain("pets", seed=seed, num_users=30, num_items=40) for seed in (3, 3, 4))
    assert one.catalog == two.catalog
    np.testing.assert_array_equal(one.interactions.items, two.interactions.items)
    assert one.catalog.sha256 != other.catalog.sha256
    assert interactions_fingerprint(one.interactions) != interactions_fingerprint(other.interactions)


def test_block_size_does_not_change_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate_domain("garden", num_users=37, num_items=50)
    monkeypatch.setattr(demo, "BLOCK_SIZE", 500)
    blocks = generate_domain("garden", num_users=37, num_items=50)
    assert interactions_fingerprint(whole.interactions) == interactions_fingerprint(blocks.interactions)


def test_written_folders_equal_generated_domains_for_any_number_of_domains(tmp_path: Path) -> None:
    assert write_demo(tmp_path / "two", num_domains=2, num_users=25, num_items=30) == ("beauty", "books")
    names = write_demo(tmp_path / "twelve", num_domains=12, num_users=25, num_items=30)
    assert names == (*DEMO_DOMAINS, "beauty-2", "books-2")
    assert list_domains(tmp_path / "twelve") == tuple(sorted(names))
    for name in names:
        generated, folder = generate_domain(name, num_users=25, num_items=30), tmp_path / "twelve" / name
        assert load_catalog(folder) == generated.catalog
        assert interactions_fingerprint(load_interactions(folder)) == interactions_fingerprint(generated.interactions)
        manifest = read_manifest(folder)
        assert manifest.synthetic
        assert manifest.public_catalog
        assert manifest.source == "fedmerge demo version 1, seed 0"
    assert read_manifest(tmp_path / "two" / "books") == read_manifest(tmp_path / "twelve" / "books")


def test_existing_domains_are_replaced_only_on_request(tmp_path: Path) -> None:
    write_demo(tmp_path, num_domains=1, num_users=5, num_items=20)
    before = read_manifest(tmp_path / "beauty")
    with pytest.raises(DomainError, match=rf"{tmp_path} .*beauty.*overwrite=True"):
        write_demo(tmp_path, num_domains=3, num_users=6, num_items=20)
    assert list_domains(tmp_path) == ("beauty",)
    assert read_manifest(tmp_path / "beauty") == before
    write_demo(tmp_path, num_domains=2, num_users=6, num_items=20, overwrite=True)
    assert read_manifest(tmp_path / "beauty").num_users == 6


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    for num_domains in (0, 1001):
        with pytest.raises(DomainError, match=f"num_domains .*{num_domains}.* 1 to 1000"):
            write_demo(tmp_path / "x", num_domains=num_domains)
    with pytest.raises(DomainError, match=r"num_users .*0.* 1"):
        write_demo(tmp_path / "x", num_users=0)
    for num_items in (19, 20_001):
        with pytest.raises(DomainError, match=f"num_items .*{num_items}.* 20 to 20000"):
            write_demo(tmp_path / "x", num_items=num_items)
    for name in ("cars", "toys-", "toys-1", "toys-101", "toys-02", ""):
        with pytest.raises(DomainError, match=f"'{name}'.* beauty, "):
            generate_domain(name)
    assert not (tmp_path / "x").exists()


def test_a_thousand_names_are_different() -> None:
    names = demo_names(1000)
    assert len(set(names)) == 1000
    assert names[:8] == ("beauty", "books", "camping", "coffee", "garden", "kitchen", "pets", "toys")
    assert names[-1] == "office-100"


def test_sizes_lengths_and_density_are_plausible(tmp_path: Path) -> None:
    assert write_demo(tmp_path) == BUNDLED_DOMAINS
    for name in BUNDLED_DOMAINS:
        info = domain_info(tmp_path / name)
        assert (info.manifest.num_users, info.manifest.num_items) == (DEMO_BRANCHES.get(name, 600), 400)
        assert 8.3 <= info.manifest.num_interactions / info.manifest.num_users <= 10.4
        assert info.min_length == 5
        assert 7 <= info.median_length <= 9
        assert info.max_length == 20
        assert 0.02 <= info.density <= 0.026
        assert info.num_short_users == 0
        assert info.num_unused_items <= (8 if info.manifest.num_users == 600 else 60)
        assert 0 < info.num_repeats <= 0.02 * info.manifest.num_interactions
        assert info.attribute_shares["title"] == 1
        assert 0.85 <= info.attribute_shares["brand"] <= 0.97
        assert 0.88 <= info.attribute_shares["category"] <= 0.98


def test_no_two_items_of_a_domain_have_the_same_text(domains: dict[str, DemoDomain]) -> None:
    for name, domain in domains.items():
        texts = list(zip(*(domain.catalog.attributes[attribute] for attribute in ATTRIBUTES), strict=True))
        assert len(set(texts)) == len(texts) == 400, name
        assert len(set(domain.catalog.attributes["title"])) > 380, name
    assert len(generate_domain("beauty", num_users=1, num_items=20_000).catalog) == 20_000


def test_titles_show_style_stage_and_noun_and_categories_are_hierarchical(domains: dict[str, DemoDomain]) -> None:
    for name, domain in domains.items():
        vocabulary, traits = VOCABULARIES[name.partition("-")[0]], domain.traits
        for item, title in enumerate(domain.catalog.attributes["title"]):
            family, style = vocabulary.families[traits.family[item]], traits.style[item]
            assert any(noun in title for noun in family.nouns)
            if style < len(STYLES):
                assert any(word in title for word in (*STYLES[style].words, vocabulary.style_words[style]))
            if traits.stage[item]:
                assert any(word in title for word in STAGE_WORDS[traits.stage[item]])
            category = domain.catalog.attributes["category"][item]
            whole = f"{vocabulary.department} > {family.leaf}"
            assert category in ("", whole, whole.rpartition(" > ")[0])


def test_style_words_occur_in_every_domain(domains: dict[str, DemoDomain]) -> None:
    for name, domain in domains.items():
        titles = domain.catalog.attributes["title"]
        for style in STYLES:
            assert sum(any(word in title for word in style.words) for title in titles) >= 10, (name, style.name)


def test_word_lists_are_consistent() -> None:
    for name, vocabulary in VOCABULARIES.items():
        leaves = [family.leaf.split(" > ")[-1] for family in vocabulary.families]
        assert len(set(leaves)) == len(leaves) <= demo.MIN_ITEMS, name
        nouns = [noun for family in vocabulary.families for noun in family.nouns]
        assert len(set(nouns)) == len(nouns), name
        words = [*vocabulary.style_words, *(word for style in STYLES for word in style.words)]
        assert len(set(words)) == len(words) == 5 * len(STYLES), name
        for family, leaf in zip(vocabulary.families, leaves, strict=True):
            assert len({leaf, *family.complements}) == 3, (name, leaf)
            assert set(family.complements) <= set(leaves), (name, leaf)


def test_next_items_follow_taste(domains: dict[str, DemoDomain]) -> None:
    for name, domain in domains.items():
        before, after = steps(domain)
        traits = domain.traits
        styled = traits.style[before] < len(STYLES)
        assert lift(traits.style[before][styled], traits.style[after][styled]) > 2.3, name
        assert lift(traits.family[before], traits.family[after]) > 1.5, name
        assert lift(traits.brand[before], traits.brand[after]) > 1.5, name
        starts = traits.stage[after] == 1
        assert starts[traits.stage[before] == 2].mean() < 0.75 * starts.mean(), name
        mine = domain.tastes.user_style[np.repeat(np.arange(600), np.diff(domain.interactions.offsets))]
        assert (traits.style[domain.interactions.items] == mine).mean() > 0.45, name  # chance is about 1/8


def test_complements_follow_each_other_more_than_chance(domains: dict[str, DemoDomain]) -> None:
    for name, domain in domains.items():
        vocabulary = VOCABULARIES[name.partition("-")[0]]
        leaves = [family.leaf.split(" > ")[-1] for family in vocabulary.families]
        first = np.array([leaves.index(family.complements[0]) for family in vocabulary.families])
        before, after = steps(domain)
        family = domain.traits.family
        assert lift(first[family[before]], family[after]) > 2, name
        np.testing.assert_allclose(domain.tastes.family_steps.sum(axis=1), 1)


def test_a_variant_shares_words_but_neither_items_nor_habits(domains: dict[str, DemoDomain]) -> None:
    toys, variant = domains["toys"], domains["toys-2"]
    assert not np.array_equal(toys.tastes.family_steps, variant.tastes.family_steps)
    both = set(toys.catalog.attributes["title"]) & set(variant.catalog.attributes["title"])
    assert len(both) < 40
    assert len(set(toys.catalog.attributes["brand"]) & set(variant.catalog.attributes["brand"]) - {""}) < 6


def test_popularity_has_a_long_tail(domains: dict[str, DemoDomain]) -> None:
    for name, domain in domains.items():
        counts = np.sort(np.bincount(domain.interactions.items, minlength=400))[::-1]
        assert counts[:80].sum() > 0.38 * counts.sum(), name
        assert counts[:80].sum() < 0.7 * counts.sum(), name


def test_eight_domains_take_seconds(tmp_path: Path) -> None:
    start = time.process_time()  # CPU time, independent of other processes
    write_demo(tmp_path)
    assert time.process_time() - start < 4
