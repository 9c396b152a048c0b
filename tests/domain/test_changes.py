"""Items added, users and items forgotten: by hand, repeated, refused, and what is said about the cache."""

from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.client.cache.dependents import cached_of
from fedmerge.domain.catalog import load_catalog, make_catalog
from fedmerge.domain.changes import add_items, forget_items, forget_users, map_attributes
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


@pytest.fixture
def other_schema(tmp_path: Path) -> Path:
    columns = {
        "name": ["tent", "stove", "car"],
        "maker": ["acme", "", ""],
        "vendor": ["north", "south", ""],
        "price": ["1", "2", "3"],
    }
    catalog = make_catalog("other", ["a", "b", "c"], columns, {"name": 9})
    folder = tmp_path / "other"
    histories = make_interactions(["u", "v"], [[0, 1, 2], [2, 0]])
    write_domain(folder, catalog, histories, public_catalog=True, synthetic=False, source="test")
    return folder


def test_attributes_are_renamed_joined_ordered_and_dropped(other_schema: Path) -> None:
    before, histories = read_manifest(other_schema), histories_of(other_schema)
    mapping = {"name": "title", "maker": "brand", "vendor": "brand"}
    change = map_attributes(other_schema, ("category", "title", "brand=4"), mapping, ["price"])
    catalog, after = load_catalog(other_schema), read_manifest(other_schema)
    assert dict(catalog.attributes) == {
        "category": ("", "", ""),
        "title": ("tent", "stove", "car"),
        "brand": ("acme, north", "south", ""),
    }
    assert catalog.limits == {"brand": 4}
    assert after.attributes == ("category", "title", "brand=4")
    assert change.absent == ("category",)
    assert histories_of(other_schema) == histories
    assert after.catalog_sha256 == catalog.sha256 != before.catalog_sha256
    assert (after.interactions_sha256, after.catalog_source) == (before.interactions_sha256, before.catalog_source)
    again = map_attributes(other_schema, ("category", "title", "brand=4"), {})
    assert again.before == again.after == after


@pytest.mark.parametrize(
    ("template", "mapping", "dropped", "message"),
    [
        (("title",), {"name": "title"}, [], "'maker' becomes 'maker', 'price' becomes 'price'.*expected one of title"),
        (("title",), {"nam": "title"}, [], r"found no attributes 'nam', expected some of name, maker, vendor, price"),
        (("title",), {"name": "title"}, ["colour"], "found no attributes 'colour'"),
        (("title",), {"name": "titel"}, ["maker", "vendor", "price"], "'name' becomes 'titel'"),
        (("title", "title"), {"name": "title"}, ["maker", "vendor", "price"], "'title', expected different names"),
    ],
)
def test_a_mapping_that_loses_an_attribute_is_refused(
    other_schema: Path, template: tuple[str, ...], mapping: dict[str, str], dropped: list[str], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in other_schema.iterdir()}
    with pytest.raises(DomainError, match=message):
        map_attributes(other_schema, template, mapping, dropped)
    assert {path.name: path.read_bytes() for path in other_schema.iterdir()} == before


def test_the_command_maps_and_says_what_depends_on_it(
    other_schema: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "map-attributes", str(other_schema), "--cache-dir", str(tmp_path / "cache")]
    command += ["--to", "title,brand,category", "--map", "name=title", "maker=brand", "--drop", "price", "vendor"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "name=9, maker, vendor, price became title, brand, category" in printed
    assert "nothing is mapped to them, so empty: category" in printed
    assert main([*command[:5], "--to", "title,brand,category"]) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert main(["data", "map-attributes", str(other_schema), "--to", "title,brand,category", "--map", "brand"]) == 1
    assert "--map: found 'brand', expected OLD=NEW" in capsys.readouterr().err
