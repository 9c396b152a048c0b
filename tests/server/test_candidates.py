"""Every merge of an experiment with where it comes from, and the choice among them on validation."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from adapters import Lent, layout_of, merges_of, random_adapters, three_catalogs

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig, MergeMethod, from_flat
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import build_token_table
from fedmerge.errors import ClientError, MergeError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import MetricSums, metric_sums
from fedmerge.mergerec.learn import learn_coefficients
from fedmerge.mergerec.objective import PAPER, MergeRecSettings
from fedmerge.mergerec.pseudo_users import one_item_domain
from fedmerge.mergerec.variants import learned_settings, learned_variants
from fedmerge.mergerec.vectors import merge_vectors
from fedmerge.merging.candidate import Candidate, Origin, Provenance
from fedmerge.merging.methods import METHODS
from fedmerge.merging.stack import stack_adapters
from fedmerge.merging.training_free import merge_adapters
from fedmerge.runs.checkpoints import merge_folder, write_candidate
from fedmerge.server.candidates import candidate_of_rounds, candidates_of_mean, merge_candidates, recipe_of
from fedmerge.server.choice import choose

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
        "merge.task_arithmetic_coefficients": "0.5,1",
        "mergerec.steps": 3,
        "mergerec.granularities": "domain,layer",
        "mergerec.loss": "rec+kd",
        "text.max_attribute_tokens": 8,
        "text.max_tokens": 24,
    }
    return from_flat({**flat, **changes})


# Making


@pytest.fixture(scope="module")
def candidates(backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]) -> list[Candidate]:
    return merges_of(backbone, adapters, catalogs, settings())


def test_every_variant_is_made_once_in_order(candidates: list[Candidate]) -> None:
    assert [(candidate.label, candidate.method) for candidate in candidates] == [
        ("average", "average"),
        ("task-arithmetic 0.5", "task-arithmetic"),
        ("task-arithmetic 1", "task-arithmetic"),
        ("mergerec domain-wise", "mergerec"),
        ("mergerec layer-wise", "mergerec"),
    ]


TRAINING_FREE = [name for name, row in METHODS.items() if not row.learned and row.most_domains is None]


def test_the_configuration_knows_every_method() -> None:
    assert list(get_args(MergeMethod)) == list(METHODS)


def test_every_training_free_method_needs_adapters_alone(adapters: dict[str, Adapter]) -> None:
    one_each = {"merge.task_arithmetic_coefficients": "0.5", "livar.coefficients": "1"}
    chosen = settings(**{"merge.methods": ",".join(TRAINING_FREE), **one_each})
    made = merges_of(None, adapters, {}, chosen)
    assert [candidate.method for candidate in made] == TRAINING_FREE
    assert [candidate.label for candidate in made if candidate.label != candidate.method] == [
        "task-arithmetic 0.5",
        "knots-task-arithmetic 0.5",
        "livar-style 1",
    ]
    for candidate in made:
        wanted = merge_adapters(adapters, candidate.method, seed=5)
        record = candidate.provenance.to_dict()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert record["domains"] == {domain: adapter_sha256(adapters[domain]) for domain in DOMAINS}
        assert record["sha256"] == adapter_sha256(candidate.adapter)
        assert record["parameters"] == wanted.parameters
        for name, module in candidate.adapter.modules.items():
            torch.testing.assert_close(module.delta_weight(), wanted.adapter.modules[name].delta_weight())


def test_variants_are_every_density_with_every_coefficient(adapters: dict[str, Adapter]) -> None:
    chosen = settings(
        **{
            "merge.methods": "ties,breadcrumbs,tsv",
            "merge.densities": "0.3,1",
            "merge.coefficients": "0.5,1.5",
            "merge.scope": "layer",
            "merge.space": "core",
            "merge.output_rank": 3,
        }
    )
    kept: list[str] = []
    made = merges_of(None, adapters, {}, chosen, keep=lambda candidate: kept.append(candidate.label))
    labels = [candidate.label for candidate in made]
    assert kept == labels
    assert labels == [
        "ties density 0.3 coefficient 0.5",
        "ties density 0.3 coefficient 1.5",
        "ties density 1 coefficient 0.5",
        "ties density 1 coefficient 1.5",
        "breadcrumbs coefficient 0.5",
        "breadcrumbs coefficient 1.5",
        "tsv coefficient 0.5",
        "tsv coefficient 1.5",
    ]
    same: dict[str, Any] = {"space": "core", "output_rank": 3}
    wanted = [
        merge_adapters(adapters, "ties", density=0.3, coefficient=1.5, scope="layer", **same),
        merge_adapters(adapters, "tsv", coefficient=1.5, **same),
    ]
    for candidate, expected in zip((made[1], made[7]), wanted, strict=True):
        assert adapter_sha256(candidate.adapter) == adapter_sha256(expected.adapter)
        assert candidate.provenance.residuals == expected.residuals
        assert candidate.provenance.settings["scope"] == expected.settings["scope"]
    others: list[Candidate] = []
    again = merges_of(None, adapters, {}, chosen, finished={labels[1]: made[1]}, keep=others.append)
    assert again[1] is made[1]
    assert [candidate.label for candidate in others] == [label for label in labels if label != labels[1]]


def test_an_adapter_is_the_weighted_sum_of_the_updates_that_its_provenance_says(
    candidates: list[Candidate], adapters: dict[str, Adapter]
) -> None:
    for candidate in candidates:
        groups = candidate.provenance.to_dict()["coefficient_groups"]
        weights = candidate.provenance.to_dict()["coefficients"]
        assert list(weights) == list(DOMAINS)
        for name, module in candidate.adapter.modules.items():
            group = next((i for i, label in enumerate(groups) if label == f"layer {name.split('.')[2]}"), None)
            wanted = sum(
                (weights[domain] if group is None else weights[domain][group])
                * adapters[domain].modules[name].delta_weight()
                for domain in DOMAINS
            )
            torch.testing.assert_close(module.delta_weight(), wanted, atol=1e-5, rtol=1e-5)


def test_coefficients_by_method(candidates: list[Candidate]) -> None:
    by_label = {candidate.label: candidate.provenance.to_dict() for candidate in candidates}
    assert list(by_label["average"]["coefficients"].values()) == pytest.approx([1 / 3] * 3)
    assert list(by_label["task-arithmetic 0.5"]["coefficients"].values()) == [0.5] * 3
    assert list(by_label["task-arithmetic 1"]["coefficients"].values()) == [1.0] * 3
    assert by_label["average"]["coefficient_groups"] == ["all"]
    assert by_label["mergerec layer-wise"]["coefficient_groups"] == ["layer 0", "layer 1"]
    learned = np.array(list(by_label["mergerec domain-wise"]["coefficients"].values()))
    assert learned.shape == (3,)
    moved = np.abs(learned - 1 / math.sqrt(3))
    assert ((moved > 0) & (moved < 3 * 1.5 * 5e-3)).all()  # three steps of Adam from 1/√K
    layered = np.array(list(by_label["mergerec layer-wise"]["coefficients"].values()))
    assert layered.shape == (3, 2)


def test_provenance_says_where_a_merge_comes_from(
    candidates: list[Candidate], backbone: Backbone, adapters: dict[str, Adapter]
) -> None:
    for candidate in candidates:
        provenance = candidate.provenance.to_dict()
        assert json.loads(json.dumps(provenance, allow_nan=False)) == provenance
        assert provenance["method"] == candidate.method
        assert provenance["domains"] == {domain: adapter_sha256(adapters[domain]) for domain in DOMAINS}
        assert provenance["backbone"] == {"name": backbone.name, "sha256": backbone.sha256}
        assert provenance["policy"] == "adapter+catalog"
        assert provenance["sha256"] == adapter_sha256(candidate.adapter)
        assert provenance["rank"] == 8 == max(module.rank for module in candidate.adapter.modules.values())
    by_label = {candidate.label: candidate.provenance.to_dict() for candidate in candidates}
    assert by_label["task-arithmetic 0.5"]["parameters"] == {"coefficient": 0.5}
    parameters = by_label["mergerec layer-wise"]["parameters"]
    expected = settings().mergerec.model_dump(exclude={"granularities", "preset"})
    made = {"granularity": "layer", "seed": 5, "initial_coefficient": pytest.approx(1 / 3**0.5), "clamp": False}
    assert parameters == {**asdict(MergeRecSettings()), **expected, **made}
    losses = by_label["mergerec layer-wise"]["losses"]
    assert len(losses) == 3
    for step in losses:
        assert step["total"] == pytest.approx(step["rec"] + 1000 * step["kd"], rel=1e-4)
    assert "losses" not in by_label["average"]


def test_merges_are_reproducible_and_leave_their_inputs(
    candidates: list[Candidate], backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]
) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    digests = {domain: adapter_sha256(adapter) for domain, adapter in adapters.items()}
    lines: list[str] = []
    again = merges_of(backbone, dict(reversed(adapters.items())), catalogs, settings(), lines.append)
    assert [c.provenance.sha256 for c in again] == [c.provenance.sha256 for c in candidates]
    assert all(torch.equal(backbone.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {domain: adapter_sha256(adapter) for domain, adapter in adapters.items()} == digests
    assert [line for line in lines if line.startswith("merged: ")] == [f"merged: {c.label}" for c in candidates]


def test_the_provenance_has_the_hashes_of_the_origin(adapters: dict[str, Adapter]) -> None:
    recipe = recipe_of(settings(**{"merge.methods": "average,task-arithmetic"}))
    given = {domain: f"hash of {domain}" for domain in reversed(DOMAINS)}
    (made,) = merge_candidates(adapters, recipe.variants()[:1], Origin(given, None, "adapter"), recipe)
    assert list(made.provenance.domains.items()) == [(domain, f"hash of {domain}") for domain in DOMAINS]


def test_merges_without_some_domains_have_labels_of_their_own(adapters: dict[str, Adapter]) -> None:
    rest = {domain: adapter for domain, adapter in adapters.items() if domain != "toys"}
    recipe = recipe_of(settings(**{"merge.methods": "average,ties"}))
    origin = Origin({domain: adapter_sha256(adapter) for domain, adapter in rest.items()}, None, "adapter")
    made = merge_candidates(rest, recipe.variants(without=["toys"]), origin, recipe)
    assert [(each.label, each.provenance.label, each.method) for each in made] == [
        ("average without toys", "average without toys", "average"),
        ("ties without toys", "ties without toys", "ties"),
    ]
    finished = {each.label: each for each in made}
    again = merge_candidates(rest, recipe.variants(without=["toys"]), origin, recipe, finished=finished)
    assert [each is other for each, other in zip(again, made, strict=True)] == [True, True]


def test_a_secure_sum_gives_the_average_and_task_arithmetic(adapters: dict[str, Adapter]) -> None:
    section = settings(**{"merge.methods": "average,task-arithmetic"}).merge
    mean = merge_adapters(adapters, "average").adapter
    record = {"clients": list(DOMAINS), "threshold": 2, "sha256": "of the mean"}
    made = candidates_of_mean(mean, record, Origin(dict.fromkeys(DOMAINS, ""), None, "aggregate-only"), section)
    assert [candidate.label for candidate in made] == ["average", "task-arithmetic 0.5", "task-arithmetic 1"]
    for candidate, factor in zip(made, (1.0, 1.5, 3.0), strict=True):
        assert candidate.provenance.coefficients == dict.fromkeys(DOMAINS, pytest.approx(factor / 3))
        assert candidate.provenance.secure_sum == {"clients": list(DOMAINS), "threshold": 2}
        assert candidate.provenance.domains == dict.fromkeys(DOMAINS, "")
        for name, module in candidate.adapter.modules.items():
            torch.testing.assert_close(module.delta_weight(), factor * mean.modules[name].delta_weight())


def test_the_adapter_after_rounds_has_their_reports(adapters: dict[str, Adapter]) -> None:
    section = settings(**{"rounds.rule": "fedavgm", "rounds.number": 2}).rounds
    reports = [{"rank": 4}, {"rank": 4}]
    origin = Origin(dict.fromkeys(DOMAINS, ""), None, "adapter")
    made = candidate_of_rounds(adapters["tents"], section, reports, origin)
    assert (made.label, made.method) == ("fedavgm 2 rounds", "fedavgm")
    assert made.provenance.rounds == reports
    assert made.provenance.to_dict()["parameters"]["number"] == 2
    assert made.provenance.coefficients is None


def test_adapters_read_one_at_a_time_are_merged_to_the_same(
    candidates: list[Candidate], backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]
) -> None:
    lent = Lent(list(adapters), adapters.__getitem__)
    again = merges_of(backbone, lent, catalogs, settings())
    assert [c.provenance for c in again] == [c.provenance for c in candidates]
    many = Lent([f"{k:02d}" for k in range(30)], lambda name: adapters[DOMAINS[int(name) % 3]])
    merges_of(backbone, many, {}, settings(**{"merge.methods": "average,task-arithmetic"}))
    assert many.most < 16  # of a width of 32; the factors of so many fit before the sum itself is smaller


def test_variants_that_share_the_first_item_vectors_learn_what_each_learns_alone(
    candidates: list[Candidate], backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]
) -> None:
    text = settings().text
    pseudo = {}
    for domain, adapter in adapters.items():
        table = build_token_table(catalogs[domain], backbone.tokenizer, text.max_attribute_tokens)
        pseudo[domain] = one_item_domain(domain, backbone, adapter, table, text)
    chosen = settings().mergerec.model_dump(exclude={"granularities", "preset"})
    for granularity in ("domain", "layer"):
        learned = learn_coefficients(
            backbone,
            stack_adapters(adapters),
            pseudo,
            MergeRecSettings(granularity=granularity, seed=5, **chosen),
        )
        (found,) = (c for c in candidates if c.label == f"mergerec {granularity}-wise")
        assert list(found.provenance.to_dict()["coefficients"].values()) == learned.coefficients.tolist()


def test_only_learned_methods_need_catalogs(
    backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]
) -> None:
    without = merges_of(backbone, adapters, {}, settings(**{"merge.methods": "average"}))
    assert [candidate.label for candidate in without] == ["average"]
    with pytest.raises(MergeError, match=r"books, toys.*server\.catalogs"):
        merges_of(backbone, adapters, {"tents": catalogs["tents"]}, settings())


def test_learned_methods_share_their_pseudo_users_and_draw_their_pictures(
    backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    flat = {"merge.methods": "adamerging,mergerec", "adamerging.steps": 2}
    flat |= {"mergerec.pseudo_users": "chain", "mergerec.granularities": "layer"}
    lines: list[str] = []
    made = merges_of(backbone, adapters, catalogs, settings(**flat), lines.append)
    labels = ["adamerging domain-wise", "adamerging layer-wise", "mergerec layer-wise"]
    assert [candidate.label for candidate in made] == labels
    assert [line for line in lines if line.startswith("pseudo-users")] == [
        f"pseudo-users: {len(catalogs[domain])} of {domain} (chain) with their expert's vectors" for domain in DOMAINS
    ]
    assert made[0].provenance.to_dict()["losses"][0].keys() == {"total", "entropy"}
    assert made[0].provenance.to_dict()["parameters"]["clamp"] is True
    learned = made[2].provenance.to_dict()
    assert (learned["chosen_step"], learned["validation"]) == (3, [])
    wanted = merge_vectors(stack_adapters(adapters), torch.tensor(list(learned["coefficients"].values())))
    for name, module in made[2].adapter.modules.items():
        torch.testing.assert_close(module.delta_weight(), wanted.modules[name].delta_weight())
    for candidate in made:
        write_candidate(tmp_path, candidate, backbone.name)
        folder = merge_folder(tmp_path, candidate.label)
        for picture in ("coefficients.png", "losses.png"):
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    again = merges_of(None, adapters, {}, settings(**flat), finished={made.label: made for made in made})
    assert again == made
    plain = merges_of(None, adapters, {}, settings(**{"merge.methods": "average"}))
    write_candidate(tmp_path, plain[0], backbone.name)
    assert not list(merge_folder(tmp_path, "average").glob("*.png"))


def test_reconstructed_parts_are_named_in_the_provenance(
    backbone: Backbone, adapters: dict[str, Adapter], catalogs: dict[str, Catalog]
) -> None:
    flat = {"merge.methods": "mergerec,adamerging", "adamerging.steps": 2, "adamerging.granularities": "layer"}
    flat |= {"mergerec.loss": "similarity+kd", "mergerec.teacher": "contrastive"}
    lines: list[str] = []
    by_domain, by_layer, other = merges_of(backbone, adapters, catalogs, settings(**flat), lines.append)
    for candidate in (by_domain, by_layer):
        record = candidate.provenance.to_dict()
        assert record["reconstructions"] == ["Taesar-style (arXiv:2602.22743)", "FedCIA-style (arXiv:2504.14208)"]
        assert record["parameters"].items() >= {"loss": "similarity+kd", "teacher": "contrastive"}.items()
        assert record["losses"][0].keys() == {"total", "similarity", "kd"}
    assert sum(line.startswith("similarity: ") for line in lines) == 1  # both granularities share the blocks
    assert "reconstructions" not in other.provenance.to_dict()
    alone = settings(**{"merge.methods": "mergerec", "mergerec.loss": "similarity"})
    for candidate in merges_of(backbone, adapters, catalogs, alone):
        assert candidate.provenance.to_dict()["losses"][0].keys() == {"total", "similarity"}


def test_the_preset_of_the_paper_gives_what_was_not_given() -> None:
    paper = settings(**{"mergerec.preset": "paper", "mergerec.steps": 7})
    by_domain, _ = learned_variants("mergerec", paper.mergerec, paper.adamerging, paper.through_clients)
    assert learned_settings(by_domain, paper.mergerec, paper.adamerging, 5) == replace(PAPER, steps=7, seed=5)


# Choosing


def candidate(label: str, method: str) -> Candidate:
    return Candidate(Adapter({}), Provenance(method, {}, "", label=label))


def validation(scores: dict[str, float], metric: str = "ndcg@10", other: float = 0.0) -> MetricSums:
    """Two users whose mean in one metric is as given, and ``other`` in all others."""
    outcomes = {}
    for label, score in scores.items():
        users = np.full((2, len(METRICS)), other)
        users[:, METRICS.index(metric)] = (0.5 * score, 1.5 * score)
        outcomes[label] = users
    return metric_sums(outcomes, "unmasked")


THREE = [candidate("a 1", "a"), candidate("a 2", "a"), candidate("b", "b")]


def test_the_best_variant_of_each_method_and_the_best_of_all_by_hand() -> None:
    sums = {
        "x": validation({"a 1": 0.50, "a 2": 0.10, "b": 0.28}),
        "y": validation({"a 1": 0.00, "a 2": 0.50, "b": 0.30}),
    }
    best, served, scores = choose(THREE, sums, ["x", "y"], "ndcg@10")
    assert scores == pytest.approx({"a 1": 0.25, "a 2": 0.30, "b": 0.29})
    assert best == {"a": "a 2", "b": "b"}
    assert served == "a 2"


def test_domains_count_alike_however_many_users_they_have() -> None:
    rows = np.zeros((200, len(METRICS)))
    good = rows.copy()
    good[:, METRICS.index("ndcg@10")] = 0.4
    large = metric_sums({"a 1": good, "a 2": rows, "b": rows}, "unmasked")
    small = validation({"a 1": 0.0, "a 2": 0.5, "b": 0.0})
    assert choose(THREE, {"x": large, "y": small}, ["x", "y"], "ndcg@10")[1] == "a 2"


def test_unseen_domains_have_no_say() -> None:
    seen = validation({"a 1": 0.2, "a 2": 0.1, "b": 0.1})
    unseen = validation({"a 1": 0.0, "a 2": 1.0, "b": 0.9})
    best, served, scores = choose(THREE, {"x": seen, "new": unseen}, ["x"], "ndcg@10")
    assert (best, served) == ({"a": "a 1", "b": "b"}, "a 1")
    assert scores == pytest.approx({"a 1": 0.2, "a 2": 0.1, "b": 0.1})


def test_of_equal_scores_the_first_counts() -> None:
    sums = {"x": validation({"a 1": 0.25, "a 2": 0.25, "b": 0.25})}
    best, served, _ = choose(THREE, sums, ["x"], "ndcg@10")
    assert (best, served) == ({"a": "a 1", "b": "b"}, "a 1")
    best, served, _ = choose([THREE[2], THREE[1], THREE[0]], sums, ["x"], "ndcg@10")
    assert (best, served) == ({"a": "a 2", "b": "b"}, "b")


def test_only_the_selection_metric_decides() -> None:
    sums = {"x": validation({"a 1": 0.1, "a 2": 0.9, "b": 0.3}, "mrr", other=0.5)}
    assert choose(THREE, sums, ["x"], "mrr")[1] == "a 2"
    assert choose(THREE, sums, ["x"], "recall@10")[1] == "a 1"  # all equal there


def test_the_choice_does_not_depend_on_the_order_of_domains() -> None:
    rng = np.random.default_rng(0)
    sums = {f"d{i}": validation({label: rng.random() for label in ("a 1", "a 2", "b")}) for i in range(7)}
    forward, backward = choose(THREE, sums, sorted(sums), "ndcg@10"), choose(THREE, sums, sorted(sums)[::-1], "ndcg@10")
    assert forward == backward  # to the last bit
    means = {label: math.fsum(s.mean(label, "ndcg@10") for s in sums.values()) / 7 for label in ("a 1", "a 2", "b")}
    assert forward[2] == pytest.approx(means)


def test_sums_without_a_candidate_are_refused() -> None:
    with pytest.raises(ClientError, match="'b'"):
        choose(THREE, {"x": validation({"a 1": 0.1, "a 2": 0.2})}, ["x"], "ndcg@10")
