"""Names of merge variants, and provenance as it is written to a file and read again."""

import json
from typing import Any

import pytest
from adapters import random_adapter

from fedmerge.adapter import adapter_sha256
from fedmerge.config import Merge
from fedmerge.merging.candidate import Candidate, MergeVariant, Origin, Provenance, provenance_of_merge
from fedmerge.server.candidates import training_free_variants

LAYOUT = {"layer.0.query": (4, 6), "layer.1.query": (4, 6)}


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        (MergeVariant("average"), "average"),
        (MergeVariant("task-arithmetic", {"coefficient": 0.4}), "task-arithmetic 0.4"),
        (MergeVariant("knots-task-arithmetic", {"coefficient": 1.0}), "knots-task-arithmetic 1"),
        (MergeVariant("ties", {"density": 0.2, "coefficient": 1.5}), "ties density 0.2 coefficient 1.5"),
        (MergeVariant("slerp:slerp", {"coefficient": 0.5}), "slerp:slerp coefficient 0.5"),
        (MergeVariant("mergerec", granularity="layer"), "mergerec layer-wise"),
        (MergeVariant("mergerec", granularity="domain", own_users=True), "mergerec domain-wise own-users"),
        (MergeVariant("fedavgm", num_rounds=1), "fedavgm 1 round"),
        (MergeVariant("fedavgm", num_rounds=3), "fedavgm 3 rounds"),
        (MergeVariant("average", without=("books", "toys")), "average without books toys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_label_of_a_variant(variant: MergeVariant, label: str) -> None:
    assert variant.label == label
    assert variant.name == label.partition(" without ")[0]


def test_the_label_of_a_merge_without_many_domains_is_short_enough_for_a_folder() -> None:
    many = tuple(f"{'long-name' * 6}-{number}" for number in range(20))
    label = MergeVariant("average", without=many).label
    assert label.startswith("average without 20 domains ")
    assert len(label) < 48
    assert label != MergeVariant("average", without=(*many[1:], "another")).label


def test_variants_of_a_method_are_the_values_that_its_parameters_have_in_the_section() -> None:
    section = Merge(task_arithmetic_coefficients=(0.5, 1.0), densities=(0.3, 1.0), coefficients=(2.0,))
    found = {
        method: [dict(variant.parameters) for variant in training_free_variants(method, section)]
        for method in ("average", "task-arithmetic", "ties", "tsv")
    }
    assert found == {
        "average": [{}],
        "task-arithmetic": [{"coefficient": 0.5}, {"coefficient": 1.0}],
        "ties": [{"density": 0.3, "coefficient": 2.0}, {"density": 1.0, "coefficient": 2.0}],
        "tsv": [{"coefficient": 2.0}],
    }
    assert [dict(variant.parameters) for variant in training_free_variants("ties", Merge())] == [{}]


def test_what_every_merge_of_a_run_records_in_the_order_of_the_file() -> None:
    adapter = random_adapter(LAYOUT, 3, 1.0, seed=0)
    origin = Origin({"books": "b" * 64, "toys": ""}, {"name": "bert", "sha256": "c" * 64}, "adapter")
    provenance = provenance_of_merge(MergeVariant("average", without=("tents",)), adapter, origin)
    assert list(provenance.to_dict().items()) == [
        ("label", "average without tents"),
        ("method", "average"),
        ("domains", {"books": "b" * 64, "toys": ""}),
        ("rank", 3),
        ("excluded", {}),
        ("policy", "adapter"),
        ("backbone", {"name": "bert", "sha256": "c" * 64}),
        ("sha256", adapter_sha256(adapter)),
    ]
    candidate = Candidate(adapter, provenance)
    assert (candidate.label, candidate.method) == ("average without tents", "average")
    other = random_adapter(LAYOUT, 5, 1.0, seed=1)
    assert candidate == Candidate(other, provenance)
    assert candidate != Candidate(other, provenance_of_merge(MergeVariant("average"), other, origin))


@pytest.mark.parametrize("run", [None, "demo-1"])
def test_only_a_merge_of_adapters_that_existed_before_has_a_run(run: str | None) -> None:
    adapter, excluded = random_adapter(LAYOUT, 3, 1.0, seed=0), {"toys": "left out"}
    again = Origin({"books": "b"}, None, "adapter", excluded, is_remerge=True, run=run)
    entries = provenance_of_merge(MergeVariant("average"), adapter, again).to_dict()
    assert (entries["run"], entries["excluded"], entries["backbone"]) == (run, excluded, None)


@pytest.mark.parametrize(
    "entries",
    [
        {"label": "average", "method": "average", "domains": {"a": "b"}, "backbone": None, "sha256": "c"},
        {"method": "ties", "domains": {}, "backbone": None, "sha256": "c", "run": None, "scope": "layer", "seed": 3},
        {"method": "mergerec", "domains": {}, "backbone": None, "sha256": "c", "losses": [], "chosen_step": 0},
        {"method": "average", "domains": {}, "backbone": None, "sha256": "c", "of a later version": [1, 2]},
    ],
)
def test_provenance_survives_its_file(entries: dict[str, Any]) -> None:
    read = Provenance.from_dict(json.loads(json.dumps(entries)))
    assert json.dumps(read.to_dict()) == json.dumps(entries)
    assert read.is_learned == ("losses" in entries)
