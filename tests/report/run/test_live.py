"""A run at work: its stages on disk, as lines, on a terminal, and `fedmerge watch`."""

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from run_folders import Place, make_run, output

from fedmerge.cli import main
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.expert import train_expert
from fedmerge.config import Lora, Train
from fedmerge.report.run.live import duration, showing, stage_lines, training_step
from fedmerge.runs.folder import DONE, locked
from fedmerge.runs.overview.progress import PROGRESS_FILE, Stage, Stages, read_stages, remove_stages

Capsys = pytest.CaptureFixture[str]


def test_stages_are_on_disk_as_they_come(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.begin("train", "train", 3)
    assert [(stage.answered, stage.ended) for stage in read_stages(tmp_path)] == [(0, None)]
    stages.answer(1, ["coffee", "books"])
    stages.end()
    for _ in range(4):
        stages.begin("merge", "query.gradient", 3)
        stages.answer(3, [])
        stages.end()
    stages.begin("test", "evaluate", 2)
    train, merge, test = read_stages(tmp_path)
    assert (train.answered, train.waiting, train.ended is None) == (1, (), False)
    assert (merge.times, merge.answered, merge.question) == (4, 3, "query.gradient")
    assert (test.phase, test.asked, test.ended) == ("test", 2, None)
    assert train.started <= merge.started <= test.started
    remove_stages(tmp_path)
    assert not read_stages(tmp_path)


def test_nobody_fails_because_of_the_file(tmp_path: Path) -> None:
    gone = Stages(tmp_path / "gone")
    gone.begin("train", "train", 1)
    gone.end()
    for damaged in ("", "{", '[{"phase": 1}]', "3"):
        (tmp_path / PROGRESS_FILE).write_text(damaged)
        assert read_stages(tmp_path) == []


def test_lines_name_counts_steps_and_the_time_left() -> None:
    stages = [
        Stage("gather", "query.describe", 4, 4, (), 1, 1000.0, 1012.0),
        Stage("train", "train", 4, 1, ("books", "camping"), 1, 1012.0, None),
    ]
    found = stage_lines(stages, {"books": ("step 25", 0.5)}, 1072.0)
    assert found == [
        "done  gather: 4 of 4, 12 s",
        "now  train: 1 of 4, 60 s, about 2 min left",  # 1.5 of 4 in 60 s
        "        books  step 25, 50 % of the budget",
        "        camping",
    ]
    assert "left" not in stage_lines([stages[1]], {}, 1072.0)[0].replace("about 3 min left", "")
    first = Stage("train", "train", 4, 0, ("books",), 1, 1012.0, None)
    assert "left" not in stage_lines([first], {}, 1072.0)[0]
    assert "message 7" in stage_lines([Stage("merge", "query.gradient", 2, 0, (), 7, 0.0, None)], {}, 1.0)[0]
    assert [duration(seconds) for seconds in (3, 100, 11100)] == ["3 s", "2 min", "3 h 5 min"]


def test_the_lines_of_a_training_are_understood(toys: LocalDomain) -> None:
    lines: list[str] = []
    settings = Train(max_steps=4, batch_size=8, validate_every_steps=2, validation_users=5)
    train_expert(toys, Lora(rank=2), settings, 0, lines.append)
    steps = [found for line in lines if (found := training_step(f"(ClientAppActor pid=7) 10:00:00 client {line}"))]
    assert steps == [("toys", "step 2", 0.5), ("toys", "step 4", 1.0)]
    assert training_step("10:00:00 train: 1 of 3 answered (books, 3 s)") is None


def test_without_a_terminal_lines_are_printed_as_they_are(tmp_path: Path, capsys: Capsys) -> None:
    with showing(tmp_path) as on_line:
        on_line("10:00:00 [red]a line[/red]")
    assert capsys.readouterr().out == "10:00:00 [red]a line[/red]\n"


ON_A_TERMINAL = """
import sys, time
from pathlib import Path
from fedmerge.report.run.live import showing
from fedmerge.runs.overview.progress import Stages
folder = Path(sys.argv[1])
with showing(folder) as on_line:
    stages = Stages(folder)
    stages.begin("train", "train", 2)
    stages.answer(1, ["books"])
    stages.end()
    stages.begin("train", "again", 2)
    stages.answer(1, ["books"])
    time.sleep(0.6)  # the file is written twice a second
    stages.answer(1, ["books"])
    on_line("(ClientAppActor pid=1) client books: step 5, 50 % of the budget, loss 1")
    time.sleep(2.5)
print("the end")
"""


@pytest.mark.long
def test_a_terminal_shows_the_stages_below_the_log(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(controller)
    assert process.wait() == 0
    text = shown.decode()
    assert "client books: step 5, 50 % of the budget, loss 1" in text
    assert "books  step 5, 50 % of the budget" in text
    assert "now  train: 1 of 2" in text
    assert text.rstrip().endswith("the end")


@pytest.mark.long
def test_watch_follows_a_run_to_its_end(run_place: Place, capsys: Capsys) -> None:
    run = make_run(run_place, "watched")
    (run / DONE).unlink()
    stages, ready, go_on = Stages(run), threading.Event(), threading.Event()

    def work() -> None:
        with locked(run):
            stages.begin("train", "train", 2)
            stages.answer(2, [])
            stages.end()
            ready.set()
            go_on.wait(30)
            (run / DONE).write_text("finished")

    worker = threading.Thread(target=work)
    worker.start()
    assert ready.wait(30)
    threading.Timer(1.5, go_on.set).start()
    said = output(capsys, "watch", run)
    worker.join()
    assert "done  train: 2 of 2" in said
    assert said.count("train: 2 of 2") == 1
    assert "watched is finished; see: fedmerge show" in said


def test_watch_says_how_to_resume_a_run_that_nobody_works_on(run_place: Place, capsys: Capsys) -> None:
    run = make_run(run_place, "killed")
    (run / DONE).unlink()
    assert main(["watch", str(run)]) == 1
    assert f"fedmerge run --resume {run}" in capsys.readouterr().out
