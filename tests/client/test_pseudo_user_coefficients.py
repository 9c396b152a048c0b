"""Coefficients on pseudo-users at one client: its cohort cache and its answers.

Whole runs are in test_policies_in_a_run.py.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import layout_of, merges_of, random_adapters
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from in_process import small_experiment
from safetensors.torch import load_file, save_file

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.coefficients import pseudo_users as through_clients
from fedmerge.client.coefficients.pseudo_users import (
    PSEUDO_FILE,
    Cohort,
    cache_cohort,
    cohort_folder,
    gradient_on_pseudo_users,
    load_or_encode_items,
    pseudo_user_gradient,
    read_cached_cohort,
    take_local_steps,
)
from fedmerge.config import from_flat, to_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import build_token_table, item_sequences
from fedmerge.errors import ClientError, MergeError, PolicyError
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.mergerec.learn import draw_pseudo_users
from fedmerge.mergerec.objective import PAPER
from fedmerge.mergerec.variants import learned_variant, learned_variants
from fedmerge.merging.stack import stack_adapters
from sim.app.client.app import app as client_app
from sim.app.client.coefficients import _cached_cohort
from sim.app.messages import records

SETTINGS = replace(PAPER, steps=4, batch_size=3)
NAME = "toys"


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> dict[str, Adapter]:
    found = list(random_adapters(layout_of(backbone)).values())
    return dict(zip(("beauty", "books", NAME), found, strict=True))


@pytest.fixture(scope="module")
def kept(
    backbone: Backbone, adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cohort, list[np.ndarray]]:
    """A cached cohort, and the client's items."""
    config = from_flat(
        {"cache_dir": str(tmp_path_factory.mktemp("cache")), "mergerec.pseudo_users": "chain", "text.max_tokens": 60}
    )
    catalog = generate_domain(NAME, num_users=20, num_items=20).catalog
    folder = cohort_folder(config, NAME, catalog, backbone, cohort_sha256(adapters))
    for _ in range(2):  # the second call finds it in the cache
        cache_cohort(folder, NAME, backbone, adapters, catalog, config)
    table = build_token_table(catalog, backbone.tokenizer, config.text.max_attribute_tokens)
    items = item_sequences(table, backbone.special, config.text.max_tokens)
    rest = {name: adapters[name] for name in ("beauty", NAME)}
    with pytest.raises(ClientError, match=r"books.*beauty, toys"):
        cache_cohort(folder, "books", backbone, rest, catalog, config)
    return read_cached_cohort(folder, NAME, items, "pseudo-users"), items


def test_a_cohort_comes_back_from_disk(adapters: dict[str, Adapter], kept: tuple[Cohort, list[np.ndarray]]) -> None:
    cohort, items = kept
    assert {name: adapter_sha256(found) for name, found in cohort.adapters.items()} == {
        name: adapter_sha256(sent) for name, sent in adapters.items()
    }
    assert cohort.pseudo is not None
    assert len(cohort.pseudo.users) == len(items) == 20
    assert sum(map(len, cohort.pseudo.users)) > sum(map(len, items))  # chains have several items
    with pytest.raises(ClientError, match=r"domain toys: .*elsewhere .*cache_dir"):
        read_cached_cohort(cohort.folder / "elsewhere", NAME, items, "pseudo-users")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other lengths"])
def test_lost_pseudo_users_are_an_error_unless_the_run_learns_on_own_users(
    kept: tuple[Cohort, list[np.ndarray]], tmp_path: Path, damage: str
) -> None:
    cohort, items = kept
    folder = shutil.copytree(cohort.folder, tmp_path / "cohort")
    path = folder / PSEUDO_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "other lengths":
        tensors = load_file(path)
        save_file({**tensors, "lengths": tensors["lengths"][:-1]}, path)
    else:
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut" else 0])
    with pytest.raises(ClientError) as caught:
        read_cached_cohort(folder, NAME, items, "pseudo-users")
    assert all(part in str(caught.value) for part in (f"domain {NAME}", str(folder), "delete the folder", "resume"))
    assert read_cached_cohort(folder, NAME, items, "own-users").pseudo is None


