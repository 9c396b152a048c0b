"""What a run serves a domain: the choice is honoured by `recommend` and `evaluate`, and scores equal a slow oracle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_folders import TRAIN, UNSEEN, Place, make_place, output, refusal
from runs_with_heads import DOMAIN, config_of, make_run_with_heads, serve, train_head

from fedmerge.adapter import adapter_sha256
from fedmerge.cli import main
from fedmerge.client.coefficients.personal import load_or_fit_personal_merge, personal_settings
from fedmerge.client.evaluate import encode_text
from fedmerge.client.heads.federated import federated_ranks, federated_sources, federated_weights
from fedmerge.client.heads.heads import LocalHead, head_ranks, head_sources
from fedmerge.config import ATTRIBUTES
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import Interactions
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError, ConfigError, RunDirError
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.evaluation.sums import metric_sums
from fedmerge.runs.checkpoints import write_heads
from fedmerge.runs.federated_head import read_federated_head, write_fusion
from fedmerge.sequence.ranking import sequence_source
from fedmerge.serving.decision import MODELS, decide
from fedmerge.serving.model import RunDomain, load_head, load_served, open_run, served_recommender
from fedmerge.serving.recommender import load_recommender, recommend

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    run = make_run_with_heads(place)
    for vectors in ("merge", "expert"):
        train_head(place, run, vectors)
    return run


@pytest.fixture
def toys(place: Place, run: Path) -> RunDomain:
    serve(run, "merged")
    return open_run(run, place.domains / DOMAIN, config_of(run))


def ranking(
    place: RunDomain, model: str | None, history: list[str], keep_seen: bool = False
) -> list[tuple[str, float]]:
    recommender = served_recommender(place, load_served(place, model))
    found = recommend(recommender, history, len(place.catalog), keep_seen)
    return [(item.item_id, item.score) for item in found]


# The choice


def test_the_choice_decides_and_a_model_replaces_it(run: Path) -> None:
    for model in MODELS:
        serve(run, model)
        found = decide(run, DOMAIN)
        assert (found.model, found.reason) == (model, "chosen on validation")
        assert decide(run, DOMAIN, "expert").model == "expert"
        for other in (UNSEEN, "a new shop"):
            assert decide(run, other).model == "merged"
            assert other in decide(run, other).reason


def test_a_choice_that_cannot_be_read_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'head on the moon'.*'head on the merge, fused'"):
        decide(run, DOMAIN, "head on the moon")
    serve(run, "oracle")
    with pytest.raises(RunDirError, match="toys is served 'oracle', expected one of 'merged'"):
        decide(run, DOMAIN)
    with pytest.raises(RunDirError, match="not chosen yet"):
        decide(tmp_path, DOMAIN)
    (tmp_path / "choice.json").write_text("{")
    with pytest.raises(RunDirError, match="damaged"):
        decide(tmp_path, DOMAIN)


def test_text_models_are_those_of_their_adapters(place: Place, run: Path, toys: RunDomain) -> None:
    history = list(toys.catalog.item_ids[2:4])
    folders: dict[str, str | Path] = {
        "merged": run / "merged" / "average",
        "expert": run / "adapters" / DOMAIN,
        "backbone": "none",
    }
    for model, folder in folders.items():
        serve(run, model)
        recommender = load_recommender(folder, place.domains / DOMAIN, toys.config)
        assert recommender.score_kind == "cosine"
        wanted = [(item.item_id, item.score) for item in recommend(recommender, history, len(toys.catalog))]
        assert ranking(toys, None, history) == wanted


# Heads


def oracle(toys: RunDomain, run: Path, history: list[int], weights: dict[str, float]) -> np.ndarray:
    """Every item's fused score, one source at a time, from its definition."""
    adapter = read_adapter(run / "merged" / "average")
    head = train_head(Place(run.parent.parent), run)
    text = encode_text(toys.local, adapter, [np.array(history)])
    total = np.zeros(len(toys.catalog))
    for source in head_sources(head.model, text, [np.array(history)]):
        scores = (source.user_vectors @ source.item_vectors.T)[0].double().numpy()
        total += weights[source.label] * (scores - scores.mean()) / scores.std()
    return total


