"""Items added, users and items forgotten: by hand, repeated, refused, and what is said about the cache."""

from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.client.cache.dependents import cached_of
from fedmerge.domain.catalog import load_catalog, make_catalog
from fedmerge.domain.changes import add_items, forget_items, forget_users
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import load_interactions, make_interactions
from fedmerge.domain.manifest import read_manifest
from fedmerge.errors import DomainError


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    columns = {"title": ["tent", "stove", "car"], "colour": ["red", "", "blue"]}
    catalog = make_catalog("shop", ["a", "b", "c"], columns, {"colour": 4})
    histories = make_interactions(["u", "v", "w"], [[0, 1, 2], [2, 0], [1]])
    folder = tmp_path / "shop"
    write_domain(folder, catalog, histories, public_catalog=True, synthetic=False, source="test")
    return folder


def histories_of(folder: Path) -> dict[str, list[str]]:
    """Return the item ids of each user."""
    ids, interactions = load_catalog(folder).item_ids, load_interactions(folder)
    users = enumerate(interactions.user_ids)
    return {user_id: [ids[item] for item in interactions.sequence(user)] for user, user_id in users}


def test_new_items_are_appended_and_the_rest_stays(shop: Path, tmp_path: Path) -> None:
    before, histories = read_manifest(shop), histories_of(shop)
    new = tmp_path / "new.csv"
    new.write_text("colour,item_id,title,price\nblue,c,car,3\ngreen,d,doll,5\n,e,soap,1\n")
    change = add_items(shop, new)
    catalog, after = load_catalog(shop), read_manifest(shop)
    assert catalog.item_ids == ("a", "b", "c", "d", "e")
    assert catalog.attributes["colour"] == ("red", "", "blue", "green", "")
    assert catalog.limits == {"colour": 4}
    assert (change.num_known, after.public_catalog) == (1, True)
    assert after.interactions_sha256 == before.interactions_sha256
    assert after.catalog_sha256 != before.catalog_sha256
    assert histories_of(shop) == histories
    again = add_items(shop, new)
    assert (again.before, again.num_known) == (again.after, 3)


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ("item_id,title,colour\na,tent,green\n", "1 items have another text .*'a'"),
        ("item_id,title,colour\nd,doll,\nd,toy,\n", "another text .*'d'"),
        ("item_id,name\nd,doll\n", "expected some of title, colour"),
        ("id,title\nd,doll\n", "item_id"),
        ("item_id,title\nd,doll\n ,toy\n", "without an id"),
    ],
)
def test_unusable_tables_change_nothing(shop: Path, tmp_path: Path, table: str, found: str) -> None:
    before, new = read_manifest(shop), tmp_path / "new.csv"
    new.write_text(table)
    with pytest.raises(DomainError, match=found):
        add_items(shop, new)
    assert read_manifest(shop) == before


def test_users_are_forgotten(shop: Path) -> None:
    before = read_manifest(shop)
    forget_users(shop, ["v"])
    assert histories_of(shop) == {"u": ["a", "b", "c"], "w": ["b"]}
    assert read_manifest(shop).catalog_sha256 == before.catalog_sha256
    with pytest.raises(DomainError, match="1 of 1 users") as refused:
        forget_users(shop, ["v"])
    assert "'v'" not in str(refused.value)
    again = forget_users(shop, ["v"], skip_unknown=True)
    assert (again.before, again.num_known) == (again.after, 1)
    with pytest.raises(DomainError, match="no users would be left"):
        forget_users(shop, ["u", "w"])
    assert len(histories_of(shop)) == 2


def test_items_are_forgotten_in_every_history(shop: Path) -> None:
    forget_items(shop, ["b"])
    assert load_catalog(shop).item_ids == ("a", "c")
    assert histories_of(shop) == {"u": ["a", "c"], "v": ["c", "a"]}  # w had nothing else
    with pytest.raises(DomainError, match="'b'"):
        forget_items(shop, ["b", "a"])
    with pytest.raises(DomainError, match="no items would be left"):
        forget_items(shop, ["a", "c"])
    assert forget_items(shop, ["b"], skip_unknown=True).num_known == 1


def test_the_commands_say_what_depends_on_the_domain(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, ids, key = tmp_path / "cache", tmp_path / "ids.txt", "0123456789abcdef"
    of_shop = [
        f"experts/shop-{key}",
        f"heads/shop-federated-{key}.json",
        f"tokens/shop-{key}",
        "sums/shop",
        "disclosed/shop",
    ]
    for name in (*of_shop, f"experts/shop-two-{key[:4]}", f"experts/other-{key}"):
        (cache / name).mkdir(parents=True)
    found = cached_of("shop", cache)
    assert sorted(path.relative_to(cache).as_posix() for paths in found.values() for path in paths) == sorted(of_shop)
    ids.write_text("v\n\n")
    assert main(["data", "forget", str(shop), "--users", str(ids), "--cache-dir", str(cache)]) == 0
    said = capsys.readouterr().out
    assert "-1 users, -2 interactions" in said
    assert "cannot be recalled" in said
    assert f"shop-{key}" in said
    assert "other" not in said
    assert "1 of shop: a record of what has left" in said
    assert main(["data", "forget", str(shop), "--users", str(ids)]) != 0
    (tmp_path / "new.csv").write_text("item_id,title\nd,doll\n")
    added = ["data", "add-items", str(shop), "--catalog", str(tmp_path / "new.csv"), "--cache-dir", str(cache)]
    assert main(added) == 0
    assert "+1 items" in capsys.readouterr().out
