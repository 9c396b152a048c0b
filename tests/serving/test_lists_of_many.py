"""`fedmerge recommend` beyond one history: users, texts, tables of histories, filters, popularity; the cache."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import Place, make_place, make_run, output, refusal

from fedmerge.config import load_config
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.interactions import load_interactions
from fedmerge.serving.recommender import Recommender, load_recommender, recommend

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    return make_run(place, "trial", ["merge.methods=average", f"cache_dir={place.root / 'cache'}"])


@pytest.fixture(scope="module")
def recommender(place: Place, run: Path) -> Recommender:
    return load_recommender(run / "merged" / "average", place.domains / "toys")


@pytest.fixture
def command(place: Place, run: Path) -> tuple[str | Path, ...]:
    return "recommend", run, "--domain", place.domains / "toys"


def listed(text: str) -> list[str]:
    return [item["item_id"] for item in json.loads(text)["recommendations"]]


def ids(recommender: Recommender, history: list[str], k: int = 10) -> list[str]:
    return [item.item_id for item in recommend(recommender, history, k)]


def test_a_user_of_the_domain_has_the_list_of_his_history(
    place: Place, recommender: Recommender, command: tuple[str | Path, ...], capsys: Capsys
) -> None:
    interactions = load_interactions(place.domains / "toys")
    user, items = interactions.user_ids[3], interactions.sequence(3)
    history = [recommender.catalog.item_ids[item] for item in items]
    found = output(capsys, *command, "--user", user, "--json")
    assert [item["item_id"] for item in json.loads(found)["history"]] == history
    assert listed(found) == ids(recommender, history)
    assert "user 'nobody' is not among the 12 users of toys" in refusal(capsys, *command, "--user", "nobody")


def test_a_history_from_standard_input_and_one_by_its_texts(
    recommender: Recommender, command: tuple[str | Path, ...], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = recommender.catalog
    known = list(catalog.item_ids[:2])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{known[0]}\n{known[1]}\n"))
    assert listed(output(capsys, *command, "--history", "-", "--json")) == ids(recommender, known)
    # the texts of two items of the catalog: the same user, but nothing is known to be seen
    texts = [{name: values[i] for name, values in catalog.attributes.items()} for i in (0, 1)]
    by_text = output(
        capsys, *command, *[word for text in texts for word in ("--history-text", json.dumps(text))], "--json"
    )
    assert listed(by_text) == [item.item_id for item in recommend(recommender, known, 10, keep_seen=True)]
    alone = output(capsys, *command, "--history-text", "a red tent")
    assert alone.splitlines()[1].split() == ["(by", "its", "text)", "a", "red", "tent"]
    assert "['colour'], expected some of" in refusal(capsys, *command, "--history-text", '{"colour": "red"}')
    assert "without text" in refusal(capsys, *command, "--history-text", " ")
    assert "Quote the values" in refusal(capsys, *command, "--history-text", '{"title": 3}')


def test_filters_leave_items_out(
    recommender: Recommender, command: tuple[str | Path, ...], tmp_path: Path, capsys: Capsys
) -> None:
    catalog = recommender.catalog
    history = ["--history", catalog.item_ids[0], "-k", "20", "--json"]
    everything = listed(output(capsys, *command, *history))
    stock = list(catalog.item_ids[4:9])
    (tmp_path / "stock.txt").write_text("\n".join([*stock, "not-yet-listed"]))
    assert listed(output(capsys, *command, *history, "--in-stock", tmp_path / "stock.txt")) == [
        item for item in everything if item in stock
    ]
    category = catalog.attributes["category"]
    wanted = sorted(set(category))[1:3]
    only = [word for value in wanted for word in ("--only", f"category={value}")]
    of_category = {item for item, value in zip(catalog.item_ids, category, strict=True) if value in wanted}
    assert listed(output(capsys, *command, *history, *only)) == [item for item in everything if item in of_category]
    games = {
        item for item, value in zip(catalog.item_ids, category, strict=True) if value.startswith("Toys & Games > G")
    }
    by_beginning = output(capsys, *command, *history, "--only", "category=Toys & Games > G*")
    assert listed(by_beginning) == [item for item in everything if item in games]
    both = (*history, *only, "--only", f"brand={catalog.attributes['brand'][3]}")
    assert set(listed(output(capsys, *command, *both))) <= of_category
    assert "found a filter on 'colour'" in refusal(capsys, *command, *history, "--only", "colour=red")
    assert f"a value such as {wanted[0]!r}" in refusal(
        capsys, *command, *history, "--only", f"category={wanted[0][:-1]}"
    )
    assert "expected ATTRIBUTE=VALUE" in refusal(capsys, *command, *history, "--only", "category")
    (tmp_path / "none.txt").write_text("unknown\n")
    assert "none of the 1 items in stock" in refusal(capsys, *command, *history, "--in-stock", tmp_path / "none.txt")


def test_popularity_alone_is_the_order_of_counts(
    place: Place, recommender: Recommender, command: tuple[str | Path, ...], capsys: Capsys
) -> None:
    catalog = recommender.catalog
    counts = np.bincount(load_interactions(place.domains / "toys").items, minlength=len(catalog))
    order = [catalog.item_ids[i] for i in np.argsort(-counts, kind="stable") if i != 2]
    history = ("--history", catalog.item_ids[2], "-k", "19", "--json")
    found = output(capsys, *command, *history, "--popularity", "1")
    assert listed(found) == order
    assert json.loads(found)["score_kind"] == "standardised"
    assert listed(output(capsys, *command, *history, "--popularity", "0")) == ids(
        recommender, [catalog.item_ids[2]], 19
    )


def test_all_users_and_tables_of_histories_have_the_lists_of_each_alone(
    place: Place, recommender: Recommender, command: tuple[str | Path, ...], tmp_path: Path, capsys: Capsys
) -> None:
    interactions, catalog = load_interactions(place.domains / "toys"), recommender.catalog
    histories = {
        user: [catalog.item_ids[item] for item in interactions.sequence(number)]
        for number, user in enumerate(interactions.user_ids)
    }
    out = tmp_path / "lists.parquet"
    assert "lists of 12 users of toys, by merged" in output(capsys, *command, "--all-users", "--out", out, "-k", "3")
    table = pq.read_table(out)
    assert table.column_names == ["user_id", "rank", "item_id", "score", "title"]
    assert out.stat().st_mode & 0o044
    found: dict[str, list[str]] = {}
    for row in table.to_pylist():
        found.setdefault(row["user_id"], []).append(row["item_id"])
        assert row["rank"] == len(found[row["user_id"]])
        assert row["title"] == catalog.titles[recommender.item_index[row["item_id"]]]
    assert found == {user: ids(recommender, history, 3) for user, history in histories.items()}

    lists = {"user_id": [*histories, "new"], "history": [[*history, "gone"] for history in histories.values()] + [None]}
    pq.write_table(pa.table(lists), tmp_path / "lists-in.parquet")
    printed = output(
        capsys, *command, "--histories", tmp_path / "lists-in.parquet", "--out", tmp_path / "1.parquet", "-k", "3"
    )
    assert pq.read_table(tmp_path / "1.parquet").equals(table)
    assert "without a list: 1 users" in printed
    assert "left out: 12 items" in printed
    rows = [f"{user},{item}" for user, history in histories.items() for item in history]
    (tmp_path / "rows.csv").write_text("\n".join(["user_id,item_id", *rows]))
    output(capsys, *command, "--histories", tmp_path / "rows.csv", "--out", tmp_path / "2.parquet", "-k", "3")
    assert pq.read_table(tmp_path / "2.parquet").equals(table)


def test_tables_that_cannot_be_read_are_refused(
    command: tuple[str | Path, ...], tmp_path: Path, capsys: Capsys
) -> None:
    out = ("--out", tmp_path / "out.parquet")
    pq.write_table(pa.table({"user_id": ["a"], "history": ["x,y"]}), tmp_path / "text.parquet")
    assert "lists of item ids" in refusal(capsys, *command, "--histories", tmp_path / "text.parquet", *out)
    pq.write_table(pa.table({"user_id": ["a", "a"], "history": [["x"], ["y"]]}), tmp_path / "twice.parquet")
    assert "an earlier row" in refusal(capsys, *command, "--histories", tmp_path / "twice.parquet", *out)
    pq.write_table(pa.table({"who": ["a"], "item_id": ["x"]}), tmp_path / "columns.parquet")
    assert "'user_id'" in refusal(capsys, *command, "--histories", tmp_path / "columns.parquet", *out)
    assert not list(tmp_path.glob("*out.parquet*"))
    assert "Give --out FILE" in refusal(capsys, *command, "--all-users")
    assert "--histories or --all-users" in refusal(capsys, *command, "--history", "x", *out)


def test_the_second_call_reads_the_item_vectors_and_a_changed_catalog_has_its_own(
    place: Place, run: Path, recommender: Recommender, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = place.root / "cache"
    kept = sorted((cache / "item-vectors").glob("toys-*"))
    tokens = sorted((cache / "tokens").glob("toys-*"))
    assert len(kept) == len(tokens) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is encoded but the history")

    monkeypatch.setattr("fedmerge.serving.recommender.item_sequences", refuse)
    monkeypatch.setattr("fedmerge.serving.recommender.build_token_table", refuse)
    again = load_recommender(run / "merged" / "average", place.domains / "toys")
    history = [load_catalog(place.domains / "toys").item_ids[5]]
    assert recommend(again, history) == recommend(recommender, history)
    with pytest.raises(AssertionError):
        load_recommender("none", place.domains / "toys", load_config(run / "config.toml"))
    kept[0].write_bytes(kept[0].read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(AssertionError):  # a damaged file is not read
        load_recommender(run / "merged" / "average", place.domains / "toys")
