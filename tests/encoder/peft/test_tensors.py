"""Tensors of safetensors files: found, read one at a time, and written as the library writes them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.encoder.peft.tensors import bytes_of, find_tensors, read_tensor, write_tensors
from fedmerge.errors import LayoutMismatchError

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    kinds = {"a-b.weight": (3, 5), "a.weight": (2, 2), 'é "x"\\\n': (7,), "one": (), "none": (0, 4)}
    return {
        f"{name} {number}": torch.randint(0, 2, shape, generator=rng).to(dtype)
        for number, dtype in enumerate(TYPES)
        for name, shape in kinds.items()
    }


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and bytes_of(found) == bytes_of(expected)


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write_tensors(tmp_path / "found", tensors)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    found = find_tensors(tmp_path / "found")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(read_tensor(found[name]), tensor), name


def test_a_transposed_tensor_is_written_by_rows(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "file", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "file")["x"], tensor)


def test_values_that_begin_at_any_byte_are_read(tmp_path: Path) -> None:
    text = b'{"x":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}'
    values = torch.tensor([1.5, -2.5], dtype=torch.float64)
    for padding in range(8):
        data = text + b" " * padding
        (tmp_path / "file").write_bytes(len(data).to_bytes(8, "little") + data + bytes(bytes_of(values)))
        assert same(read_tensor(find_tensors(tmp_path / "file")["x"]), values)


def test_what_is_written_to_a_tensor_does_not_reach_its_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"x": torch.ones(3)})
    found = find_tensors(tmp_path / "file")
    read_tensor(found["x"]).mul_(2)
    assert torch.equal(read_tensor(found["x"]), torch.ones(3))


def test_files_that_change_or_are_damaged_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_tensors(file, {"x": torch.ones(3)})
    found = find_tensors(file)
    os.utime(file, ns=(0, 0))
    with pytest.raises(OSError, match="changed while it was read"):
        read_tensor(found["x"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        find_tensors(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        find_tensors(file)


@pytest.mark.parametrize(("kind", "said"), [("I32", "torch.int32"), ("C64", "of a type unknown here")])
def test_a_type_that_is_no_float_is_refused_by_its_tensor(kind: str, said: str, tmp_path: Path) -> None:
    text = f'{{"base_model.model.x.lora_A.weight":{{"dtype":"{kind}","shape":[1],"data_offsets":[0,8]}}}}'
    text = text.replace("8]", "4]") if kind == "I32" else text
    data = text.encode() + bytes(4 if kind == "I32" else 8)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + data)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    with pytest.raises(LayoutMismatchError, match=rf"tensor 'base_model.*lora_A\.weight' is {said}, expected floating"):
        read_adapter(tmp_path)
