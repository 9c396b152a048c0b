"""What a PEFT folder holds: factors beyond float32, and modules that its configuration names and its file lacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.encoder.peft.contents import TENSOR_FILE
from fedmerge.encoder.peft.folder import read_adapter, read_verified, write_adapter
from fedmerge.encoder.peft.names import unmatched_targets
from fedmerge.errors import LayoutMismatchError, MergeError
from fedmerge.merging.folders.reading import read_folders
from fedmerge.merging.training_free import merge_adapters

RANK, WIDTH_IN, WIDTH_OUT = 3, 5, 4


def write_float64(folder: Path, powers_of_A: list[float], powers_of_B: list[float], seed: int = 0) -> torch.Tensor:
    """Write rows of A and columns of B times powers of ten; return Δ without the powers, float64."""
    rng = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(RANK, WIDTH_IN, generator=rng, dtype=torch.float64)
    lora_B = torch.randn(WIDTH_OUT, RANK, generator=rng, dtype=torch.float64)
    write_adapter(Adapter({"q": LoraModule(lora_A.float(), lora_B.float(), 1.5)}), folder, "base")
    of_A, of_B = (torch.tensor([10.0], dtype=torch.float64) ** torch.tensor(p) for p in (powers_of_A, powers_of_B))
    factors = {"A": (lora_A * of_A[:, None]).contiguous(), "B": (lora_B * of_B).contiguous()}
    save_file({f"base_model.model.q.lora_{part}.weight": each for part, each in factors.items()}, folder / TENSOR_FILE)
    return 1.5 * lora_B @ lora_A


@pytest.mark.parametrize(
    ("powers_of_A", "powers_of_B"),
    [
        ([60.0] * 3, [-60.0] * 3),
        ([-300.0] * 3, [300.0] * 3),
        ([37.0, 40.0, 39.0], [-37.0, -40.0, -39.0]),
        ([60.0, -60.0, 0.0], [-60.0, 60.0, 0.0]),  # each row in another direction
        ([-36.0] * 3, [36.0] * 3),  # small numbers of which float32 would keep few digits
    ],
)
def test_factors_beyond_float32_are_balanced(
    powers_of_A: list[float], powers_of_B: list[float], tmp_path: Path
) -> None:
    expected = write_float64(tmp_path / "a", powers_of_A, powers_of_B)
    (module,) = read_verified(tmp_path / "a").modules.values()
    torch.testing.assert_close(module.delta_weight().double(), expected, atol=1e-6, rtol=1e-5)
    other = write_float64(tmp_path / "b", [0.0] * 3, [0.0] * 3, seed=1)
    merged = merge_adapters(read_folders({name: tmp_path / name for name in "ab"}).adapters, "average").adapter
    torch.testing.assert_close(
        merged.modules["q"].delta_weight().double(), (expected + other) / 2, atol=1e-6, rtol=1e-5
    )


def test_a_large_factor_beside_one_of_zero_is_an_update_of_zero(tmp_path: Path) -> None:
    write_float64(tmp_path, [60.0] * 3, [-400.0] * 3)  # 10^-400 is 0
    (module,) = read_verified(tmp_path).modules.values()
    assert not module.delta_weight().any()


def test_a_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_float64(tmp_path / name, [60.0] * 3, [0.0] * 3)
    with pytest.raises(MergeError, match="its update is not finite in float32"):
        merge_adapters(read_folders({name: tmp_path / name for name in "ab"}).adapters, "average")


def test_factors_that_float32_holds_are_rounded_as_they_are(tmp_path: Path) -> None:
    write_float64(tmp_path, [20.0, 25.0, 0.0], [-20.0, 3.0, 1.0])
    tensors = load_file(tmp_path / TENSOR_FILE)
    lora_A, lora_B = (tensors[f"base_model.model.q.lora_{part}.weight"].float() for part in "AB")
    expected = adapter_sha256(Adapter({"q": LoraModule(lora_A, lora_B, 1.5)}))
    assert adapter_sha256(read_adapter(tmp_path)) == expected


def test_a_factor_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write_float64(tmp_path, [60.0, 0.0, 0.0], [-60.0, 0.0, 400.0])
    with pytest.raises(LayoutMismatchError, match="are NaN or infinite"):
        read_verified(tmp_path)


HELD = ("enc.0.proj", "enc.1.proj", "score")
TARGETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "all held": ({"target_modules": ["proj", "score"]}, ()),
    "one is not": ({"target_modules": ["proj", "v", "query"]}, ("query", "v")),
    "whole names": ({"target_modules": ["enc.0.proj", "enc.2.proj"]}, ("enc.2.proj",)),
    "part of a name": ({"target_modules": ["roj"]}, ("roj",)),
    "excluded": ({"target_modules": ["proj", "v"], "exclude_modules": ["v"]}, ()),
    "saved whole": ({"target_modules": ["proj", "v"], "modules_to_save": ["v"]}, ()),
    "of one layer": ({"target_modules": ["proj", "v"], "layers_to_transform": [1]}, ("v",)),
    "a pattern": ({"target_modules": r".*(proj|v)"}, ()),
    "all linear": ({"target_modules": "all-linear"}, ()),
    "not said": ({"target_modules": None}, ()),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_without_a_module(kind: str) -> None:
    config, expected = TARGETS[kind]
    assert unmatched_targets(config, HELD) == expected
