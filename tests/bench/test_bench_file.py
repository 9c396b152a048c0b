"""Benchmark files and folders: valid ones, and errors before anything runs."""

import itertools
import shutil
from pathlib import Path

import pytest
from in_process import grid_in, here, tables_of, train
from small_bench import FILE, REPOSITORY

from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid, open_folder
from fedmerge.bench.stages import run_grid
from fedmerge.config import DEMO_ROOT
from fedmerge.domain.demo import BUNDLED_DOMAINS
from fedmerge.errors import ConfigError, RunDirError
from fedmerge.federated.rules import RULES, check_rounds
from fedmerge.files import read_json
from fedmerge.merging.methods import METHODS
from fedmerge.report.bench_tables import BenchTables
from sim.local.bench import run_bench

pytestmark = pytest.mark.federation


def test_command_line_settings_change_the_experiment(bench_place: Path) -> None:
    bench = load_bench(bench_place / "bench.toml", ["cache_dir=/elsewhere", "train.max_steps=3"])
    experiment = bench.experiment("main", "mergerec", 1)
    assert (experiment.cache_dir, experiment.train.max_steps, experiment.seed) == ("/elsewhere", 3, 1)
    with pytest.raises(ConfigError, match=r"train.max_step.*train.max_steps"):
        load_bench(bench_place / "bench.toml", ["train.max_step=3"])


def test_other_baselines_change_the_tables_of_a_finished_benchmark_and_repeat_nothing(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    shutil.copytree(finished_bench[0].folder, bench_place / "compared")
    cells = {path: path.stat().st_mtime_ns for path in (bench_place / "compared").rglob("*.npz")}
    (bench_place / "compared.toml").write_text(
        FILE.replace('baseline = "average"', 'baseline = ["expert", "last-item"]').replace("A small", "Another")
    )
    grid = grid_in(bench_place, "compared", "compared.toml")
    assert run_grid(grid, train, here, lambda line: None) == []
    assert cells == {path: path.stat().st_mtime_ns for path in (bench_place / "compared").rglob("*.npz")}
    tables = tables_of(grid)
    assert {row["baseline"] for row in tables.comparisons} == {"expert", "last-item"}
    assert tables.results == finished_bench[1].results
    assert read_json(bench_place / "compared" / "benchmark.json")["benchmark"]["title"] == "Another benchmark"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "bench").rglob("*.toml")), ids=lambda file: file.stem)
def test_every_benchmark_of_the_repository_is_valid(file: Path) -> None:
    bench = load_bench(file)
    for dataset, strategy in itertools.product(bench.config.dataset, bench.config.strategy):
        config = bench.experiment(dataset.name, strategy.name, 0)
        check_rounds(config.rounds, len(config.domains.train))
        if config.rounds.rule in ("krum", "multi-krum"):
            assert len(config.domains.train) >= 5
        if config.domains.root == DEMO_ROOT:
            assert {*config.domains.train, *config.domains.unseen} <= {*BUNDLED_DOMAINS}
    text = file.read_text()
    name = file.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()  # bench/amazon3/heads
    assert f"fedmerge bench configs/{name}.toml --out {name}" in text


def test_the_aggregation_benchmark_has_every_merge_and_rule() -> None:
    bench = load_bench(REPOSITORY / "configs" / "bench" / "aggregation.toml")
    configs = [bench.experiment("demo", strategy.name, 0) for strategy in bench.config.strategy]
    merges = [name for config in configs if config.rounds.rule is None for name in config.merge.methods]
    of_any_number = [name for name, method in METHODS.items() if not method.learned and method.most_domains is None]
    others = {
        "linear-by-layer",
        "livar-style",
    }  # weights by domain, given or from signals: not a rule for updates alone
    assert merges == [name for name in of_any_number if name not in others]
    assert [config.rounds.rule for config in configs if config.rounds.rule] == [*RULES]


