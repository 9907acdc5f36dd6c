"""The linear merge against NumPy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seodang.errors import InputError
from seodang.foundation.post_training.merge import INDEX, merge_linear


def model(path: Path, seed: int, **other: torch.Tensor) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
        "steps": torch.arange(4),
    }
    save_file(tensors | other, path / "model.safetensors")
    return path


def test_average(tmp_path: Path) -> None:
    one, two = model(tmp_path / "1", 1), model(tmp_path / "2", 2)
    merge_linear({one: 0.8, two: 0.2}, out := tmp_path)
    found, a, b = (load_file(d / "model.safetensors") for d in (out, one, two))
    expected = 0.8 * a["a"].double().numpy() + 0.2 * b["a"].double().numpy()
    np.testing.assert_array_equal(found["a"].numpy(), expected.astype(np.float32))
    assert found["b"].dtype == torch.bfloat16
    torch.testing.assert_close(
        found["b"], (0.8 * a["b"].double() + 0.2 * b["b"].double()).bfloat16()
    )
    assert torch.equal(found["steps"], torch.arange(4))


def test_ends_of_the_line(tmp_path: Path) -> None:
    one, two = model(tmp_path / "1", 1), model(tmp_path / "2", 2)
    merge_linear({one: 1.0, two: 0.0}, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.equal(found[name], tensor)


def test_shards_may_be_cut_elsewhere(tmp_path: Path) -> None:
    one, two = model(tmp_path / "1", 1), model(tmp_path / "2", 2)
    tensors = load_file(one / "model.safetensors")
    (one / "model.safetensors").unlink()
    parts = {"x.safetensors": ["a"], "y.safetensors": ["b", "steps"]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, one / file)
    where = {name: file for file, names in parts.items() for name in names}
    (one / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    merge_linear({one: 0.5, two: 0.5}, tmp_path)
    merged = load_file(tmp_path / "x.safetensors") | load_file(tmp_path / "y.safetensors")
    other = load_file(two / "model.safetensors")
    torch.testing.assert_close(merged["a"], (tensors["a"] + other["a"]) / 2)
    assert json.loads((tmp_path / INDEX).read_bytes())["weight_map"] == where


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    one = model(tmp_path / "1", 1)
    with pytest.raises(ValueError, match="add up to 1"):
        merge_linear({one: 0.8, tmp_path: 0.3}, tmp_path)
    more = model(tmp_path / "2", 2, c=torch.zeros(1))
    with pytest.raises(InputError, match="only one of them has c"):
        merge_linear({one: 0.5, more: 0.5}, tmp_path)
    wide = model(tmp_path / "3", 3, a=torch.zeros(7, 6))
    with pytest.raises(InputError, match=r"3: a has the shape \(7, 6\), elsewhere it is \(7, 5\)"):
        merge_linear({one: 0.5, wide: 0.5}, tmp_path)
    later = model(tmp_path / "4", 4, steps=torch.ones(4, dtype=torch.int64))
    with pytest.raises(InputError, match="steps differs between the models"):
        merge_linear({one: 0.5, later: 0.5}, tmp_path)
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        merge_linear({tmp_path / "none": 1.0}, tmp_path)
