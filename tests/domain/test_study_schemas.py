"""The study of attributes with names of a domain's own."""

from pathlib import Path

import pytest
import study_schemas
from in_process import small_experiment

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.config import to_toml


def test_names_change_the_texts_alone(tmp_path: Path) -> None:
    experiment = small_experiment(tmp_path)
    backbone = backbone_of(experiment.backbone, experiment.runtime)
    domain = open_domain(Path(experiment.domains.root) / "beauty", backbone, experiment.text)
    renamed = study_schemas.with_names(domain, ("name", "maker", "department"))
    assert [*renamed.catalog.attributes] == ["name", "maker", "department"]
    assert [*renamed.catalog.attributes.values()] == [*domain.catalog.attributes.values()]
    assert renamed.interactions is domain.interactions
    decoded = [str(backbone.tokenizer.decode(of.table.item(0))) for of in (domain, renamed)]
    before, after = (text.replace("##", "").replace(" ", "") for text in decoded)
    assert before.replace("title:", "name:").replace("brand:", "maker:").replace("category:", "department:") == after


def test_the_table_has_every_domain_in_both_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.toml").write_text(to_toml(small_experiment(tmp_path)))
    study_schemas.main(
        [str(tmp_path / "small.toml"), "--seeds", "0", "1", "--users", "20", "--set", "train.max_steps=1"]
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    domains = ["beauty", "books", "coffee", "camping (unseen)"]
    assert [row[:3] for row in rows] == [
        [f"| {seed}", name, variant] for seed in (0, 1) for name in domains for variant in ("unmasked", "masked")
    ]