@pytest.mark.parametrize("keep_seen", [False, True], ids=["masked", "unmasked"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "alone"])
def test_scores_of_a_head_are_those_of_the_definition(
    place: Place, run: Path, toys: RunDomain, fused: bool, keep_seen: bool
) -> None:
    history = [5, 0, 9]
    head = train_head(place, run)
    chosen = head.fusion["unmasked" if keep_seen else "masked"].weights if fused else (1.0, 0.0, 0.0)
    wanted = oracle(toys, run, history, dict(zip(("head", "text", "recent items"), chosen, strict=True)))
    ids = [toys.catalog.item_ids[index] for index in history]
    serve(run, "head on the merge, fused" if fused else "head on the merge")
    found = ranking(toys, None, ids, keep_seen)
    assert len(found) == len(toys.catalog) - (0 if keep_seen else len(history))
    places = {item: index for index, item in enumerate(toys.catalog.item_ids)}
    np.testing.assert_allclose([score for _, score in found], [wanted[places[item]] for item, _ in found], atol=1e-4)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_evaluation_has_the_rows_of_the_client(place: Place, run: Path, toys: RunDomain, capsys: Capsys) -> None:
    serve(run, "head on the merge, fused")
    arguments = ("evaluate", run, "--domain", place.domains / DOMAIN, "--split", "test", "--json")
    found = json.loads(output(capsys, *arguments))
    assert (found["model"], found["reason"]) == ("head on the merge, fused", "chosen on validation")
    rows = ["backbone", "merged", "expert", "head on the merge", "head on the merge, fused", "popularity", "last item"]
    domain, adapter = toys.local, read_adapter(run / "merged" / "average")
    examples = evaluation_examples(domain.interactions, "test", None, toys.config.seed)
    wanted = head_ranks(domain, "merge", adapter, train_head(place, run), examples)
    for variant in ("unmasked", "masked"):
        assert list(found[variant]["methods"]) == rows
        by_user = {label: per_user_metrics(ranks[variant]) for label, ranks in wanted.items()}
        for label, metrics in metric_sums(by_user, variant).metrics_by_method().items():
            assert found[variant]["methods"][label] == metrics
    alone = json.loads(output(capsys, *arguments, "--model", "head on the merge", "--baselines", "popularity"))
    assert alone["unmasked"]["methods"].keys() == {"head on the merge", "popularity"}
    assert alone["unmasked"]["methods"]["head on the merge"] == found["unmasked"]["methods"]["head on the merge"]
    assert "served: head on the merge, fused" in output(capsys, *arguments[:-1])


def test_evaluation_names_a_model_that_is_not_on_this_disk(
    place: Place, run: Path, toys: RunDomain, tmp_path: Path, capsys: Capsys
) -> None:
    command = ("evaluate", run, "--domain", place.domains / DOMAIN, "--cache-dir", tmp_path)
    output(capsys, *command)
    assert main([str(argument) for argument in command]) == 0
    captured = capsys.readouterr()
    assert "toys: no row for head on the merge: " in captured.err
    assert "head on" not in captured.out
    serve(run, "head on the merge")
    assert "--cache-dir" in refusal(capsys, *command).splitlines()[-1]


def test_a_federated_head_is_read_from_the_run_folder(place: Place, tmp_path: Path, capsys: Capsys) -> None:
    run = make_run_with_heads(place, "shared", "federated")
    here = open_run(run, place.domains / DOMAIN, config_of(run))
    for vectors, sources in {"merge": 4, "expert": 3, "backbone": 3}.items():  # these are toys alone
        train_head(place, run, vectors)
        own = load_served(here, f"head on the {vectors}, fused")
        items = served_recommender(here, own).item_vectors
        assert {len(each) for each in load_head(here, own, items).weights.values()} == {sources}
    command = ("evaluate", run, "--domain", place.domains / DOMAIN, "--split", "test", "--json")
    methods = json.loads(output(capsys, *command))["masked"]["methods"]
    head, adapter = read_federated_head(run), read_adapter(run / "merged" / "average")
    assert head is not None
    examples = evaluation_examples(here.local.interactions, "test", None, 0)
    weights = federated_weights(here.local, head, adapter, None, 0, here.config.cache_dir)
    of_toys = weights
    ranks = federated_ranks(head, encode_text(here.local, adapter, examples.histories), weights, examples)
    ranks |= head_ranks(here.local, "merge", adapter, train_head(place, run), examples)
    assert {"federated head", "federated head, fused", "head on the merge, fused"} <= ranks.keys()
    for label, of_label in ranks.items():
        wanted = metric_sums({label: per_user_metrics(of_label["masked"])}, "masked")
        assert methods[label] == wanted.metrics_by_method()[label]

    serve(run, "federated head", UNSEEN)
    unseen = open_run(run, place.domains / UNSEEN, config_of(run))
    history = [3, 8, 1]
    recommender = served_recommender(unseen, load_served(unseen))
    text = encode_text(unseen.local, adapter, [np.array(history)])
    source = federated_sources(head, text, [np.array(history)])[0]
    scores = (source.user_vectors @ source.item_vectors.T)[0].numpy()
    found = recommend(recommender, [unseen.catalog.item_ids[index] for index in history], 5)
    best = [index for index in np.argsort(-scores, kind="stable") if index not in history][:5]
    assert [item.item_id for item in found] == [unseen.catalog.item_ids[index] for index in best]
    weights = {"masked": (0.2, 0.3, 0.5), "unmasked": (0.6, 0.3, 0.1)}
    write_fusion(run, weights)
    fused = load_served(unseen, "federated head, fused")
    assert load_head(unseen, fused, text.items).weights == weights  # those of the run, not of its own users
    here_fused = load_served(here, "federated head, fused")
    here_text = encode_text(here.local, adapter, [np.array(history)])
    assert load_head(here, here_fused, here_text.items).weights == weights  # toys joined as an unseen domain
    write_heads(run, DOMAIN, {}, {})  # toys trained
    assert load_head(here, here_fused, here_text.items).weights == of_toys
    shutil.rmtree(run / "head")
    with pytest.raises(ClientError, match=r"camping is served 'federated head'.*head holds no federated head"):
        served_recommender(unseen, load_served(unseen))


