"""rmm-style by the reward on pseudo-users: the reward against a float64 oracle, provenance, resuming, refusals."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import layout_of, random_adapters, three_catalogs

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig, from_flat
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ConfigError, MergeError, PolicyError
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, assemble, layer_candidates
from fedmerge.mergerec.layer_maps.episodes import OTHERS
from fedmerge.mergerec.layer_maps.rewards import MOST_ITEMS, draw_items, on_pseudo_users
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.pseudo_users import PseudoDomain, pseudo_domains
from fedmerge.merging.candidate import Candidate, Origin, Provenance
from fedmerge.merging.training_free import merge_adapters
from fedmerge.seeding import derive
from fedmerge.server.candidates import merge_candidates, recipe_of
from fedmerge.server.layer_search import search_on_pseudo_users

DOMAINS = ("books", "tents", "toys")


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> dict[str, Adapter]:
    return random_adapters(layout_of(backbone))


@pytest.fixture(scope="module")
def catalogs() -> dict[str, Catalog]:
    return three_catalogs()


def settings(**changes: Any) -> ExperimentConfig:
    flat = {
        "seed": 5,
        "domains.train": ",".join(DOMAINS),
        "domains.unseen": "",
        "merge.methods": "rmm-style",
        "rmm.candidates": "experts,coefficients,zero",
        "rmm.coefficients": "0.3,0.6",
        "rmm.users": 8,
        "rmm.shards": 2,
        "rmm.budget": 40,
        "text.max_attribute_tokens": 8,
        "text.max_tokens": 24,
    }
    return from_flat({**flat, **changes})


@pytest.fixture(scope="module")
def pseudo(backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]) -> dict[str, PseudoDomain]:
    return pseudo_domains(backbone, adapters, catalogs, settings().text, kind="one-item", seed=5)


def merge(
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    folder: Path | None = None,
) -> Candidate:
    search = search_on_pseudo_users(backbone, adapters, catalogs, config, folder=folder)
    recipe = recipe_of(config)
    origin = Origin(dict.fromkeys(adapters, ""), None, config.privacy.policy)
    (made,) = merge_candidates(adapters, recipe.variants(), origin, recipe, search=search)
    return made


def divergence(z: np.ndarray, s: np.ndarray, top: int, temperature: float) -> float:
    """1000 · T² · KL(softmax(s / T) || softmax(z / T)) over the largest s, in float64."""
    kept = np.argsort(-s)[:top]
    p, q = (np.exp((values[kept] - values[kept].max()) / temperature) for values in (s, z))
    p, q = p / p.sum(), q / q.sum()
    return float(1000 * temperature**2 * (p * np.log(p / q)).sum())


def test_the_reward_equals_an_oracle(
    backbone: Backbone, adapters: dict[str, Adapter], pseudo: dict[str, PseudoDomain]
) -> None:
    candidates = layer_candidates(adapters, ("experts", "coefficients", "ties"), (0.3, 0.6), seed=0)
    wanted = MergeRecSettings(kd_top_k=7, seed=5)
    read = on_pseudo_users(backbone, candidates, pseudo, wanted, num_users=8, num_shards=2)
    layer_map = tuple(range(len(candidates.layout.groups)))
    with applied(backbone, assemble(candidates, layer_map)):
        students = {name: encode(backbone, pseudo[name].items).double().numpy() for name in DOMAINS}
    for shard in (0, 1, OTHERS):
        found = read(layer_map, shard)
        assert sorted(found) == list(DOMAINS)
        for name, (number, total) in found.items():
            order = np.random.default_rng(derive(5, "rmm", "pseudo-users", name)).permutation(20)
            users = {0: order[:4], 1: order[4:8], OTHERS: order[8:16]}[shard]
            teacher = pseudo[name].teacher_items.double().numpy()
            expected = -sum(
                divergence(students[name] @ students[name][user], teacher @ teacher[user], 7, 0.05) for user in users
            )
            assert number == len(users)
            assert total == pytest.approx(expected, rel=1e-4)


def test_an_expert_has_no_loss_on_its_own_domain(
    backbone: Backbone, adapters: dict[str, Adapter], pseudo: dict[str, PseudoDomain]
) -> None:
    candidates = layer_candidates(adapters, ("experts",), (), seed=0)
    read = on_pseudo_users(backbone, candidates, pseudo, MergeRecSettings(), num_users=8, num_shards=1)
    for number, name in enumerate(DOMAINS):
        sums = read((number,) * len(candidates.layout.groups), 0)
        assert sums[name][1] == pytest.approx(0, abs=1e-3)
        assert all(total < -0.1 for other, (_, total) in sums.items() if other != name)


def test_a_search_ranks_at_most_two_thousand_items() -> None:
    drawn = draw_items("books", 5000, seed=1)
    assert len(drawn) == len({*drawn.tolist()}) == MOST_ITEMS == 2000
    assert (np.diff(drawn) > 0).all()
    assert draw_items("books", 30, seed=1).tolist() == list(range(30))
    assert drawn.tolist() != draw_items("books", 5000, seed=2).tolist()


@pytest.fixture(scope="module")
def made(backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]) -> Candidate:
    return merge(backbone, adapters, catalogs, settings())


def test_provenance_holds_map_reward_and_episodes(made: Candidate, adapters: dict[str, Adapter]) -> None:
    provenance = Provenance.from_dict(made.provenance.to_dict())
    search = provenance.search
    assert (made.label, made.method) == ("rmm-style", "rmm-style")
    assert search is not None
    assert search["start"] == "task-arithmetic 0.6"
    assert search["episodes"] == min(40, 2 * 6 * len(search["map"]))  # two sweeps of six candidates, or the budget
    assert search["reward"] == max(each["others"] for each in search["read_again"]) >= 0
    assert next(each["map"] for each in search["read_again"] if each["others"] == search["reward"]) == [
        *search["map"].values()
    ]
    candidates = layer_candidates(adapters, ("experts", "coefficients", "zero"), (0.3, 0.6), seed=5)
    layer_map = [candidates.names.index(name) for name in search["map"].values()]
    assert adapter_sha256(assemble(candidates, layer_map)) == provenance.sha256 == adapter_sha256(made.adapter)
    assert provenance.parameters is not None
    assert provenance.parameters["searcher"] == "coordinate"
    assert list(search["map"]) == provenance.coefficient_groups
    assert provenance.coefficients is not None
    for name, row in provenance.coefficients.items():
        chosen = [candidates.coefficients[index] for index in layer_map]
        assert row == [float(of_all[DOMAINS.index(name)]) for of_all in chosen if of_all is not None]


def test_the_search_beats_its_start_on_the_users_who_chose(made: Candidate) -> None:
    assert made.provenance.search is not None
    assert made.provenance.search["reward"] > 0


def test_one_domain_gives_its_expert_and_one_coefficient_task_arithmetic(
    backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]
) -> None:
    alone = merge(backbone, {"books": adapters["books"]}, {"books": catalogs["books"]}, settings())
    assert adapter_sha256(alone.adapter) == adapter_sha256(adapters["books"])
    neutral = merge(
        backbone, adapters, catalogs, settings(**{"rmm.candidates": "coefficients", "rmm.coefficients": "0.4"})
    )
    expected = merge_adapters(adapters, "task-arithmetic", coefficient=0.4).adapter
    assert adapter_sha256(neutral.adapter) == adapter_sha256(expected)


@pytest.mark.parametrize("searcher", ["coordinate", "evolution", "ppo"])
def test_the_same_seed_gives_the_same_bytes_whatever_the_order_of_the_domains(
    backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog], searcher: str
) -> None:
    config = settings(**{"rmm.searcher": searcher, "rmm.shards": 1, "rmm.budget": 34})
    first = merge(backbone, adapters, catalogs, config)
    again = merge(backbone, dict(reversed(adapters.items())), catalogs, config)
    assert first.provenance == replace(again.provenance, domains=first.provenance.domains)


def test_a_killed_search_makes_no_reading_twice_and_no_pseudo_users_for_those_on_disk(
    backbone: Backbone,
    adapters: dict[str, Adapter],
    catalogs: dict[str, Catalog],
    made: Candidate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = list[tuple[Any, int]]()
    whole = on_pseudo_users

    def killing(*given: Any) -> Any:
        read = whole(*given)

        def counted(layer_map: Any, shard: int) -> Any:
            if len(readings) == 7:
                readings.append(((), 0))
                raise KeyboardInterrupt
            readings.append((layer_map, shard))
            return read(layer_map, shard)

        return counted

    monkeypatch.setattr("fedmerge.server.layer_search.on_pseudo_users", killing)
    with pytest.raises(KeyboardInterrupt):
        merge(backbone, adapters, catalogs, settings(), tmp_path)
    resumed = merge(backbone, adapters, catalogs, settings(), tmp_path)
    assert resumed == made
    assert len(readings) == len({*readings})
    monkeypatch.setattr("fedmerge.server.layer_search.pseudo_domains", None)  # it would be called in vain
    assert merge(backbone, adapters, catalogs, settings(), tmp_path) == made


def test_refusals(backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]) -> None:
    def never(candidates: LayerCandidates) -> Any:
        raise AssertionError

    with pytest.raises(MergeError, match="no catalog of tents, toys"):
        merge(backbone, adapters, {"books": catalogs["books"]}, settings())
    with pytest.raises(MergeError, match="found no backbone"):
        search_on_pseudo_users(None, adapters, catalogs, settings())(
            layer_candidates(adapters, ("experts",), (), seed=0)
        )
    through = settings(**{"rmm.reward": "validation", "privacy.policy": "catalog-private", "rmm.users": 40})
    with pytest.raises(MergeError, match=r"asks the clients of a run.*set rmm.reward = 'pseudo-users'"):
        merge(backbone, adapters, catalogs, through)
    recipe = recipe_of(settings())
    with pytest.raises(PolicyError, match="rmm-style"):
        merge_candidates(adapters, recipe.variants(), Origin(dict.fromkeys(adapters, ""), None, "adapter"), recipe)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rmm.reward": "validation"}, "sends every single adapter"),
        ({"privacy.policy": "catalog-private"}, "keeps them at the clients; set rmm.reward = 'validation'"),
        ({"privacy.policy": "adapter"}, "server.catalogs is 'none'"),
        ({"privacy.policy": "aggregate-only"}, "holds rmm-style, which needs every single adapter"),
        (
            {"rmm.reward": "validation", "privacy.policy": "catalog-private", "privacy.metrics": "noised"},
            "privacy.metrics = 'noised': every episode",
        ),
        (
            {
                "rmm.reward": "validation",
                "privacy.policy": "catalog-private",
                "dp.mode": "domain-local",
                "dp.noise_multiplier": 1.0,
                "dp.delta": 1e-5,
            },
            "dp.mode = 'domain-local': the sums of the search have no noise",
        ),
        (
            {"rmm.reward": "validation", "privacy.policy": "catalog-private", "rmm.users": 30, "rmm.shards": 2},
            "15 users a shard are fewer than privacy.min_users = 20",
        ),
        ({"rounds.rule": "rmm-style"}, "rounds.rule = 'rmm-style' would search anew in every round"),
        ({"rmm.shards": 9}, "shards = 9 exceeds users = 8"),
        ({"rmm.candidates": "zero,zero"}, "candidates names zero more than once"),
        ({"rmm.coefficients": "0.5,0.5"}, "coefficients has 0.5 more than once"),
        (
            {"dp.mode": "domain-central", "dp.noise_multiplier": 1.0, "dp.delta": 1e-5},
            "merge.methods can only be 'average'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert problem in str(caught.value)
