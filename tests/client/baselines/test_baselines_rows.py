"""Baselines as rows: from the configuration through client and command line, cached, blind to test items."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import tiny_bert
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmerge.cli import main
from fedmerge.client.audit.users import prepare_for_audit
from fedmerge.client.baselines.rankers import BASELINE_LABELS, Progress, Ranker, baseline_rankers, sasrec_settings
from fedmerge.client.baselines.sasrec import TENSOR_FILE, load_or_train_sasrec, sasrec_inputs
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import Baseline, ExperimentConfig, Simulation, Text, load_config, to_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.backbone import load_backbone
from fedmerge.errors import ClientError, ConfigError
from fedmerge.evaluation.sums import BACKBONE
from fedmerge.sequence.model import SequenceSettings
from sim.app.client.app import app as client_app
from sim.app.client.replies import log_to_stderr
from sim.app.messages import records

NUM_USERS, NUM_ITEMS = 30, 25
ALL = tuple(BASELINE_LABELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone and a domain three times: unchanged, with other test items, and with three items per user."""
    root = tmp_path_factory.mktemp("rows")
    tiny_bert(root / "bert")
    demo = generate_domain("coffee", num_users=NUM_USERS, num_items=NUM_ITEMS)
    sequences = [demo.interactions.sequence(user).tolist() for user in range(NUM_USERS)]
    others = [[*sequence[:-1], (sequence[-1] + 1) % NUM_ITEMS] for sequence in sequences]
    short = [sequence[:3] for sequence in sequences]
    for name, of_name in (("plain", sequences), ("other", others), ("short", short)):
        interactions = make_interactions([f"u{user}" for user in range(NUM_USERS)], of_name)
        write_domain(
            root / name / "coffee", demo.catalog, interactions, public_catalog=True, synthetic=True, source="test"
        )
    return root


@pytest.fixture(scope="module")
def domains(folder: Path) -> dict[str, LocalDomain]:
    backbone = load_backbone(str(folder / "bert"), "mean", resolve_compute("cpu", "float32"))
    text = Text(max_tokens=48)
    return {name: open_domain(folder / name / "coffee", backbone, text) for name in ("plain", "other", "short")}


def config_of(cache: Path, *more: str) -> ExperimentConfig:
    return load_config(None, [f"cache_dir={cache}", *more])


def rankers_of(
    domain: LocalDomain, config: ExperimentConfig, names: Sequence[Baseline], progress: Progress = lambda line: None
) -> dict[str, Ranker]:
    return baseline_rankers(domain, names, config.evaluation, config.seed, config.cache_dir, progress)


# Rows


def test_every_baseline_is_a_row_of_both_variants_after_the_models(
    domains: dict[str, LocalDomain], tmp_path: Path
) -> None:
    rankers = rankers_of(domains["plain"], config_of(tmp_path), ALL)
    assert list(rankers) == ["popularity", "last item", "item-knn", "sasrec"]
    sums = evaluate(domains["plain"], {BACKBONE: None}, "test", None, 0, rankers)
    for of_variant in sums.values():
        assert of_variant.methods == (BACKBONE, *rankers)
        assert of_variant.num_users == NUM_USERS
    unmasked, masked = (sums[variant].metrics_by_method() for variant in ("unmasked", "masked"))
    for label in rankers:  # removing items that are not the target can only help
        assert all(masked[label][metric] >= value for metric, value in unmasked[label].items())
    assert len({tuple(masked[label].values()) for label in rankers}) == len(rankers)


def test_nothing_is_learned_or_selected_from_test_items(domains: dict[str, LocalDomain], tmp_path: Path) -> None:
    assert domains["plain"].manifest.interactions_sha256 != domains["other"].manifest.interactions_sha256
    examples = evaluation_examples(domains["plain"].interactions, "test", None, 0)
    ranks = []
    for name in ("plain", "other"):
        rankers = rankers_of(domains[name], config_of(tmp_path / name), ALL)
        ranks.append({label: ranks_of(examples, None).tolist() for label, ranks_of in rankers.items()})
    assert ranks[0] == ranks[1]


def test_without_a_training_sequence_sasrec_has_no_row(domains: dict[str, LocalDomain], tmp_path: Path) -> None:
    lines: list[str] = []
    rankers = rankers_of(domains["short"], config_of(tmp_path), ("item-knn", "sasrec"), lines.append)
    assert list(rankers) == ["item-knn"]
    assert any(line.startswith("coffee: no row for sasrec") for line in lines)
    assert not (tmp_path / "sasrec").exists()


# The cache


@pytest.mark.long
def test_sasrec_is_trained_once_for_the_same_inputs(domains: dict[str, LocalDomain], tmp_path: Path) -> None:
    domain = domains["plain"]
    examples = evaluation_examples(domain.interactions, "test", None, 0)

    def ranks(*more: str) -> tuple[list[int], str]:
        lines: list[str] = []
        ranks_of = rankers_of(domain, config_of(tmp_path, *more), ("sasrec",), lines.append)["sasrec"]
        return ranks_of(examples, examples.histories).tolist(), "\n".join(lines)

    before = torch.get_rng_state()
    first, told = ranks()
    assert "coffee: sasrec epoch 2" in told
    assert torch.equal(before, torch.get_rng_state())
    again, told = ranks()
    assert again == first
    assert "reusing the cached sasrec" in told
    assert "epoch" not in told
    (cached,) = (tmp_path / "sasrec").iterdir()
    report = json.loads((cached / "training.json").read_text())
    assert report["epochs"] == report["best_epoch"] + 5
    assert report["stopped_by"] == "patience"

    (cached / TENSOR_FILE).write_bytes(b"damaged")
    again, told = ranks()
    assert again == first
    assert "coffee: sasrec epoch 2" in told

    for changed in ("seed=1", "evaluation.sasrec_max_minutes=9"):
        assert "epoch 1" in ranks(changed)[1]
    assert len(list((tmp_path / "sasrec").iterdir())) == 3