# A catalog that changed since the training


def changed(toys: RunDomain, folder: Path, keep: list[int], added: int) -> RunDomain:
    """Return the run with the domain's catalog in another order, without some items and with new ones."""
    old = load_catalog(toys.folder)
    names = [old.item_ids[index] for index in keep]
    attributes = {key: [old.attributes[key][index] for index in keep] for key in ATTRIBUTES}
    for number in range(added):
        names.append(f"new-{number}")
        for key in ATTRIBUTES:
            attributes[key].append(f"a new red tent {number}" if key == "title" else "")
    catalog = Catalog(DOMAIN, tuple(names), {key: tuple(values) for key, values in attributes.items()}, "x")
    once = Interactions(("one",), np.array([0, 1, 2], dtype=np.int32), np.array([0, 3], dtype=np.int64))
    write_domain(folder, catalog, once, public_catalog=True, synthetic=True, source="a test")
    return open_run(toys.run, folder, toys.config)


def test_items_that_are_added_are_scored_by_text_and_change_no_other_score(
    place: Place, run: Path, toys: RunDomain, tmp_path: Path
) -> None:
    history = list(toys.catalog.item_ids[3:6])
    size = len(toys.catalog)
    later = changed(toys, tmp_path / DOMAIN, list(range(size)), added=2)
    before = dict(raw_head_scores(toys, history))
    after = dict(raw_head_scores(later, history))
    assert after.keys() - before.keys() == {"new-0", "new-1"}
    assert [after[item] for item in before] == pytest.approx(list(before.values()), abs=1e-5)
    found = ranking(later, "head on the merge, fused", ["new-1", *history])
    assert "new-0" in dict(found)
    assert np.isfinite([score for _, score in found]).all()


def test_items_that_moved_or_were_removed_keep_the_scores_of_the_others(
    place: Place, run: Path, toys: RunDomain, tmp_path: Path
) -> None:
    kept = [index for index in reversed(range(len(toys.catalog))) if index not in (0, 7)]
    later = changed(toys, tmp_path / DOMAIN, kept, added=0)
    history = [toys.catalog.item_ids[index] for index in (4, 9)]
    before, after = dict(raw_head_scores(toys, history)), dict(raw_head_scores(later, history))
    assert before.keys() - after.keys() == {toys.catalog.item_ids[0], toys.catalog.item_ids[7]}
    assert [after[item] for item in after] == pytest.approx([before[item] for item in after], abs=1e-5)


def raw_head_scores(place: RunDomain, history: list[str]) -> list[tuple[str, float]]:
    """Return the head's scores, not standardised: a new item changes the mean over the catalog."""
    served = load_served(place, "head on the merge")
    recommender = served_recommender(place, served)
    head = load_head(place, served, recommender.item_vectors).head
    assert isinstance(head, LocalHead)
    source = sequence_source(head.model, [np.array([recommender.item_index[item] for item in history])])
    scores = (source.user_vectors @ source.item_vectors.T)[0]
    return list(zip(place.catalog.item_ids, scores.tolist(), strict=True))


