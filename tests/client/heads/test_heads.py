"""A client's own head: trained once, made again if damaged, resumed if killed; its rows are as defined."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Event, Thread

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter

from fedmerge.adapter import Adapter
from fedmerge.client.audit.users import prepare_for_audit
from fedmerge.client.evaluate import encode_text, model_ranks, seen_items
from fedmerge.client.heads.heads import (
    LocalHead,
    head_ranks,
    head_report,
    head_sources,
    load_or_train_head,
    why_no_head,
)
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Head, Simulation
from fedmerge.domain.interactions import make_interactions
from fedmerge.domain.splits import evaluation_examples
from fedmerge.errors import ClientError, DomainError
from fedmerge.evaluation.ranks import METRICS, IntArray, per_user_metrics, rank_targets
from fedmerge.evaluation.sums import VARIANTS, Variant
from fedmerge.sequence.anchored import anchored_source, text_head, whitened, whitening
from fedmerge.sequence.fusion import FusionChoice, choose_weights

SMALL = Head(kind="local", hidden_size=8, max_epochs=3, dropout=0.1)


@pytest.fixture(scope="module")
def adapter(toys: LocalDomain) -> Adapter:
    return random_adapter(layout_of(toys.backbone, ("query",)), 2, 1.0, 0)


def trained(
    domain: LocalDomain, adapter: Adapter | None, cache: Path, head: Head = SMALL, seed: int = 0
) -> tuple[LocalHead, list[str]]:
    lines: list[str] = []
    return load_or_train_head(domain, adapter, head, None, seed, str(cache), lines.append), lines


def heads_on_disk(cache: Path) -> list[Path]:
    return sorted((cache / "heads").iterdir())


def same(one: LocalHead, other: LocalHead) -> bool:
    left, right = one.model.state_dict(), other.model.state_dict()
    return (
        left.keys() == right.keys()
        and all(torch.equal(left[key], right[key]) for key in left)
        and one.fusion == other.fusion
    )


def test_a_head_is_trained_once(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    first, _ = trained(toys, adapter, tmp_path)
    again, lines = trained(toys, adapter, tmp_path)
    (folder,) = heads_on_disk(tmp_path)
    assert lines == [f"toys: reusing the cached head in {folder}"]
    assert (first.cached, again.cached) == (False, True)
    assert same(first, again)
    elsewhere, _ = trained(toys, adapter, tmp_path / "elsewhere")
    assert same(first, elsewhere)


def test_who_needs_a_head_that_is_being_trained_waits_for_it(toys: LocalDomain, tmp_path: Path) -> None:
    waits, found, lines = Event(), Queue[LocalHead](), list[str]()

    def listen(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            waits.set()

    def train_too() -> None:
        found.put(load_or_train_head(toys, None, SMALL, None, 0, str(tmp_path), listen))

    other = Thread(target=train_too)

    def progress(line: str) -> None:
        if not other.ident:
            other.start()
            assert waits.wait(60)

    first = load_or_train_head(toys, None, SMALL, None, 0, str(tmp_path), progress)
    second = found.get(timeout=60)
    (folder,) = heads_on_disk(tmp_path)  # and no lock beside it
    assert lines[:2] == [
        "toys: waiting for another process that trains this head",
        f"toys: reusing the cached head in {folder}",
    ]
    assert (first.cached, second.cached) == (False, True)
    assert same(first, second)


def test_a_lock_that_cannot_be_written_is_named(toys: LocalDomain, tmp_path: Path) -> None:
    (tmp_path / "heads").write_text("a file in the way")
    with pytest.raises(ClientError, match=rf"{tmp_path}/heads/.*\.lock cannot be written.*set cache_dir"):
        trained(toys, None, tmp_path)


def test_other_inputs_have_a_head_of_their_own(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    trained(toys, adapter, tmp_path)
    audited = prepare_for_audit(toys, Simulation(held_out_users=0.5), 0)
    planted = prepare_for_audit(toys, Simulation(canaries=3), 0)
    others = (
        (toys, None, SMALL, 0),
        (toys, adapter, SMALL, 1),
        (toys, adapter, SMALL.model_copy(update={"hidden_size": 4}), 0),
        (audited, adapter, SMALL, 0),
        (planted, adapter, SMALL, 0),
    )
    for number, (domain, encoder, head, seed) in enumerate(others):
        trained(domain, encoder, tmp_path, head, seed)
        assert len(heads_on_disk(tmp_path)) == number + 2
    # of the section [head], what is for federated heads alone changes nothing
    trained(toys, adapter, tmp_path, SMALL.model_copy(update={"rounds": 3, "vectors": ("expert",)}))
    assert len(heads_on_disk(tmp_path)) == 6


def test_users_left_out_by_an_audit_do_not_change_a_head(toys: LocalDomain, tmp_path: Path) -> None:
    """The head of a domain that never had the users left out: the same to the last bit."""
    audited = prepare_for_audit(toys, Simulation(held_out_users=0.5), 0)
    assert audited.left_out is not None
    sequences = [list(toys.interactions.sequence(user)) for user in range(toys.interactions.num_users)]
    changed = {user: [0, 0, *sequence[-2:]] for user, sequence in enumerate(sequences) if audited.left_out[user]}
    others = [changed.get(user, sequence) for user, sequence in enumerate(sequences)]
    assert others != sequences
    interactions = make_interactions(list(toys.interactions.user_ids), [np.array(s) for s in others])
    other = replace(audited, interactions=interactions)
    settings = SMALL.model_copy(update={"inputs": "ids", "max_epochs": 1})
    limit = 1
    kept = evaluation_examples(toys.interactions, "valid", limit, 0).users
    assert not audited.left_out[kept].any(), "choose a seed whose validation user is a member"
    one = load_or_train_head(audited, None, settings, limit, 0, str(tmp_path / "one"))
    two = load_or_train_head(other, None, settings, limit, 0, str(tmp_path / "two"))
    assert same(one, two)


def test_ids_alone_are_trained_once_for_all_encoders(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    ids = SMALL.model_copy(update={"inputs": "ids"})
    one, _ = trained(toys, adapter, tmp_path, ids)
    two, lines = trained(toys, None, tmp_path, ids)
    (folder,) = heads_on_disk(tmp_path)
    assert lines[0] == f"toys: reusing the cached head in {folder}"
    assert len(list(folder.glob("fusion-*.json"))) == 2
    assert torch.equal(one.model.item_representations(), two.model.item_representations())


def test_the_fusion_is_chosen_again_after_a_change_of_the_text(toys: LocalDomain, tmp_path: Path) -> None:
    """Users are texts of their last items: with fewer of these, other weights may be best, for ids and for text."""
    fewer = replace(toys, text=toys.text.model_copy(update={"max_items": 1}))
    for inputs in ("ids", "text"):
        settings = SMALL.model_copy(update={"inputs": inputs})
        trained(toys, None, tmp_path / inputs, settings)
        _, lines = trained(fewer, None, tmp_path / inputs, settings)
        (folder,) = heads_on_disk(tmp_path / inputs)  # the model does not depend on users' texts
        assert lines[0] == f"toys: reusing the cached head in {folder}"
        assert any("fusion masked" in line for line in lines)
        assert len(list(folder.glob("fusion-*.json"))) == 2


def shapes_of(head: Adapter) -> dict[str, tuple[int, int]]:
    return {name: (len(module.lora_B), module.lora_A.shape[1]) for name, module in head.modules.items()}


class Killed(BaseException):
    """A stop that no handler catches."""


def test_a_killed_training_resumes_after_its_last_epoch(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    whole, _ = trained(toys, adapter, tmp_path / "whole")
    lines: list[str] = []

    def killed(line: str) -> None:
        lines.append(line)
        if "epoch 2" in line:
            raise Killed

    cache = tmp_path / "killed"
    with pytest.raises(Killed):
        load_or_train_head(toys, adapter, SMALL, None, 0, str(cache), killed)
    assert [path.suffix for path in heads_on_disk(cache)] == [".checkpoint", ".lock"]
    resumed, lines = trained(toys, adapter, cache)
    assert not any("epoch 1," in line or "epoch 2," in line for line in lines)
    assert any("epoch 3," in line for line in lines)
    assert same(whole, resumed)
    assert {key: value for key, value in resumed.report.items() if key != "seconds"} == {
        key: value for key, value in whole.report.items() if key != "seconds"
    }
    assert not list((cache / "heads").glob("*.checkpoint"))


def damage_model(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_report(folder: Path) -> None:
    path = folder / "head.json"
    path.write_text(path.read_text().replace('"epochs"', '"epoch"'))


def damage_fusion(folder: Path) -> None:
    (path,) = folder.glob("fusion-*.json")
    record = json.loads(path.read_text())
    record["masked"]["ndcg"] = 1.0
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [damage_model, damage_report, damage_fusion])
def test_a_damaged_head_is_made_again(
    toys: LocalDomain, adapter: Adapter, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    first, _ = trained(toys, adapter, tmp_path)
    (folder,) = heads_on_disk(tmp_path)
    damage(folder)
    again, lines = trained(toys, adapter, tmp_path)
    assert same(first, again)
    assert any("fusion masked" in line for line in lines)


# Rows


def test_the_fusion_is_the_best_of_the_grid_on_validation_held_back(
    toys: LocalDomain, adapter: Adapter, tmp_path: Path
) -> None:
    head, _ = trained(toys, adapter, tmp_path)
    examples = evaluation_examples(toys.interactions, "valid", None, 0)
    ndcg = METRICS.index("ndcg@10")

    def reached(variant: Variant, weights: tuple[float, ...]) -> float:
        other = replace(head, fusion={**head.fusion, variant: FusionChoice(weights, 0.0)})
        ranks = head_ranks(toys, "merge", adapter, other, examples)["head on the merge, fused"][variant]
        return float(per_user_metrics(ranks)[:, ndcg].mean())

    for variant, choice in head.fusion.items():
        users = toys.interactions.num_users
        towards = (0, 0.5, 0.5)
        held_back = zip(choice.weights, towards, strict=True)
        tenths = [10 * ((users + 200) * weight - 200 * start) / users for weight, start in held_back]
        assert tenths == pytest.approx([round(tenth) for tenth in tenths])
        best = tuple(round(tenth) / 10 for tenth in tenths)
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            assert reached(variant, weights) <= reached(variant, best) + 1e-9
        assert reached(variant, choice.weights) == pytest.approx(choice.ndcg)


def recency_weighted(items: torch.Tensor, histories: Sequence[IntArray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of whitened vectors, an item of age a weighing exp(-a / 2), and the whitened vectors."""
    white = whitened(items, whitening(items))
    weights = [torch.exp(-torch.arange(len(history)).flip(0) / 2) for history in histories]
    means = [w @ white[history.astype(np.int64)] for w, history in zip(weights, histories, strict=True)]
    return torch.stack(means), white


