"""Noised answers that are late, refused or of a failed run: privacy.json counts each once."""

import json
import shutil
from pathlib import Path

import pytest
from bad_answers import BAD, DOMAINS, Change, bad_client, cut, experiment, garbage, of_adapter, too_much
from flwr.app import ConfigRecord, Context, Error, Message

from fedmerge.errors import ClientError
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation


BY_USER = {
    "dp.mode": "user",
    "dp.noise_multiplier": 2.0,
    "dp.delta": 1e-3,
    "dp.accountant": "rdp",
    "train.negatives": "catalog",
}


IN_ROUNDS = {"rounds.rule": "fedit", "rounds.number": 2}


def steps_counted(run: Path) -> dict[str, list[int]]:
    """Return domain -> steps of each release in the statement."""
    reported = json.loads((run / "privacy.json").read_text())
    return {domain: [release["steps"] for release in of["releases"]] for domain, of in reported["domains"].items()}


@pytest.mark.parametrize(
    ("changes", "after", "expected"),
    [({}, "evaluate", {BAD: [4]}), (IN_ROUNDS, "train", {"beauty": [2, 2], "books": [2, 2], BAD: [2]})],
    ids=["expert", "round"],
)
def test_a_late_answer_with_noise_is_counted_once(
    place: Path, tmp_path: Path, changes: dict[str, object], after: str, expected: dict[str, list[int]]
) -> None:
    late: list[Message] = []
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        honest = answer_honestly(message, context)
        assert honest is not None
        asked.append(message.metadata.message_type)
        if DOMAINS[int(context.node_config["partition-id"])] == BAD and asked[-1] == "train":
            late.append(honest)
            return None
        if late and asked[-1] == after and (after == "evaluate" or asked.count("train") > 3):
            return [late.pop(), honest]
        return honest

    own = {"cache_dir": str(tmp_path / "cache"), "server.timeout_seconds": 8}
    config = experiment(place, tmp_path, **BY_USER, **changes, **own)
    run_in_process(config, answer)
    run = tmp_path / "run"
    assert not late
    assert BAD in json.loads((run / "clients.json").read_text())["excluded"]
    assert expected.items() <= steps_counted(run).items()
    reported = json.loads((run / "privacy.json").read_text())
    assert reported["guarantee"]
    of_books, of_bad = (reported["domains"][domain]["epsilon"] for domain in ("books", BAD))
    assert of_bad < of_books if changes else of_bad == of_books  # one round of two


def half_the_noise(question: Message, honest: Message) -> Message:
    report = records.read_report(honest.content)
    report["privacy"]["noise_multiplier"] /= 2
    honest.content["facts"] = ConfigRecord({"report": json.dumps(report)})
    return honest


@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        (of_adapter(cut), ""),
        (half_the_noise, "noise_multiplier 1.0 instead of 2.0"),
        (too_much, "bytes and was not read"),
        (garbage, "its message has no record 'facts'"),
    ],
    ids=["shapes", "noise", "size", "garbage"],
)
def test_a_refused_answer_with_noise_is_counted(place: Path, tmp_path: Path, change: Change, why_not: str) -> None:
    """Counted as reported if that matches the agreement, otherwise no number holds for its users."""
    run_in_process(experiment(place, tmp_path, **BY_USER, run_id="refused"), bad_client("train", change))
    run = tmp_path / "refused"
    reported = json.loads((run / "privacy.json").read_text())
    assert reported["domains"].keys() == {"beauty", "books", BAD}
    assert reported["guarantee"] == (not why_not)
    if why_not:
        assert reported["domains"][BAD]["epsilon"] is None
        (problem,) = reported["why_not"]
        assert problem.startswith("something that coffee sent cannot be counted, so no ε holds for it: ")
        assert why_not in problem
        assert "coffee: ε = ∞ (one unit replaced: ε = ∞; not known)" in (run / "report.txt").read_text()
    else:
        assert steps_counted(run)[BAD] == [4]
        assert reported["domains"][BAD]["epsilon"] == reported["domains"]["books"]["epsilon"]
    assert reported["domains"]["books"]["epsilon"] is not None


def test_releases_of_a_failed_run_are_counted_once_after_it_resumes(place: Path, tmp_path: Path) -> None:
    died = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.'>"
    bad = bad_client("train", lambda question, honest: Message(Error(code=0, reason=died), reply_to=question))
    config = experiment(place, tmp_path, **BY_USER, **IN_ROUNDS, run_id="failed", **{"server.messages_at_once": 1})
    with pytest.raises(ClientError, match=r"coffee: .* train\b"):
        run_in_process(config, bad)
    run = tmp_path / "failed"
    assert steps_counted(run) == {"beauty": [2], "books": [2]}
    failed = json.loads((run / "privacy.json").read_text())
    assert not any("metric sums" in line for line in failed["not_covered"])  # nothing was evaluated
    shutil.rmtree(run / "rounds" / "1" / "books")  # as if it was killed before the reply was kept
    run_in_process(config.model_copy(update={"resume": True}))
    assert steps_counted(run) == {domain: [2, 2] for domain in ("beauty", "books", BAD)}
    reported = json.loads((run / "privacy.json").read_text())
    assert any("metric sums" in line for line in reported["not_covered"])
    assert reported["domains"]["books"]["epsilon"] > failed["domains"]["books"]["epsilon"]
