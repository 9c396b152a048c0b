"""Attributes of a shop's own: names, order and limits in the manifest, in hashes, in tokens and in texts."""

import hashlib
import json
from pathlib import Path

import pytest

from fedmerge.domain.catalog import catalog_from_bytes, catalog_to_bytes, load_catalog, make_catalog
from fedmerge.domain.folder import domain_info, write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.domain.manifest import read_manifest, read_template
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import build_token_table, item_text
from fedmerge.errors import DomainError

IDS = ["a", "b"]
OWN = {"name": ["red tent", "stove"], "colour": ["red wool", ""], "price bucket": ["", "cheap cheap"]}
OLD = {"title": ["red tent", "stove"], "brand": ["north", ""], "category": ["camping", "camping"]}


def write(folder: Path, attributes: dict[str, list[str]], limits: dict[str, int] | None = None) -> Path:
    """Write a domain of two items and one user."""
    catalog = make_catalog(folder.name, IDS, attributes, limits)
    interactions = make_interactions(["u"], [[0, 1, 0]])
    write_domain(folder, catalog, interactions, public_catalog=True, synthetic=True, source="by hand")
    return folder


def test_title_brand_and_category_keep_format_1_and_their_hash(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop", OLD)
    fields = json.loads((folder / "manifest.json").read_text())
    assert fields["format"] == 1
    assert "attributes" not in fields
    by_hand = json.dumps([IDS, *OLD.values()], separators=(",", ":")).encode()
    assert fields["catalog_sha256"] == hashlib.sha256(by_hand).hexdigest()


def test_own_attributes_come_back_in_order_with_their_limits(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop", OWN, {"colour": 1})
    fields = json.loads((folder / "manifest.json").read_text())
    assert (fields["format"], fields["attributes"]) == (2, ["name", "colour=1", "price bucket"])
    catalog = load_catalog(folder)
    assert list(catalog.attributes) == list(OWN)
    assert catalog.limits == {"colour": 1}
    assert catalog.titles == ("red tent", "stove")
    assert domain_info(folder).attribute_shares == {"name": 1.0, "colour": 0.5, "price bucket": 0.5}
    sent = catalog_from_bytes(catalog_to_bytes(catalog), "shop", 2, read_manifest(folder).attributes)
    assert sent == catalog


@pytest.mark.parametrize(
    ("attributes", "limits"),
    [
        ({"name": OWN["name"]}, {}),
        ({"name": OWN["name"]}, {"name": 3}),
        ({"name": OWN["name"]}, {"name": 4}),
        ({"title": OWN["name"]}, {}),
        (OLD, {"brand": 3}),
        (dict(reversed(OLD.items())), {}),
    ],
)
def test_the_hash_of_a_catalog_covers_names_order_and_limits(
    attributes: dict[str, list[str]], limits: dict[str, int]
) -> None:
    others: list[tuple[dict[str, list[str]], dict[str, int]]] = [
        (OLD, {}),
        (OWN, {}),
        ({"name": OWN["name"]}, {"name": 5}),
        ({"colour": OWN["name"]}, {}),
    ]
    found = make_catalog("shop", IDS, attributes, limits).sha256
    assert found not in {make_catalog("shop", IDS, *other).sha256 for other in others}


def test_a_template_is_not_taken_for_a_column() -> None:
    """Two items called like two attributes: the columns of one catalog are the template and columns of the other."""
    old = make_catalog("shop", ["name", "colour"], {"title": IDS, "brand": ["x", "y"], "category": ["", ""]})
    own = make_catalog("shop", IDS, {"name": ["x", "y"], "colour": ["", ""]})
    assert old.sha256 != own.sha256


def test_tokens_and_text_follow_the_template(backbone: Backbone) -> None:
    columns = {"colour": ["red red red", ""], "title": ["tent tent tent", "stove"]}
    tokenizer, catalog = backbone.tokenizer, make_catalog("shop", IDS, columns, {"title": 1})
    table = build_token_table(catalog, tokenizer, 2)
    texts = ["colour: red red title: tent", "title: stove"]
    for index, text in enumerate(texts):
        assert table.item(index).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        values = {name: column[index] for name, column in catalog.attributes.items()}
        assert item_text(values, tokenizer, 2, tuple(catalog.attributes), catalog.limits) == text


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ([], "0 attributes"),
        (["title", "title=3"], "'title'"),
        (["item_id"], "'item_id'"),
        (["a,b"], "'a,b'"),
        (["colour=0"], "'colour=0'"),
        (["colour=x"], "'colour=x'"),
        ([" title"], "' title'"),
        (["x" * 65], "xxx"),
        ([f"a{i}" for i in range(65)], "65 attributes"),
    ],
)
def test_unusable_attributes_are_refused_by_name(template: list[str], found: str) -> None:
    with pytest.raises(DomainError, match=found):
        read_template(template, "shop")


def test_names_of_any_language_are_attributes() -> None:
    assert read_template(["Größe", "价格=8", "details.Brand", "x" * 64], "shop")["价格"] == 8


def test_a_manifest_that_names_other_columns_than_its_catalog_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop", OWN)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"colour"', '"color"'))
    with pytest.raises(DomainError, match=r"found columns .*'colour'"):
        load_catalog(folder)
    path.write_text(path.read_text().replace('"color"', '"colour=7"'))
    with pytest.raises(DomainError, match="content was changed"):
        load_catalog(folder)
    path.write_text(path.read_text().replace('"colour=7"', "7"))
    with pytest.raises(DomainError, match="expected a list of texts"):
        read_manifest(folder)