def test_a_weight_of_one_gives_the_ranks_of_its_source(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    head, _ = trained(toys, adapter, tmp_path)
    examples = evaluation_examples(toys.interactions, "test", None, 0)
    ranks = {}
    for name, weights in {"head": (1.0, 0.0, 0.0), "text": (0.0, 1.0, 0.0), "recent items": (0.0, 0.0, 1.0)}.items():
        choice = FusionChoice(weights, 0.0)
        other = replace(head, fusion={"masked": choice, "unmasked": choice})
        ranks[name] = head_ranks(toys, "expert", adapter, other, examples)
    text = model_ranks(toys, {"expert": adapter}, examples)["expert"]
    for variant in ("masked", "unmasked"):
        alone = ranks["text"]["head on the expert"][variant]
        assert np.array_equal(ranks["head"]["head on the expert, fused"][variant], alone)
        assert np.array_equal(ranks["text"]["head on the expert, fused"][variant], text[variant])
    items = encode_text(toys, adapter, examples.histories).items
    recent = recency_weighted(items, examples.histories)
    for variant in VARIANTS:
        seen = examples.histories if variant == "masked" else None
        expected = rank_targets(*recent, examples.targets, seen)
        assert np.array_equal(ranks["recent items"]["head on the expert, fused"][variant], expected)


def test_the_scores_of_the_head_are_state_times_representation(
    toys: LocalDomain, adapter: Adapter, tmp_path: Path
) -> None:
    head, _ = trained(toys, adapter, tmp_path)
    examples = evaluation_examples(toys.interactions, "test", None, 0)
    text = encode_text(toys, adapter, examples.histories)
    source = head_sources(head.model, text, examples.histories)[0]
    with torch.no_grad():
        for user, history in enumerate(examples.histories):
            states = head.model(torch.from_numpy(history.astype(np.int64))[None])
            expected = head.model.item_representations() @ states[0, -1]
            found = source.item_vectors @ source.user_vectors[user]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_federated_head_is_one_more_source_of_the_fusion(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    """The client continues it: what it adds is chosen on validation, and a weight of 1 gives its ranks."""
    width = toys.backbone.width
    anchor = random_adapter(shapes_of(text_head(width, 2, 50, 0)), 2, 0.3, 1)
    alone, _ = trained(toys, adapter, tmp_path)
    head = load_or_train_head(toys, adapter, SMALL, None, 0, str(tmp_path), anchor=anchor)
    (folder,) = heads_on_disk(tmp_path)
    assert len(list(folder.glob("fusion-*.json"))) == 2  # the model is trained once
    validation = evaluation_examples(toys.interactions, "valid", None, 0)
    text = encode_text(toys, adapter, validation.histories)
    without, anchored = (head_sources(head.model, text, validation.histories, shared) for shared in (None, anchor))
    for variant, choice in alone.fusion.items():
        assert len(head.fusion[variant].weights) == len(choice.weights) + 1
        seen = seen_items(validation, variant)
        best, more = (  # of so many users that nothing is held back
            choose_weights(sources, validation.targets, seen, [1, *[0] * (len(sources) - 1)], 10**9).ndcg
            for sources in (without, anchored)
        )
        assert more >= best
    assert {*head_report(head, exact=True)["weights"]["masked"]} == {"head", "text", "recent items", "federated head"}
    examples = evaluation_examples(toys.interactions, "test", None, 0)
    only = FusionChoice((0.0, 0.0, 0.0, 1.0), 0.0)
    ranks = head_ranks(toys, "merge", adapter, replace(head, fusion={"masked": only, "unmasked": only}), examples)
    text = encode_text(toys, adapter, examples.histories)
    source = anchored_source(anchor, text.items, examples.histories)
    expected = rank_targets(source.user_vectors, source.item_vectors, examples.targets, examples.histories)
    assert np.array_equal(ranks["head on the merge, fused"]["masked"], expected)
    again = load_or_train_head(toys, adapter, SMALL, None, 0, str(tmp_path), anchor=anchor)
    assert again.fusion == head.fusion


# Reports


def test_the_report_holds_back_what_depends_on_few_users(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    head, _ = trained(toys, adapter, tmp_path)
    report = head_report(head, exact=True)
    assert report["trained"]
    assert not report["cached"]
    assert report["epochs"] <= 3
    assert {*report["weights"]["masked"]} == {"head", "text", "recent items"}
    assert sum(report["weights"]["unmasked"].values()) == pytest.approx(1)
    assert head_report(head, exact=False).keys() == {"trained", "reason", "cached", "seconds"}


def test_a_domain_with_too_few_users_has_no_head(toys: LocalDomain, tmp_path: Path) -> None:
    assert why_no_head(toys) == ""
    short = make_interactions(["a", "b", "c"], [np.array([0, 1]), np.array([2]), np.array([1])])
    none_to_train = replace(toys, interactions=short)
    assert why_no_head(none_to_train).startswith("fewer than two users")
    pairs = make_interactions(["a", "b", "c"], [np.array([0, 1]), np.array([2, 3]), np.array([1, 0])])
    none_to_validate = replace(toys, interactions=pairs)
    assert why_no_head(none_to_validate).startswith("no user has 3 items")
    with pytest.raises(DomainError, match="domain toys: it has no head of its own, since no user has 3 items"):
        load_or_train_head(none_to_validate, None, SMALL, None, 0, str(tmp_path))
    assert not (tmp_path / "heads").exists()
