"""The study of contrasts at serving time: ranks against the definition, and the script on tiny domains."""

import json
from pathlib import Path

import numpy as np
import pytest
import study_serving_contrast
import torch
from adapters import layout_of, random_adapter
from in_process import small_experiment
from study_serving_contrast import contrasted_ranks

from fedmerge.config import to_toml
from fedmerge.device import resolve_compute
from fedmerge.domain.splits import Examples
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.mergerec.contrast import contrast


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


EXPERT = unit(20, 6, seed=0), unit(30, 6, seed=1)
BACKBONE = unit(20, 6, seed=2), unit(30, 6, seed=3)
TARGETS = np.arange(20)
SEEN = [np.array([(user + 3) % 30, (user + 9) % 30]) for user in range(20)]
EXAMPLES = Examples(np.arange(20), SEEN, TARGETS)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_ranks_are_those_of_the_contrast(weight: float, masked: bool) -> None:
    S, M = (users.double() @ items.double().T for users, items in (EXPERT, BACKBONE))
    scores = contrast(S, M, weight, weight)
    expected = []
    for user, target in enumerate(TARGETS):
        others = {*range(30)} - {target} - ({*SEEN[user].tolist()} if masked else set())
        expected.append(1 + sum(bool(scores[user, item] >= scores[user, target]) for item in others))
    assert contrasted_ranks(EXPERT, BACKBONE, weight, EXAMPLES, masked).tolist() == expected


def test_a_contrast_with_itself_changes_no_rank() -> None:
    plain = contrasted_ranks(EXPERT, BACKBONE, 0.0, EXAMPLES, masked=True)
    assert np.array_equal(contrasted_ranks(EXPERT, EXPERT, 0.7, EXAMPLES, masked=True), plain)
    assert not np.array_equal(contrasted_ranks(EXPERT, BACKBONE, 0.7, EXAMPLES, masked=True), plain)


def test_the_script_selects_on_one_half_and_reports_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_experiment(tmp_path)
    backbone = load_backbone(config.backbone.source, "mean", resolve_compute("cpu", "float32"))
    for seed, domain in enumerate(config.domains.train):
        adapter = random_adapter(layout_of(backbone), rank=2, scaling=0.3, seed=seed)
        write_adapter(adapter, tmp_path / "adapters" / domain, "tiny")
    (tmp_path / "run.toml").write_text(to_toml(config))
    arguments = [str(tmp_path / "run.toml"), str(tmp_path / "adapters"), "--users", "20", "--weights", "0.5", "2"]
    found = []
    for name in ("one.json", "two.json"):
        study_serving_contrast.main([*arguments, "--out", str(tmp_path / name)])
        found.append(json.loads((tmp_path / name).read_text()))
    assert found[0] == found[1]
    assert found[0]["domains"].keys() == {"beauty", "books", "coffee"}
    for of_domain in found[0]["domains"].values():
        assert of_domain["select"].keys() == {"0.0", "0.5", "2.0"}
        assert of_domain["select"][str(of_domain["chosen"])] == max(of_domain["select"].values())
        for variant in ("masked", "unmasked"):
            assert of_domain["report"][variant].keys() == {"0", "0.5", "2"}
            assert of_domain["report"][variant]["0"]["ndcg@10"][1:] == [0, 0, 0]
    assert capsys.readouterr().out.count(" selected | ") == 2 * 3 * 2
