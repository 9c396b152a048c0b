"""The study of semantic ids: codes against nearest centroids, decoding against sums over all items, and its tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import small_experiment

pytest.importorskip("faiss")
import study_semantic_ids  # needs faiss, of the extra `serve`

rng = np.random.default_rng(0)


def test_every_code_is_the_nearest_centroid_of_what_the_levels_before_leave() -> None:
    vectors = rng.normal(size=(400, 6)).astype(np.float32)
    tree = study_semantic_ids.residual_kmeans(vectors, levels=2, seed=0)
    residual = vectors.astype(np.float64)
    for level in range(2):
        distances = ((residual[:, None] - tree.centroids[level][None]) ** 2).sum(axis=2)
        chosen = tree.codes[:, level]
        assert distances[np.arange(400), chosen] == pytest.approx(distances.min(axis=1), abs=1e-4)
        residual = residual - tree.centroids[level][chosen]
    assert (residual**2).sum() < 0.2 * (vectors**2).sum()


def tiny_tree() -> study_semantic_ids.CodeTree:
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 0], [2, 1]], dtype=np.uint8)  # items 2 and 3 share their codes
    centroids = np.zeros((2, 256, 2), dtype=np.float32)
    centroids[0, :3] = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    centroids[1, :2] = [[0.5, 0.0], [0.0, 3.0]]
    return study_semantic_ids.code_tree(codes, centroids)


def test_without_beams_a_score_is_the_sum_over_the_levels() -> None:
    tree = tiny_tree()
    users = rng.normal(size=(7, 2)).astype(np.float32)
    vectors = tree.centroids[0][tree.codes[:, 0]] + tree.centroids[1][tree.codes[:, 1]]
    assert study_semantic_ids.decode(users, tree, None).numpy() == pytest.approx(users @ vectors.T, abs=1e-6)
    assert study_semantic_ids.decode(users, tree, 3).numpy() == pytest.approx(users @ vectors.T, abs=1e-6)


def test_a_beam_loses_the_items_below_the_prefixes_that_it_drops() -> None:
    scores = study_semantic_ids.decode(np.array([[1.0, 0.1]], dtype=np.float32), tiny_tree(), 1)[0]
    assert scores[:2].tolist() == pytest.approx([1.5, 1.3])  # prefix 0 scores 1, prefix 1 .1, prefix 2 -1
    assert (scores[2:] < scores[:2].min()).all()
    assert torch.isfinite(scores).all()


def test_eight_bits_are_half_a_step_away_at_most() -> None:
    vectors = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    steps = (vectors.max(dim=0).values - vectors.min(dim=0).values) / 255
    assert ((study_semantic_ids.eight_bits(vectors) - vectors).abs() <= steps / 2 + 1e-6).all()


def test_the_tables_have_a_row_for_each_length_and_beam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = small_experiment(tmp_path)
    changes = {
        "cache_dir": experiment.cache_dir,
        "backbone.source": experiment.backbone.source,
        "text.max_tokens": 32,
        "runtime.precision": "float32",
    }
    changed = ["--set", *(f"{key}={value}" for key, value in changes.items())]
    short = ["--levels", "1", "3", "--beams", "2", "--users", "20"]
    study_semantic_ids.main([str(Path(experiment.domains.root) / "beauty"), *short, *changed])
    study_semantic_ids.main(["--num-items", "600", *short, *changed])
    rows = [line.partition(" | ")[0] for line in capsys.readouterr().out.splitlines() if " | " in line]
    of_each = ["row", "exact", "8 bits a value", "1 codes", "3 codes", "3 codes, 2 beams"]
    assert rows == [*of_each, *of_each]