def test_cached_models_keep_their_names() -> None:
    settings = sasrec_settings(load_config(None).evaluation)
    assert inputs_key(sasrec_inputs(settings)) == "4c26625c497fd355"
    assert inputs_key(sasrec_inputs(replace(settings, hidden_size=64))) == "0115b4cffd80f9f0"  # of earlier results


def test_a_cache_that_cannot_be_written_is_named(domains: dict[str, LocalDomain], tmp_path: Path) -> None:
    (tmp_path / "sasrec").write_text("a file where the folder should be")
    with pytest.raises(ClientError, match=rf"coffee.*{tmp_path}/sasrec.*cache_dir"):
        rankers_of(domains["plain"], config_of(tmp_path), ("sasrec",))


# Configuration


def test_baselines_of_the_configuration() -> None:
    assert load_config(None).evaluation.baselines == ("popularity", "last-item")
    assert load_config(None, ["evaluation.baselines=sasrec,item-knn"]).evaluation.baselines == ("sasrec", "item-knn")
    assert load_config(None, ["evaluation.baselines="]).evaluation.baselines == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.baselines=itemknn", r"evaluation\.baselines.*'item-knn' or 'sasrec' \(found 'itemknn'\)"),
        ("evaluation.baselines=sasrec,item-knn,sasrec", r"baselines names sasrec"),
        ("evaluation.sasrec_max_minutes=0", r"evaluation\.sasrec_max_minutes: .*\(found 0\)"),
        ("sasrec.dropout=0.1", r"sasrec\.dropout: removed; "),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [setting])


def test_an_audit_has_a_sasrec_of_its_own(toys: LocalDomain, tmp_path: Path) -> None:
    """The one of all users would have been trained on the non-members."""
    settings = SequenceSettings(hidden_size=4, max_epochs=1)
    for simulation in (Simulation(), Simulation(held_out_users=0.5), Simulation(canaries=3)):
        load_or_train_sasrec(prepare_for_audit(toys, simulation, 0), settings, 0, tmp_path, lambda line: None)
    assert len(list((tmp_path / "sasrec").iterdir())) == 3


# The client


@pytest.fixture
def client_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set what Flower sets before it calls a client, and restore the log afterwards."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    library = logging.getLogger("fedmerge")
    handlers, propagate, level = list(library.handlers), library.propagate, library.level
    yield
    library.handlers[:], library.propagate = handlers, propagate
    library.setLevel(level)
    log_to_stderr.cache_clear()


@pytest.mark.usefixtures("client_process")
def test_the_client_answers_a_test_request_with_the_configured_rows(folder: Path, tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "domains.train=coffee,books",
        "domains.unseen=",
        f"backbone.source={folder / 'bert'}",
        "runtime.device=cpu",
        "runtime.precision=float32",
        "text.max_tokens=48",
        "evaluation.baselines=sasrec,popularity,item-knn",
    )
    context = Context(1, 1, {"domain-path": str(folder / "plain" / "coffee")}, RecordDict(), dict(to_flat(config)))

    def answer(split: str, baselines: bool) -> RecordDict:
        request = records.EvaluationRequest("test" if split == "test" else "valid", True, "", baselines)
        content = records.evaluation_request_record(request, records.model_records({}))
        message = Message(content, dst_node_id=1, message_type=records.EVALUATE)
        return client_app(message, context).content

    content = answer("test", True)
    assert records.read_error(content) is None
    for of_variant in records.read_metric_sums(content).values():
        assert of_variant.methods == (BACKBONE, "sasrec", "popularity", "item-knn")
    # Only sums leave: the same entries as for one method, and no file of the training.
    assert [row["name"] for row in records.contents(content)] == [
        row["name"] for row in records.contents(answer("valid", False))
    ]
    assert records.read_metric_sums(answer("valid", False))["masked"].methods == (BACKBONE,)


# The command line


def test_the_command_line_prints_the_rows(
    folder: Path, domains: dict[str, LocalDomain], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"cache_dir={tmp_path}", f"backbone.source={folder / 'bert'}", "runtime.server_threads=1"]
    settings += ["runtime.device=cpu", "runtime.precision=float32", "text.max_tokens=48"]
    command = ["evaluate", "none", "--domain", str(folder / "plain" / "coffee"), "--split", "test"]
    command += ["--baselines", "item-knn,sasrec", "--set", *settings]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert "coffee: item-knn with" in printed.err
    assert "coffee: sasrec epoch 2" in printed.err
    found = json.loads(printed.out)
    rankers = rankers_of(domains["plain"], config_of(tmp_path), ("item-knn", "sasrec"))
    wanted = evaluate(domains["plain"], {BACKBONE: None}, "test", None, 0, rankers)
    for variant, sums in wanted.items():
        methods = found[variant]["methods"]
        assert list(methods) == [BACKBONE, "item-knn", "sasrec"]
        for method, metrics in sums.metrics_by_method().items():
            np.testing.assert_allclose(list(methods[method].values()), list(metrics.values()), atol=1e-12)

    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("sasrec ") for line in lines) == 4  # two metrics, two variants
    assert not any(line.startswith("popularity") for line in lines)

    assert main([*command[:6], "--baselines", "bert4rec"]) == 1
    assert "evaluation.baselines" in capsys.readouterr().err
