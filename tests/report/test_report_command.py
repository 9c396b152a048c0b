"""``fedmerge report``: errors, and atomic writes."""

import shutil
import webbrowser
from pathlib import Path

import pytest
from run_folders import Place, full_disk, make_run, output, refusal

from fedmerge.cli import main

RUN_ID = "shops-20260102-030405-abcd"
Capsys = pytest.CaptureFixture[str]


def test_an_unfinished_run_is_refused(reported_run: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(reported_run, tmp_path / "runs" / RUN_ID)
    (tmp_path / "runs" / RUN_ID / "DONE").unlink()
    told = refusal(capsys, "report", RUN_ID[:6], "--dir", tmp_path / "runs")
    assert "incomplete" in told
    assert f"fedmerge run --resume {tmp_path / 'runs' / RUN_ID}" in told
    told = refusal(capsys, "report", "nothing", "--dir", tmp_path / "runs")
    assert "nothing" in told
    assert str(tmp_path / "runs") in told


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("metrics.parquet", "metrics.parquet:"),
        ("products.parquet", "products.parquet:"),
        ("exposure.parquet", "exposure.parquet:"),
        ("adapters/toys/training.json", "training.json:"),
        ("merged/average/provenance.json", "provenance.json:"),
        ("environment.json", "environment.json:"),
    ],
)
def test_a_damaged_run_is_an_error_with_its_path(
    reported_run: Path, tmp_path: Path, capsys: Capsys, file: str, message: str
) -> None:
    shutil.copytree(reported_run, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(b"PAR1{")
    assert message in refusal(capsys, "report", tmp_path / "copy")
    assert not (tmp_path / "copy" / "report.html").exists()


def test_a_run_without_its_tables_is_refused(run_place: Place, capsys: Capsys) -> None:
    folder = make_run(run_place, "bare-run")  # has no products.parquet
    assert "products.parquet:" in refusal(capsys, "report", folder)


def test_the_page_is_opened_in_a_browser(bench_folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def first_time(address: str) -> bool:
        opened.append(address)
        return len(opened) == 1

    monkeypatch.setattr(webbrowser, "open", first_time)
    output(capsys, "report", bench_folder, "--open")
    assert opened == [(bench_folder / "report.html").as_uri()]
    assert main(["report", str(bench_folder), "--open"]) == 0
    assert f"found no browser; open {bench_folder / 'report.html'}" in capsys.readouterr().err
    assert "the page is on the SuperLink's machine" in refusal(capsys, "run", "demo", "--federation", "prod", "--open")


def test_the_file_is_written_atomically(bench_folder: Path, capsys: Capsys) -> None:
    output(capsys, "report", bench_folder)
    before = (bench_folder / "report.html").read_bytes()
    with full_disk(10_000):
        assert str(bench_folder / "report.html") in refusal(capsys, "report", bench_folder)
    assert (bench_folder / "report.html").read_bytes() == before
    assert not list(bench_folder.glob(".*"))
    for out in (bench_folder / "gone" / "x.html", bench_folder):
        told = refusal(capsys, "report", bench_folder, "--out", out)
        assert f"{out}:" in told
        assert "--out" in told