# What is not there


def test_a_head_that_is_not_on_this_disk_is_named_with_the_remedy(
    place: Place, run: Path, toys: RunDomain, tmp_path: Path, capsys: Capsys
) -> None:
    serve(run, "head on the merge, fused")
    history = ("--domain", place.domains / DOMAIN, "--history", toys.catalog.item_ids[0])
    elsewhere = refusal(capsys, "recommend", run, *history, "--cache-dir", tmp_path)
    for part in ("head on the merge, fused", str(tmp_path / "heads"), "--cache-dir", "--model merged"):
        assert part in elsewhere
    assert "no row" not in output(capsys, "recommend", run, *history)
    merged = json.loads(
        output(capsys, "recommend", run, *history, "--cache-dir", tmp_path, "--model", "merged", "--json")
    )
    assert (merged["model"], merged["score_kind"], merged["reason"]) == ("merged", "cosine", "as requested")


def test_a_damaged_head_is_named(place: Place, run: Path, toys: RunDomain, tmp_path: Path) -> None:
    shutil.copytree(place.root / "cache", tmp_path / "cache")
    elsewhere = open_run(
        run, place.domains / DOMAIN, toys.config.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    )
    served = load_served(elsewhere, "head on the merge")
    served_recommender(elsewhere, served)
    for path in (tmp_path / "cache" / "heads").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ClientError, match=r"damaged.*toys-.*--model merged"):
        served_recommender(elsewhere, served)


def test_an_expert_that_never_left_its_client_is_looked_for_there(
    place: Place, run: Path, toys: RunDomain, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapters")
    serve(tmp_path / "run", "expert")
    without = open_run(tmp_path / "run", place.domains / DOMAIN, toys.config)
    with pytest.raises(ClientError, match=r"'expert'.*experts.*--cache-dir"):
        load_served(without)


def test_a_personal_merge_is_found_in_the_client_s_cache(
    place: Place, run: Path, toys: RunDomain, tmp_path: Path, capsys: Capsys
) -> None:
    config = toys.config.model_copy(update={"cache_dir": str(tmp_path)})
    serve(run, "personal merge")
    here = open_run(run, place.domains / DOMAIN, config)
    with pytest.raises(ClientError, match=r"'personal merge'.*personal holds none of this run.*--cache-dir"):
        load_served(here)
    adapters = {name: read_adapter(run / "adapters" / name) for name in TRAIN}
    sources = {name: adapter_sha256(adapter) for name, adapter in adapters.items()}
    settings, choosing = personal_settings(config), np.arange(4)
    made = load_or_fit_personal_merge(here.local, adapters, sources, settings, choosing, config.cache_dir)
    found = load_served(here).adapter
    assert found is not None
    assert adapter_sha256(found) == adapter_sha256(made.adapter)
    said = output(
        capsys, "export", run, tmp_path / "out", "--domain", place.domains / DOMAIN, "--cache-dir", config.cache_dir
    )
    assert "keep the folder within the organisation" in said
    assert "**Do not give this folder away.**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# The command


def test_recommend_says_what_is_served(place: Place, run: Path, toys: RunDomain, capsys: Capsys) -> None:
    serve(run, "head on the merge, fused")
    arguments = ("--domain", place.domains / DOMAIN, "--history", toys.catalog.item_ids[0])
    lines = output(capsys, "recommend", run, *arguments, "-k", "2").splitlines()
    assert "served: head on the merge, fused (chosen on validation)" in lines
    assert "recommended, with scores standardised over the catalog:" in lines
    found = json.loads(output(capsys, "recommend", run, *arguments, "--json"))
    assert (found["run"], found["model"]) == (str(run), "head on the merge, fused")
    assert found["score_kind"] == "standardised"
    assert "adapter" not in found
    by_id = json.loads(output(capsys, "recommend", run.name[:3], *arguments, "--json", "--dir", place.runs))
    assert by_id["recommendations"] == found["recommendations"]
    other = ("--domain", place.domains / UNSEEN, "--history", load_catalog(place.domains / UNSEEN).item_ids[0])
    unseen = json.loads(output(capsys, "recommend", run, *other, "--json"))
    assert (unseen["model"], unseen["reason"]) == ("merged", f"no choice was made for {UNSEEN} in this run")
    with_adapter = ("recommend", run / "adapters" / TRAIN[0], *arguments, "--model", "expert")
    assert "--model with an adapter, expected a run" in refusal(capsys, *with_adapter)
