"""Fixtures shared by several files, and one thread for all tests.

Equalities hold at a fixed thread count, and tiny models are slower on two threads. Fixtures of one folder import their
dependencies themselves, so other tests start without them.
"""

# ruff: noqa: PLC0415  # imports within fixtures, see above

import os  # isort: skip

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are those of a CPU, also where a GPU is

import fedmerge  # noqa: F401  # isort: skip  # before torch, since it says how threads wait

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from backbones import tiny_bert, tiny_roberta
from hypothesis import settings

from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone, load_backbone

if TYPE_CHECKING:
    from run_folders import Place

    from fedmerge.bench.grid import Grid
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.report.bench_tables import BenchTables

FIRST = ("test_tutorials", "test_deploy_organisation", "test_deploy", "test_kill", "test_python_page")  # for minutes

settings.register_profile("fedmerge", deadline=None)  # a busy machine must not fail a test
settings.load_profile("fedmerge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that processes that share the tests end at about the same time."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def pytest_runtest_setup() -> None:
    """Reset settings of the process that commands, servers and clients change when a test runs them in it.

    Threads: back to one. Logging: no handlers, since theirs write to a stream that pytest closes after the test.
    """
    torch.set_num_threads(1)
    library = logging.getLogger("fedmerge")
    library.handlers.clear()
    library.propagate = True
    library.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny BERT in float32."""
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))


# For tests/merging and tests/mergerec


@pytest.fixture(scope="module", params=[(tiny_bert, "mean"), (tiny_roberta, "cls")], ids=["bert", "roberta"])
def either_backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny BERT, and a tiny RoBERTa with the other pooling."""
    build, pooling = request.param
    return load_backbone(str(build(tmp_path_factory.mktemp("backbone"))), pooling, resolve_compute("cpu", "float32"))


# For tests/client: a small domain to train on


@pytest.fixture(scope="module")
def toys(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> "LocalDomain":
    """Thirty users and 25 items of a generated domain, opened for training."""
    from fedmerge.client.local_domain import open_domain
    from fedmerge.config import Text
    from fedmerge.domain.demo import generate_domain
    from fedmerge.domain.folder import write_domain

    demo = generate_domain("toys", num_users=30, num_items=25)
    folder = tmp_path_factory.mktemp("domains") / "toys"
    write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    return open_domain(folder, backbone, Text(max_attribute_tokens=6, max_items=3, max_tokens=48))


# For tests/whole_runs: domains whose clients have trained


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the clients' disk: every client trains once for all tests of a file."""
    from in_process import small_experiment

    from sim.local.in_process import run_in_process

    place = tmp_path_factory.mktemp("place")
    run_in_process(small_experiment(place, **{"run_id": "first", "merge.methods": "average"}))
    return place


# For tests/bench: one small benchmark, run once for all its tests


@pytest.fixture(scope="session")
def bench_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with domains, a tiny backbone, an experiment and a benchmark file."""
    from small_bench import make_bench_place

    return make_bench_place(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def finished_bench(bench_place: Path) -> "tuple[Grid, BenchTables, list[str]]":
    """Grid, tables and progress lines of the finished benchmark."""
    from small_bench import run_small_bench

    return run_small_bench(bench_place)


# For tests/report: benchmarks and a run to report on


@pytest.fixture(scope="session")
def reported_bench() -> "BenchTables":
    """Tables of a benchmark with folds and random outcomes."""
    from report_folders import some_bench

    return some_bench()


@pytest.fixture(scope="session")
def private_bench() -> "BenchTables":
    """Tables of a benchmark of strategies with differential privacy, and one without."""
    from report_folders import some_private_bench

    return some_private_bench()


@pytest.fixture
def bench_folder(reported_bench: "BenchTables", tmp_path: Path) -> Path:
    """Folder of ``reported_bench``."""
    from fedmerge.report.bench_tables import write_bench_tables

    write_bench_tables(tmp_path, reported_bench)
    return tmp_path


@pytest.fixture(scope="session")
def run_place(tmp_path_factory: pytest.TempPathFactory) -> "Place":
    """Folder with domains, a backbone and an experiment, for runs that are only written."""
    from run_folders import make_place

    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def reported_run(run_place: "Place") -> Path:
    """Folder of a finished run."""
    from report_folders import make_reported_run

    return make_reported_run(run_place, "shops-20260102-030405-abcd")
