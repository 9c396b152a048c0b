"""The experiment file: both forms, all problems at once, and equality with the declarations of pyproject.toml."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.config import (
    ExperimentConfig,
    declared,
    flatten,
    from_flat,
    load_config,
    to_flat,
    to_toml,
    with_absolute_paths,
)
from fedmerge.config.files import read_overrides
from fedmerge.config.removed import REMOVED
from fedmerge.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_FILES = sorted([*(REPOSITORY / "configs").glob("*.toml"), *(REPOSITORY / "configs" / "privacy").glob("*.toml")])

# Different from every default: tuples of one, several and no values, None in both directions.
CHANGED = {
    "name": "far-away_1.0",
    "seed": 2**31 - 1,
    "run_id": "Run.1",
    "output_dir": 'a "quoted" \\ folder/ünï',
    "domains.root": "data/x",
    "domains.train": "Only",
    "domains.unseen": "",
    "backbone.weights_sha256": "0" * 64,
    "lora.target_modules": "all-linear",
    "train.learning_rate": 1.5e-7,
    "train.max_steps": "none",
    "train.max_minutes": 0.1,
    "train.validation_users": "none",
    "merge.methods": "mergerec",
    "merge.task_arithmetic_coefficients": "0.30000000000000004,-1.0,1e-09",
    "merge.densities": "0.07,1.0",
    "merge.coefficients": "-0.5",
    "merge.output_rank": 12,
    "mergerec.granularities": "layer",
    "mergerec.kd_top_k": "none",
    "evaluation.fallback": False,
    "evaluation.test_users": 12,
    "server.catalogs": "catalogs",
    "server.min_train_clients": 1,
    "privacy.policy": "adapter",
    "runtime.device": "cuda:1",
    "runtime.gpus_per_client": 0.25,
}


BY_USER_ON_OWN_USERS = {
    "dp.mode": "user",
    "dp.epsilon": 1.0,
    "dp.delta": 1e-6,
    "train.negatives": "catalog",
    "privacy.policy": "catalog-private",
    "through_clients.users": "own-users",
}


def problems_of(flat: dict[str, Any]) -> list[str]:
    """Return the lines below the heading, one per problem."""
    with pytest.raises(ConfigError) as caught:
        from_flat(flat)
    heading, *problems = str(caught.value).splitlines()
    assert heading.startswith(f"run config: {len(problems)} problem")
    return [problem.strip() for problem in problems]


@pytest.mark.parametrize("flat", [{}, CHANGED], ids=["defaults", "changed"])
def test_flat_form_round_trip(flat: dict[str, Any]) -> None:
    config = from_flat(flat)
    scalars = to_flat(config)
    assert all(type(value) in (str, int, float, bool) for value in scalars.values())
    assert from_flat(scalars) == config
    assert all(scalars[key] == value for key, value in flat.items())


@pytest.mark.parametrize("flat", [{}, CHANGED], ids=["defaults", "changed"])
def test_toml_round_trip(flat: dict[str, Any], tmp_path: Path) -> None:
    config = from_flat(flat)
    path = tmp_path / "experiment.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert set(flatten(tomllib.loads(path.read_text(encoding="utf-8")))) == set(to_flat(config))


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1), st.floats(1e-300, 1.0))
def test_toml_holds_any_printable_folder_and_any_float(folder: str, rate: float) -> None:
    config = from_flat({"output_dir": folder, "train.learning_rate": rate})
    assert from_flat(flatten(tomllib.loads(to_toml(config)))) == config


def test_files_can_express_tuples_and_none() -> None:
    config = from_flat({"domains.train": " a, b ,,c ", "domains.unseen": "", "train.max_minutes": "none"})
    assert config.domains.train == ("a", "b", "c")
    assert config.domains.unseen == ()
    assert config.train.max_minutes is None
    assert from_flat({"merge.task_arithmetic_coefficients": "0.5, 1"}).merge.task_arithmetic_coefficients == (0.5, 1.0)
    one = load_config(None, ["merge.task_arithmetic_coefficients=0.5", "domains.train=a,b"])
    assert one.merge.task_arithmetic_coefficients == (0.5,)
    assert from_flat({"output_dir": "none"}).output_dir == "none"  # this setting cannot be absent
    flat = to_flat(config)
    assert (flat["domains.train"], flat["domains.unseen"], flat["train.max_minutes"]) == ("a,b,c", "", "none")


def test_none_for_a_required_value_is_refused() -> None:
    (problem,) = problems_of({"train.batch_size": "none"})
    assert problem.startswith("train.batch_size: ")
    assert "'none'" in problem


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("train.learning_rat", "train.learning_rate"), ("trian.max_steps", "train.max_steps"), ("sede", "seed")],
)
def test_an_unknown_key_gets_the_nearest_one_as_suggestion(key: str, suggestion: str) -> None:
    (problem,) = problems_of({key: 1})
    assert problem.startswith(f"{key}: ")
    assert f" {suggestion}?" in problem


def test_an_unknown_key_without_a_near_one_refers_to_the_list_of_keys() -> None:
    (problem,) = problems_of({"zzz.qqq": 1})
    assert problem.startswith("zzz.qqq: ")
    assert "docs/config.md" in problem


def test_all_problems_are_reported_at_once_with_dotted_names() -> None:
    problems = problems_of(
        {
            "seed": -1,
            "name": "Not Lower",
            "text.max_tokenz": 5,
            "train.learning_rate": 2.0,
            "rounds.proximal": float("nan"),
            "merge.methods": "average,magic",
            "runtime.device": "tpu",
        }
    )
    expected = {"seed", "name", "text.max_tokenz", "train.learning_rate", "rounds.proximal", "merge.methods.1"}
    assert {problem.partition(":")[0] for problem in problems} == expected | {"runtime.device"}
    assert any(problem.startswith("merge.methods.1: ") and "'magic'" in problem for problem in problems)
    assert any(problem.startswith("train.learning_rate: ") and "(found 2.0)" in problem for problem in problems)


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"domains.train": "a,b", "domains.unseen": "b"}, ["domains: ", "train", "unseen", " b "]),
        ({"runtime.gpus_per_client": 1.5}, ["runtime.gpus_per_client: expected 'auto', ", "found 1.5"]),
        ({"runtime.gpus_per_client": "many"}, ["runtime.gpus_per_client: expected 'auto', ", "found 'many'"]),
        ({"runtime.gpus_per_client": -1}, ["runtime.gpus_per_client: expected 'auto', ", "found -1"]),
        ({"runtime.gpus_per_client": float("nan")}, ["runtime.gpus_per_client: expected 'auto', ", "found nan"]),
        ({"domains.train": "a,a"}, ["domains: ", "train", " a "]),
        ({"domains.train": ""}, ["domains: ", "train"]),
        ({"train.max_steps": "none"}, ["train: ", "max_epochs, max_steps", "max_minutes", "'none'"]),
        (
            {"domains.train": "a,b", "server.min_train_clients": 3},
            ["server.min_train_clients = 3", "domains.train", " 2"],
        ),
        ({"privacy.policy": "adapter"}, ["merge.methods", "mergerec", "privacy.policy"]),
        (
            {"privacy.policy": "aggregate-only"},
            ["merge.methods", "mergerec", "privacy.policy = 'aggregate-only'"],
        ),
        (
            {"privacy.transport": "int8", "rounds.rule": "fedit"},
            ["privacy.transport = 'int8'", "'float32'"],
        ),
        ({"through_clients.users": "own-users"}, ["through_clients.users = 'own-users'"]),
        (
            {
                "dp.mode": "domain-central",
                "dp.epsilon": 1.0,
                "dp.delta": 1e-6,
                "merge.methods": "average",
                "admission.leave_one_out": "true",
            },
            ["dp.mode = 'domain-central'", "admission.leave_one_out"],
        ),
        (
            {
                "dp.mode": "domain-central",
                "dp.epsilon": 1.0,
                "dp.delta": 1e-6,
                "merge.methods": "average",
                "admission.action": "exclude",
            },
            ["dp.mode = 'domain-central'", "admission.action = 'exclude'"],
        ),
        (
            {**BY_USER_ON_OWN_USERS, "through_clients.mode": "local-steps"},
            ["dp.mode = 'user'", "through_clients.users = 'own-users'", "mode = 'local-steps'"],
        ),
        (
            {**BY_USER_ON_OWN_USERS, "admission.rollback": "true", "admission.leave_one_out": "true"},
            ["dp.mode = 'user'", "admission.rollback"],
        ),
        (
            {
                "dp.mode": "domain-local",
                "dp.epsilon": 1.0,
                "dp.delta": 1e-6,
                "privacy.policy": "catalog-private",
                "admission.rollback": "true",
                "admission.leave_one_out": "true",
            },
            ["dp.mode = 'domain-local'", "admission.rollback"],
        ),
        (
            {
                "dp.mode": "domain-local",
                "dp.epsilon": 1.0,
                "dp.delta": 1e-6,
                "privacy.policy": "catalog-private",
                "mergerec.pseudo_users": "centroid",
            },
            ["dp.mode = 'domain-local'", "mergerec.pseudo_users = 'centroid'"],
        ),
        (
            {"privacy.policy": "catalog-private", "server.catalogs": "x"},
            ["privacy.policy = 'catalog-private'", "server.catalogs = 'none'", "privacy.policy = 'adapter'"],
        ),
        (
            {"privacy.policy": "catalog-private", "rounds.rule": "mergerec"},
            ["privacy.policy = 'catalog-private'", "rounds.rule = 'mergerec'"],
        ),
        (
            {"privacy.policy": "catalog-private", "through_clients.users": "own-users", "merge.methods": "adamerging"},
            ["privacy.policy = 'catalog-private'", "adamerging"],
        ),
        (
            {
                "privacy.policy": "catalog-private",
                "through_clients.users": "own-users",
                "through_clients.batch_size": 5,
            },
            ["privacy.policy = 'catalog-private'", "through_clients.batch_size = 5"],
        ),
        ({"adamerging.granularities": "layer,layer"}, ["adamerging: ", "granularities", "layer"]),
    ],
)
def test_rules_across_fields(flat: dict[str, Any], expected: list[str]) -> None:
    (problem,) = problems_of(flat)
    assert problem.startswith(expected[0])
    assert all(part in problem for part in expected), problem


def test_every_contradiction_is_a_separate_line() -> None:
    flat = {
        "privacy.policy": "catalog-private",
        "through_clients.users": "own-users",
        "through_clients.batch_size": 5,
        "merge.methods": "adamerging",
        "server.min_train_clients": 9,
        "resume": True,
    }
    problems = problems_of(flat)
    for part in ("run_id", "min_train_clients = 9", "adamerging", "batch_size = 5"):
        assert sum(part in problem for problem in problems) == 1
    assert len(problems) == 4


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_is_refused_with_its_remedy(key: str, tmp_path: Path) -> None:
    assert problems_of({key: 1}) == [f"{key}: removed; {REMOVED[key]}"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"{key}=1"])
    assert REMOVED[key] in str(caught.value)
    assert key not in to_flat(ExperimentConfig())
    for name in re.findall(r"write ([a-z_]+\.[a-z_]+)", REMOVED[key]):
        assert name in to_flat(ExperimentConfig())


GIVEN = {"loss": "kd", "kd_top_k": 50, "learning_rate": 0.005, "steps": 100, "initial_coefficient": "none"}
PAPER = {"loss": "rec+kd", "kd_top_k": "none", "learning_rate": 0.001, "steps": 500, "initial_coefficient": 0.2}


@pytest.mark.parametrize("key", GIVEN)
def test_a_given_value_overrides_the_preset_even_if_it_is_the_default(key: str, tmp_path: Path) -> None:
    given = {"mergerec.preset": "paper", f"mergerec.{key}": GIVEN[key]}
    wanted = {**PAPER, key: GIVEN[key]}
    path = tmp_path / "experiment.toml"
    path.write_text(f'[mergerec]\npreset = "paper"\n{key} = {json.dumps(GIVEN[key])}\n')
    of_flower = {**declared(), "name": "mine", **given}  # Flower's run configuration holds every key
    for config in (
        from_flat(given),
        from_flat(of_flower),
        load_config(path),
        load_config(None, [f"{name}={value}" for name, value in given.items()]),
        from_flat(to_flat(from_flat(given))),
    ):
        flat = to_flat(config)
        assert {name: flat[f"mergerec.{name}"] for name in PAPER} == wanted


def test_the_preset_sets_the_other_values() -> None:
    for flat in ({}, declared() | {"name": "mine"}):
        config = to_flat(from_flat({**flat, "mergerec.preset": "paper"}))
        assert {name: config[f"mergerec.{name}"] for name in PAPER} == PAPER
        plain = to_flat(from_flat(flat))
        assert {name: plain[f"mergerec.{name}"] for name in GIVEN} == GIVEN


def test_the_remedies_of_cross_field_rules_work() -> None:
    assert from_flat({"privacy.policy": "adapter", "server.catalogs": "folder"}).server.catalogs == "folder"
    assert from_flat({"privacy.policy": "adapter", "merge.methods": "average"}).privacy.policy == "adapter"
    assert from_flat({"privacy.policy": "catalog-private"}).merge.methods[-1] == "mergerec"
    assert from_flat(BY_USER_ON_OWN_USERS).dp.mode == "user"
    own_users = {"privacy.policy": "catalog-private", "through_clients.users": "own-users"}
    assert from_flat(own_users).through_clients.batch_size == 32
    assert from_flat({"train.max_steps": "none", "train.max_epochs": 1}).train.max_steps is None
    assert from_flat({"domains.train": "a", "server.min_train_clients": 1}).server.min_train_clients == 1


def test_overrides_are_toml_values_with_or_without_quotes(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('seed = 4\n[train]\nmax_steps = 7\n[domains]\ntrain = "a,b"\n')
    overrides = [
        "train.max_steps=9",
        "train.max_epochs = none",
        "domains.root=some/folder=x",
        'name="quoted"',
        "evaluation.fallback=false",
        "train.learning_rate=1e-4",
        'domains.train=["c", "d"]',
        "train.max_steps=11",
    ]
    config = load_config(path, overrides)
    assert (config.seed, config.train.max_steps, config.train.max_epochs, config.name) == (4, 11, None, "quoted")
    assert (config.domains.root, config.domains.train) == ("some/folder=x", ("c", "d"))
    assert config.evaluation.fallback is False
    assert config.train.learning_rate == 1e-4
    assert load_config(None, ["seed=3"]) == from_flat({"seed": 3})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps", "'train.max_steps': .*key=value"),
        ("train.max_step=3", "train.max_steps"),
        ("train.max_steps=many", "train.max_steps: .*'many'"),
    ],
)
def test_bad_overrides_are_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "x.toml: "),
        (b"seed = ", "TOML"),
        (b"\xff\xfe", "TOML"),
        (b"seed = 1.5", "seed: "),
    ],
)
def test_unreadable_files_are_errors_with_their_path(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    config = ExperimentConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]  # mypy reports it, too


def test_there_are_experiment_files() -> None:
    assert CONFIG_FILES


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_experiment_file_loads_and_is_named_after_itself(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert from_flat(to_flat(config)) == config


def test_pyproject_declares_every_key() -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        found = flatten(tomllib.load(file)["tool"]["flwr"]["app"]["config"])
    expected = declared()
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    assert found.keys() == to_flat(ExperimentConfig()).keys()


def test_plain_flower_without_a_file_runs_the_demo_and_reuses_its_experts() -> None:
    demo = REPOSITORY / "configs" / "demo.toml"
    assert from_flat(declared()) == load_config(demo)
    given = ["train.max_steps=7", "mergerec.preset=paper", "domains.train=beauty,books", "run_id=mine"]
    assert from_flat(declared() | read_overrides(given)) == load_config(demo, given)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_plain_flower_takes_a_file_as_fedmerge_does(path: Path) -> None:
    given = flatten(tomllib.loads(path.read_text()))
    assert from_flat(declared() | given) == load_config(path)
    elsewhere = given | {"name": "demo", "domains.root": "elsewhere"}
    assert from_flat(declared() | elsewhere) == from_flat(elsewhere)


# Prints the heavy and forbidden packages that a statement imports.
IMPORTS = """
import sys
{statement}
print(*sorted({{'torch', 'transformers', 'peft', 'flwr', 'ray'}} & sys.modules.keys()), file=sys.stderr)
"""
CLI = "import contextlib, fedmerge.cli\nwith contextlib.suppress(SystemExit): fedmerge.cli.main({arguments})"


@pytest.mark.parametrize(
    "statement",
    [
        "import fedmerge.config",
        CLI.format(arguments=["--help"]),
        CLI.format(arguments=["check", str(REPOSITORY / "configs" / "demo.toml")]),
        CLI.format(arguments=["run", str(CONFIG_FILES[0]), "--set", "seed=x"]),
        CLI.format(arguments=["evaluate", "none", "--domain", "x", "--set", "seed=x"]),
    ],
    ids=["config", "help", "check", "run with a bad setting", "evaluate with a bad setting"],
)
def test_a_config_is_validated_before_anything_heavy_is_imported(statement: str) -> None:
    code = IMPORTS.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""
    assert ("seed: " in done.stderr) == ("seed=x" in statement)


def test_paths_are_made_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "here" / "model").mkdir(parents=True)
    start = tmp_path / "here"
    config = with_absolute_paths(
        from_flat(
            {"output_dir": "../runs", "domains.root": "data", "server.catalogs": "/abs", "backbone.source": "model"}
        ),
        start,
    )
    assert config.output_dir == str(tmp_path / "runs")
    assert config.cache_dir == "/home/somebody/.cache/fedmerge"
    assert config.domains.root == str(start / "data")
    assert config.server.catalogs == "/abs"
    assert config.backbone.source == str(start / "model")
    assert with_absolute_paths(config, Path("/elsewhere")) == config

    names = with_absolute_paths(ExperimentConfig(), start)
    assert (names.domains.root, names.backbone.source, names.server.catalogs) == (
        "demo",
        "sentence-transformers/all-MiniLM-L6-v2",
        None,
    )
    assert with_absolute_paths(from_flat({"backbone.source": "./gone"}), start).backbone.source == str(start / "gone")
