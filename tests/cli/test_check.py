"""Problems with local files: `fedmerge check`, `run` and `bench` report all of them before anything starts."""

from pathlib import Path

import pytest
from backbones import tiny_bert
from messages_in_order import Parts, check_parts

from fedmerge.cli import main
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain

BY_USER = {"dp.mode": "user", "dp.epsilon": "8", "train.negatives": "catalog"}
NOISED_METRICS = {"privacy.metrics": "noised", "privacy.metrics_noise": "5"}
LOCAL: dict[str, tuple[dict[str, str], Parts]] = {
    "a missing data root": ({"domains.root": "gone"}, ["domains.root: ", "gone"]),
    "a missing domain": ({"domains.train": "beauty,shoes"}, ["has no domain shoes", "beauty, books"]),
    "an unknown layer": ({"lora.target_modules": "query,magic"}, ["lora.target_modules: bert ", "magic"]),
    "an encoder that shall predict tokens": (
        {"train.objective": "csft"},
        ["backbone bert: train.objective = 'csft' predicts tokens", "type bert", "'infonce'"],
    ),
    "a missing backbone": ({"backbone.source": "./gone"}, ["backbone.source = ", "gone"]),
    "an attack on real data": (
        {"simulation.attacker": "books"},
        ["domain books: simulation.attacker", "not synthetic"],
    ),
    "a delta for fewer users": (
        {**BY_USER, "dp.delta": "0.1", "domains.train": "beauty", "server.min_train_clients": "1"},
        ["domain beauty: dp.delta = 0.1", " 12 users", "0.083"],
    ),
    "a trimmed mean of too few clients": ({"rounds.rule": "trimmed-mean"}, ["trim = 0.2 and 2 clients"]),
    "an unknown parameter of a rule": ({"rounds.rule": "median", "rounds.parameters": "x=1"}, ["median", "x"]),
    "a private catalog": ({"merge.methods": "mergerec"}, ["domain books: ", "public_catalog = false"]),
    "a private catalog with noise by user": ({**BY_USER, "dp.delta": "1e-6"}, ["domain books: dp.mode", "public"]),
    "a catalog that users decided, with noise by user": (
        {**BY_USER, "dp.delta": "1e-6", "domains.train": "beauty,toys"},
        ["domain toys: dp.mode = 'user'", "catalog_source = 'interactions'", "--keep-all-items", "--catalog-source"],
    ),
    "a catalog that users decided, with noised metrics": (
        {**NOISED_METRICS, "domains.train": "beauty", "domains.unseen": "toys", "server.min_train_clients": "1"},
        ["domain toys: privacy.metrics = 'noised'", "catalog_source = 'interactions'"],
    ),
    "a missing folder of catalogs": ({"server.catalogs": "gone"}, ["server.catalogs = ", "gone"]),
    "a missing own method": ({"merge.methods": "average,gone:merge"}, ["merge.methods", "gone"]),
    "an own method that is not a function": ({"merge.methods": "math:pi"}, ["merge.methods", "math:pi"]),
}
SINGLE = {"merge.methods": "average"}


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny backbone, the synthetic domain beauty, and real data: books is private, toys comes from a k-core."""
    root = tmp_path_factory.mktemp("local")
    tiny_bert(root / "bert")
    for name in ("beauty", "books", "toys"):
        made = generate_domain(name, num_users=12, num_items=20)
        folder = root / "domains" / name
        write_domain(
            folder,
            made.catalog,
            made.interactions,
            public_catalog=name != "books",
            synthetic=name == "beauty",
            source="test",
            catalog_source="interactions" if name == "toys" else "given",
        )
    return root


def of_two_domains(root: Path, **changes: str) -> list[str]:
    settings = {
        "domains.root": str(root / "domains"),
        "domains.train": "beauty,books",
        "domains.unseen": "",
        "backbone.source": str(root / "bert"),
        "output_dir": str(root / "runs"),
        **SINGLE,
        **changes,
    }
    (root / "experiment.toml").write_text("")
    return [str(root / "experiment.toml"), "--set", *(f"{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize("case", LOCAL)
@pytest.mark.parametrize("command", ["check", "run"])
def test_local_problems_are_reported_before_anything_starts(
    two_domains: Path, command: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, parts = LOCAL[case]
    assert main([command, *of_two_domains(two_domains, **changes)]) == 1
    printed = capsys.readouterr().err
    check_parts(printed, ["1 problem", *parts])
    assert "--resume" not in printed
    assert not (two_domains / "runs").exists()


def test_all_local_problems_are_reported_at_once(two_domains: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"domains.train": "beauty,books,shoes", "lora.target_modules": "magic", "simulation.attacker": "books"}
    assert main(["check", *of_two_domains(two_domains, **changes)]) == 1
    heading, *problems = capsys.readouterr().err.splitlines()
    assert "3 problems" in heading
    assert [any(part in line for line in problems) for part in ("magic", "shoes", "books: sim")] == [True] * 3
    assert len(problems) == 3


def test_a_good_experiment_is_valid_and_a_federation_needs_no_local_data(
    two_domains: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *of_two_domains(two_domains)]) == 0
    gone = of_two_domains(two_domains, **{"domains.root": "gone"})
    assert main(["check", *gone[:1], "--federation", *gone[1:]]) == 0
    assert "valid" in capsys.readouterr().out
    canaries = of_two_domains(two_domains, **{"simulation.canaries": "3"})
    assert main(["check", *canaries[:1], "--federation", *canaries[1:]]) == 1
    assert "[simulation]" in capsys.readouterr().err


BENCH = """
title = "t"
experiment = "experiment.toml"
baseline = "average"
leave_one_out = {leave_one_out}
[[strategy]]
name = "average"
[[strategy]]
name = "trimmed"
set = {{ "rounds.rule" = "trimmed-mean", "rounds.parameters" = "trim=0.34" }}
[[strategy]]
name = "again"
set = {{ "rounds.rule" = "trimmed-mean", "rounds.parameters" = "trim=0.34", "train.max_steps" = 2 }}
[[strategy]]
name = "private"
set = {{ "merge.methods" = "mergerec" }}
"""


def bench_of_two_domains(root: Path, leave_one_out: bool, **changes: str) -> list[str]:
    """Return the command line of a benchmark of four strategies."""
    experiment, *settings = of_two_domains(root, **changes)
    file = Path(experiment).with_name("bench.toml")
    file.write_text(BENCH.format(leave_one_out=str(leave_one_out).lower()))
    return ["bench", str(file), "--out", str(root / "bench"), *settings]


def test_a_benchmark_reports_the_problems_of_all_its_cells_once_before_any_work(
    two_domains: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"lora.target_modules": "magic", "simulation.attacker": "books"}
    assert main(bench_of_two_domains(two_domains, False, **changes)) == 1
    heading, *problems = capsys.readouterr().err.splitlines()
    assert "4 problems" in heading
    for parts in (
        ["strategy trimmed (and 1 more): ", "trim = 0.34 and 2 clients"],
        ["magic"],
        ["domain books: simulation.attacker", "not synthetic"],
        ["strategy private: domain books: ", "public_catalog = false"],
    ):
        (line,) = (line for line in problems if all(part in line for part in parts))
        assert ("strategy" in line) == ("strategy" in parts[0])
    assert len(problems) == 4
    assert not (two_domains / "bench").exists()


def test_a_benchmark_reports_what_its_folds_cannot_do(two_domains: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = {"domains.train": "beauty,books,coffee", "domains.root": "demo"}
    assert main(bench_of_two_domains(two_domains, True, **three)) == 1
    heading, *problems = capsys.readouterr().err.splitlines()
    assert "1 problem" in heading
    check_parts(
        problems[0], ["strategy trimmed, with leave_one_out = true (and 1 more): ", "trim = 0.34 and 2 clients"]
    )
    assert not (two_domains / "bench").exists()
