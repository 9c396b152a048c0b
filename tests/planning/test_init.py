"""``fedmerge init``: an experiment for domain folders, with budgets by a measured pace."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from run_folders import Place, make_place, output, refusal

from fedmerge.config import load_config
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.planning.pace import Pace
from fedmerge.planning.plan import FEWEST_STEPS, MOST_STEPS, Facts, draft, estimate, make_plan, plan_toml, read_facts

Capsys = pytest.CaptureFixture[str]
PACE = Pace(item=0.01, history=0.02, step=2.0, head=0.001)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


def write_shop(root: Path, name: str, num_users: int, *, public: bool = True) -> None:
    made = generate_domain(name, num_users=num_users, num_items=20)
    write_domain(root / name, made.catalog, made.interactions, public_catalog=public, synthetic=True, source="test")


def toml_of(root: Path, facts: dict[str, Facts], minutes: float, unseen: Sequence[str] = ()) -> str:
    config, given = draft(root, facts, unseen, 2, {})
    return plan_toml(make_plan(config, given, facts, PACE, minutes), ["a heading"])


def test_the_command_writes_an_experiment_that_can_be_checked(place: Place, tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "mine.toml"
    settings = ("--set", f"backbone.source={place.root / 'backbone'}", "runtime.precision=float32", "head.max_epochs=2")
    said = output(capsys, "init", place.domains, "--out", out, "--minutes", "2", "--unseen", "toys", *settings)
    assert "toys: unseen" in said
    assert f"run it with: fedmerge run {out}" in said
    config = load_config(out)
    assert config.domains.unseen == ("toys",)
    assert config.head.max_epochs == 2
    assert FEWEST_STEPS <= (config.train.max_steps or 0) <= MOST_STEPS
    assert "valid" in output(capsys, "check", out)
    assert str(out) in refusal(capsys, "init", place.domains, "--out", out)  # nothing is written over


def test_the_file_says_what_the_plan_holds(place: Place, tmp_path: Path) -> None:
    facts = read_facts(place.domains)
    config, given = draft(place.domains, facts, ["toys"], 2, {"train.batch_size": 8})
    plan = make_plan(config, given, facts, PACE, 30)
    text = plan_toml(plan, ["one", "two"])
    assert text.startswith("# one\n# two\nname")
    assert "batch_size = 8  # given\n" in text
    (tmp_path / "experiment.toml").write_text(text)
    assert load_config(tmp_path / "experiment.toml") == plan.config


def test_more_time_gives_more_steps_within_their_bounds(place: Place) -> None:
    facts = read_facts(place.domains)
    config, given = draft(place.domains, facts, [], 2, {})
    plans = [make_plan(config, given, facts, PACE, minutes) for minutes in (0.1, 15, 30, 10_000)]
    steps = [plan.config.train.max_steps or 0 for plan in plans]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (FEWEST_STEPS, MOST_STEPS)
    assert [plan.within for plan in plans] == [False, True, True, True]
    for plan, minutes in zip(plans[1:3], (15, 30), strict=True):
        assert 0.8 * minutes < sum(plan.seconds.values()) / 60 <= minutes
    fixed = make_plan(config, {**given, "train.max_steps": "given"}, facts, PACE, 0.1)
    assert fixed.config.train.max_steps == config.train.max_steps


def test_the_estimate_is_the_sum_of_the_work(place: Place) -> None:
    facts = read_facts(place.domains)
    config, _ = draft(
        place.domains, facts, [], 1, {"head.kind": "none", "merge.methods": "average", "train.max_steps": 40}
    )
    settings = config.train
    encoded = {name: of.manifest.num_items * PACE.item + of.num_evaluated * PACE.history for name, of in facts.items()}
    checks = 1 + -(-40 // settings.validate_every_steps)
    found = estimate(config, facts, PACE)
    assert found["training"] == pytest.approx(sum(40 * PACE.step + checks * each for each in encoded.values()))
    assert found["validation and test"] == pytest.approx(sum((2 + 3) * each for each in encoded.values()))
    two = config.model_copy(update={"runtime": config.runtime.model_copy(update={"server_threads": 2})})
    slowest = max(40 * PACE.step + checks * each for each in encoded.values())
    assert estimate(two, facts, PACE)["training"] == pytest.approx(max(found["training"] / 2, slowest))
    assert not {"heads", "merging"} & found.keys()


def test_a_private_catalog_leaves_learned_merges_out(tmp_path: Path) -> None:
    for name, public in (("books", True), ("coffee", False)):
        write_shop(tmp_path, name, 20, public=public)
    text = toml_of(tmp_path, read_facts(tmp_path), 10)
    assert (
        'methods = "average,task-arithmetic,ties"  # mergerec needs public catalogs, which these do not give: coffee'
        in text
    )


def test_a_domain_that_cannot_train_is_unseen(tmp_path: Path, capsys: Capsys) -> None:
    for name in ("books", "coffee"):
        write_shop(tmp_path, name, 20)
    write_shop(tmp_path, "toys", 1)
    facts = read_facts(tmp_path)
    config, given = draft(tmp_path, facts, [], 2, {})
    assert config.domains.train == ("books", "coffee")
    assert config.domains.unseen == ("toys",)
    assert "toys" in given["domains.unseen"]
    shutil.rmtree(tmp_path / "coffee")
    refused = refusal(capsys, "init", tmp_path, "--out", tmp_path / "x.toml")
    assert "found 1 domains that can train (books), expected at least two" in refused
    assert not (tmp_path / "x.toml").exists()


def test_what_cannot_be_planned_is_refused_at_once(place: Place, tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "x.toml"
    assert "not found" in refusal(capsys, "init", tmp_path / "nowhere", "--out", out)
    assert "no domain folder" in refusal(capsys, "init", tmp_path, "--out", out)
    assert "has no domain moon" in refusal(capsys, "init", place.domains, "--out", out, "--unseen", "moon")
    assert "did you mean" in refusal(capsys, "init", place.domains, "--out", out, "--set", "train.max_step=3")
    assert not out.exists()
