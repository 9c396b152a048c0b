"""Domains cut to a share of their users."""

from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.domain.cut import cut_domain
from fedmerge.domain.demo import write_demo
from fedmerge.domain.interactions import Interactions, load_interactions
from fedmerge.domain.manifest import read_manifest
from fedmerge.errors import DomainError


def _sequences(interactions: Interactions) -> dict[str, list[int]]:
    return {name: interactions.sequence(user).tolist() for user, name in enumerate(interactions.user_ids)}


@pytest.fixture
def shops(tmp_path: Path) -> Path:
    write_demo(tmp_path / "shops", num_domains=1, num_users=40, num_items=25)
    return tmp_path / "shops"


def test_users_stay_whole_and_the_catalog_unchanged(shops: Path, tmp_path: Path) -> None:
    whole = _sequences(load_interactions(shops / "beauty"))
    shares = (0.1, 0.5, 1.0)
    cuts = {}
    for share in shares:
        manifest = cut_domain(shops / "beauty", tmp_path / str(share), share, seed=3)
        assert manifest.catalog_sha256 == read_manifest(shops / "beauty").catalog_sha256
        cuts[share] = _sequences(load_interactions(tmp_path / str(share) / "beauty"))
    assert [len(cuts[share]) for share in shares] == [4, 20, 40]
    assert cuts[0.1].items() < cuts[0.5].items() < cuts[1.0].items()  # nested, each user as before
    assert cuts[1.0] == whole
    other = cut_domain(shops / "beauty", tmp_path / "other", 0.5, seed=4)
    assert other.interactions_sha256 != read_manifest(tmp_path / "0.5" / "beauty").interactions_sha256


def test_command(shops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "cut", str(shops / "beauty"), str(tmp_path / "small"), "--share", "0.25"]) == 0
    assert "beauty: 10 users" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "small" / "beauty")
    assert manifest.synthetic
    assert manifest.source.endswith("10 of 40 users, drawn with seed 0")


@pytest.mark.parametrize("share", [0.0, 1.5, 0.01, float("nan")])
def test_impossible_shares_are_refused(shops: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(DomainError, match="expected"):
        cut_domain(shops / "beauty", tmp_path / "small", share, seed=0)
    with pytest.raises(DomainError, match="another destination"):
        cut_domain(shops / "beauty", shops, 0.5, seed=0, overwrite=True)
