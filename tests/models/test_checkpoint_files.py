"""Single files of weights, and the fingerprint of weights."""

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import CheckpointError, fingerprint, load_single_file, save_single_file

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_a_single_file_comes_back_with_its_metadata(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "model.safetensors"
    save_single_file(path, {"a": tied, "b": tied.T}, {"format": "x", "config": "{}"})
    tensors, metadata, sha256 = load_single_file(path)
    assert torch.equal(tensors["a"], tied)
    assert torch.equal(tensors["b"], tied.T)
    assert metadata == {"format": "x", "config": "{}"}
    assert len(sha256) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [cut, empty, Path.unlink, a_folder])
def test_a_harmed_single_file_is_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(path, {"a": torch.zeros(3)}, {})
    harm(path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_single_file(path)


def test_a_single_file_is_replaced_whole_or_not_at_all(tmp_path: Path, kit: Any) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(path, {"a": torch.zeros(3)}, {})
    before = path.read_bytes()
    for k in range(1, 100):
        error = OSError(errno.ENOSPC, "No space left on device")
        with kit.failing_at(k, error) as calls, suppress(OSError):
            save_single_file(path, {"a": torch.ones(3)}, {})
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        found = load_single_file(path)[0]["a"]
        assert torch.equal(found, torch.zeros(3)) or torch.equal(found, torch.ones(3))
        if len(calls) < k:
            break
        path.write_bytes(before)
    assert k > 2


def test_the_fingerprint_changes_with_any_weight(rng: torch.Generator) -> None:
    tensors = {
        "a": torch.randn(2, 3, generator=rng),
        "b": torch.randn(4, generator=rng).to(torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(7),
    }
    seen = {fingerprint(tensors)}
    changes = 0
    for name, tensor in tensors.items():
        for i in range(tensor.numel()):
            changed = tensor.clone()
            flat = changed.view(-1)
            flat[i] = ~flat[i] if tensor.dtype is torch.bool else flat[i] + 1
            seen.add(fingerprint({**tensors, name: changed}))
            changes += 1
    others = [
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {**tensors, "c": torch.zeros(0)},
        {"A" if k == "a" else k: v for k, v in tensors.items()},
        {k: v for k, v in tensors.items() if k != "step"},
        {**tensors, "a": tensors["b"], "b": tensors["a"]},
    ]
    seen |= {fingerprint(other) for other in others}
    assert len(seen) == 1 + changes + len(others)


def test_the_fingerprint_depends_on_values_alone(rng: torch.Generator) -> None:
    images = torch.randn(2, 3, 4, 5, generator=rng)
    plain = {"a": images, "b": torch.ones(2)}
    assert fingerprint(plain) == fingerprint({"b": torch.ones(2), "a": images})
    assert fingerprint(plain) == fingerprint({**plain, "a": images.to(memory_format=torch.channels_last)})
    assert fingerprint(plain) == fingerprint({**plain, "a": images.clone().requires_grad_()})