@pytest.mark.parametrize(
    ("rule", "parameters", "message"),
    [
        ("trimmed-mean", "tirm=0.34", "tirm"),
        ("trimmed-mean", "trim=0.34", "leave_one_out = true.* 2 clients"),
    ],
)
def test_wrong_rule_parameters_are_refused_before_training(
    bench_place: Path, rule: str, parameters: str, message: str
) -> None:
    changes = f'"rounds.rule" = "{rule}", "rounds.number" = 2, "rounds.parameters" = "{parameters}"'
    (bench_place / "rule.toml").write_text(FILE + f'\n[[strategy]]\nname = "rule"\nset = {{ {changes} }}\n')
    with pytest.raises(ConfigError, match=message):
        run_bench(bench_place / "rule.toml", bench_place / "rule", REPOSITORY)
    assert not (bench_place / "rule").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"through_clients.users": "own-users"},
            "through_clients.users.*own-users",
        ),
        ({"through_clients.mode": "local-steps"}, "through_clients.mode.*local-steps.*exact"),
        (
            {"dp.mode": "domain-local", "dp.epsilon": 4, "dp.delta": 1e-3},
            "dp.mode.*domain-local",
        ),
        ({"head.kind": "federated", "rounds.fraction": 0.5}, "rounds.fraction = 0.5 needs a federation.*set 1"),
    ],
)
def test_settings_that_need_a_federation_are_refused(
    bench_place: Path, changes: dict[str, object], message: str
) -> None:
    head = FILE[: FILE.index("[[strategy]]")]
    (bench_place / "own.toml").write_text(f'{head}[[strategy]]\nname = "average"\n')
    wanted = {"privacy.policy": "catalog-private", "merge.methods": "mergerec", "privacy.min_users": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        load_bench(bench_place / "own.toml", [f"{key}={value}" for key, value in wanted.items()])


def test_a_fold_with_too_few_clients_for_a_secure_sum_is_refused(bench_place: Path) -> None:
    head = FILE[: FILE.index("[[strategy]]")]
    (bench_place / "fold.toml").write_text(
        f'{head}[[strategy]]\nname = "average"\nset = {{ "merge.methods" = "average" }}\n'
    )
    hidden = ["privacy.policy=aggregate-only", "merge.methods=average"]
    with pytest.raises(ConfigError, match=r"(?s)main.*leave_one_out.* 2 clients"):
        load_bench(bench_place / "fold.toml", hidden)
    load_bench(bench_place / "fold.toml", [*hidden, "domains.train=beauty,books,coffee,garden"])


def test_a_folder_belongs_to_one_benchmark(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    (bench_place / "other.toml").write_text(FILE.replace("[0, 1]", "[0, 2]"))
    with pytest.raises(ConfigError, match=r"done.*benchmark\.seeds"):
        open_folder(bench_place / "done", load_bench(bench_place / "other.toml"))
    (bench_place / "full").mkdir()
    (bench_place / "full" / "thesis.doc").touch()
    with pytest.raises(ConfigError, match=r"full.*--out"):
        open_folder(bench_place / "full", load_bench(bench_place / "bench.toml"))
    with pytest.raises(RunDirError, match=r"bench\.toml.x"):
        open_folder(bench_place / "bench.toml" / "x", load_bench(bench_place / "bench.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A small benchmark"', "", "title"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds: 1 "),
        ("seeds = [0, 1]", "seeds = []", "seeds: .* 1 "),
        ("seeds = [0, 1]", "seed = [0]", "seed: "),
        ('name = "average"', 'name = "mergerec"', "strategy: mergerec "),
        ('name = "average"', 'name = "expert"', "strategy: expert "),
        ('name = "average"', 'name = "a/b"', r"strategy\.0\.name: "),
        (
            'baseline = "average"',
            'baseline = "avrage"',
            "baseline: .*'avrage'.*backbone, expert, av",
        ),
        (
            '"merge.methods" = "average"',
            '"merge.method" = "average"',
            r"strategy average: 1 problem\n.*merge\.method.*merge\.methods",
        ),
        (
            '"merge.methods" = "average"',
            "seed = 3",
            "strategy average: set: .*seed",
        ),
        (
            '"merge.methods" = "average"',
            '"evaluation.test_users" = 5',
            r"strategy average: .*\[evaluation\]",
        ),
        ('name = "average"', 'name = "popularity"', "baseline: .*'average'|strategy: popularity "),
        ("leave_one_out", 'joint = ["both"]\nleave_one_out', "joint.0: .*'shuffled'.*'balanced'"),
        ("leave_one_out", 'joint = ["balanced", "balanced"]\nleave_one_out', "joint: balanced "),
        ("experiment.toml", "absent.toml", "absent.toml"),
        ("title =", "title", "wrong.toml.*TOML"),
    ],
)
def test_an_invalid_file_is_refused(bench_place: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    (bench_place / "wrong.toml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_bench(bench_place / "wrong.toml")


def test_two_domains_are_too_few_to_leave_one_out(bench_place: Path) -> None:
    (bench_place / "wrong.toml").write_text(
        FILE + '\n[[dataset]]\nname = "pair"\nset = { "domains.train" = "beauty,books" }\n'
    )
    with pytest.raises(ConfigError, match=r"dataset pair: leave_one_out.*domains\.train.* 2"):
        load_bench(bench_place / "wrong.toml")


def test_one_domain_is_too_few_to_pool(bench_place: Path) -> None:
    alone = '\n[[dataset]]\nname = "one"\nset = { "domains.train" = "books", "server.min_train_clients" = 1 }\n'
    (bench_place / "wrong.toml").write_text(FILE.replace("leave_one_out = true", 'joint = ["shuffled"]') + alone)
    with pytest.raises(ConfigError, match=r"dataset one: .*joint.*domains\.train"):
        load_bench(bench_place / "wrong.toml")