def test_a_client_that_lost_its_pseudo_users_answers_with_no_gradient_of_real_users(tmp_path: Path) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    config = small_experiment(
        tmp_path, **{"privacy.policy": "catalog-private", "merge.methods": "mergerec", "privacy.min_users": 2}
    )
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, resolve_compute("cpu", "float32"))
    made = random_adapters(layout_of(backbone, ("query", "value")))
    cohort = {"beauty": made["toys"], "books": made["books"]}

    def send(message_type: str, content: RecordDict) -> RecordDict:
        _cached_cohort.cache_clear()  # a deployed client answers each message in a new process
        context = Context(1, 1, {"partition-id": 0, "num-partitions": 4}, RecordDict(), dict(to_flat(config)))
        return client_app(Message(content, dst_node_id=1, message_type=message_type), context).content

    asked = records.GradientRequest("mergerec domain-wise", cohort_sha256(cohort), 0, 0)
    at = torch.full((2,), 0.5)
    gradient = records.gradient_request_record(asked, at, at, [0, 1])
    assert records.read_pseudo_users(send(records.COHORT, records.cohort_record(cohort))) > 0
    assert len(records.read_gradient(send(records.GRADIENT, gradient))) == 2
    (path,) = Path(config.cache_dir).glob(f"cohorts/*/{PSEUDO_FILE}")
    path.unlink()
    for message_type, content in ((records.GRADIENT, gradient), (records.COHORT, records.cohort_record(cohort))):
        assert "domain beauty: found no complete cohort" in str(records.read_error(send(message_type, content)))
    shutil.rmtree(path.parent)  # the remedy that the message names
    assert records.read_pseudo_users(send(records.COHORT, records.cohort_record(cohort))) > 0
    assert len(records.read_gradient(send(records.GRADIENT, gradient))) == 2


@pytest.mark.parametrize("label", ["../../outside", "/srv/models/prod", "", ".hidden", "a/b"])
def test_a_cohort_with_a_label_that_is_not_a_name_is_refused(adapters: dict[str, Adapter], label: str) -> None:
    content = records.cohort_record({NAME: adapters[NAME], label: adapters["books"]})
    with pytest.raises(ClientError, match=re.escape(repr(label))):
        records.read_cohort(content)


def test_item_vectors_are_encoded_once_per_merge(
    backbone: Backbone,
    adapters: dict[str, Adapter],
    kept: tuple[Cohort, list[np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort, items = kept
    vectors, calls = stack_adapters(adapters), []

    def counted(encoder: Backbone, sequences: list[np.ndarray]) -> torch.Tensor:
        calls.append(len(sequences))
        return encode(encoder, sequences)

    monkeypatch.setattr(through_clients, "encode", counted)
    first, again = (
        load_or_encode_items(cohort, NAME, items, backbone, vectors, torch.full((3,), 0.2)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert len(calls) == 1
    assert not torch.equal(load_or_encode_items(cohort, NAME, items, backbone, vectors, torch.full((3,), 0.9)), first)


def test_gradients_of_parts_add_up_and_unknown_pseudo_users_are_refused(
    backbone: Backbone, adapters: dict[str, Adapter], kept: tuple[Cohort, list[np.ndarray]]
) -> None:
    cohort, items = kept
    vectors, at = stack_adapters(adapters), torch.full((3, 2), 0.3)
    students = load_or_encode_items(cohort, NAME, items, backbone, vectors, torch.full((3,), 0.2))
    assert cohort.pseudo is not None

    def gradient(*users: int) -> torch.Tensor:
        assert cohort.pseudo is not None
        return gradient_on_pseudo_users(backbone, vectors, cohort.pseudo, students, users, at, SETTINGS)

    whole = gradient(0, 1, 2)
    assert torch.allclose(whole, (gradient(0) + 2 * gradient(1, 2)) / 3, rtol=1e-4, atol=1e-6)
    for users in ((), (20,), (-1, 3)):
        with pytest.raises(ClientError, match=r"toys.*\b20\b"):
            gradient(*users)

    found = pseudo_user_gradient(backbone, vectors, cohort.pseudo, students, SETTINGS, 1, ())
    drawn = draw_pseudo_users((20,), SETTINGS)[1]
    assert torch.equal(found(2, at), gradient(*drawn[3].tolist()))


def test_local_steps_are_adam() -> None:
    settings = replace(SETTINGS, learning_rate=0.1)
    start = torch.tensor([0.5, 0.5])
    change = take_local_steps(lambda step, at: torch.tensor([2.0, -3.0]), start, settings, 3)
    assert change.tolist() == pytest.approx([-0.3, 0.3], abs=1e-6)  # a constant gradient: its sign, three times
    clamped = take_local_steps(
        lambda step, at: torch.ones(2), start, replace(settings, learning_rate=0.4, clamp=True), 3
    )
    assert clamped.tolist() == [-0.5, -0.5]


def test_labels_and_methods_of_learning_through_clients(adapters: dict[str, Adapter]) -> None:
    config = from_flat({"privacy.policy": "catalog-private", "merge.methods": "mergerec"})
    with pytest.raises(PolicyError, match=r"mergerec: .* keeps the catalogs at the clients, .* \(fedmerge run\)"):
        merges_of(None, adapters, {}, config)
    with pytest.raises(MergeError, match="found 'mergerec', expected one of adamerging domain-wise, "):
        learned_variant("mergerec", config.mergerec, config.adamerging, config.through_clients)
    own = from_flat(
        {
            "privacy.policy": "catalog-private",
            "through_clients.users": "own-users",
            "mergerec.granularities": "domain,layer",
        }
    )
    variants = learned_variants("mergerec", own.mergerec, own.adamerging, own.through_clients)
    assert [variant.name for variant in variants] == [
        "mergerec domain-wise own-users",
        "mergerec layer-wise own-users",
    ]
