"""Tensors of a checkpoint that several ranks wrote: each a file of its own rows; a layout joins them.

    weights-00000-of-00002.safetensors  weights-00001-of-00002.safetensors      and so for each name
    layout.json   {"shards": 2, "tensors": {"weights": {"conv.weight": {"shape": [..], "rows": [0, 4, 8]}}}}

Shard s holds the rows [rows[s], rows[s+1]) of a tensor, along its first dimension; a tensor without `rows` is
whole in the first file. Read through `models.checkpoint.Checkpoint`, which has verified every file: a tensor
at a time, or of each tensor only the rows that are wanted, whatever the number of shards.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

LAYOUT = "layout"
Shape = tuple[int, ...]


def shard_rows(length: int, shards: int) -> list[int]:
    """The `shards` + 1 boundaries by which `length` rows are shared out, as `torch.chunk` and FSDP do it."""
    size = -(-length // shards)
    return [min(shard * size, length) for shard in range(shards + 1)]


def shard_file(name: str, shard: int, shards: int) -> str:
    """The file name of one shard of the tensors called `name`."""
    return f"{name}-{shard:05d}-of-{shards:05d}.safetensors"


def layout(shapes: Mapping[str, Mapping[str, Shape]], whole: Mapping[str, set[str]], shards: int) -> Any:
    """The content of `layout.json`.

    Args:
        shapes: name -> key -> shape of the whole tensor.
        whole: name -> keys that are not shared out.
        shards: how many files there are of each name.
    """
    return {
        "shards": shards,
        "tensors": {
            name: {
                key: {"shape": list(shape)}
                | ({} if key in whole[name] else {"rows": shard_rows(shape[0], shards)})
                for key, shape in keys.items()
            }
            for name, keys in shapes.items()
        },
    }


class StoredTensors:
    """Named tensors in one file, or in those of several shards, of which any rows can be read.

    Args:
        folder: of the checkpoint.
        name: of the tensors.
        layout: the content of `layout.json`; None where the tensors lie in one file.

    Raises:
        SafetensorError: a file is of another format.
        OSError: a file cannot be read.
        ValueError: the layout is none of such tensors.
    """

    def __init__(self, folder: Path, name: str, layout: Mapping[str, Any] | None) -> None:
        self._rows: dict[str, list[int]] = {}
        if layout is None:
            self._files = [safe_open(folder / f"{name}.safetensors", framework="pt")]
            #: The shape of each whole tensor.
            self.shapes: dict[str, Shape] = {
                key: tuple(self._files[0].get_slice(key).get_shape()) for key in list(self._files[0].keys())
            }
            return
        try:
            shards = int(layout["shards"])
            entries = layout["tensors"][name]
            self.shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
            self._rows = {key: list(entry["rows"]) for key, entry in entries.items() if "rows" in entry}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{LAYOUT}.json does not describe {name} ({error!r})") from None
        self._files = [safe_open(folder / shard_file(name, s, shards), framework="pt") for s in range(shards)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def whole(self, key: str) -> Tensor:
        """The tensor called `key`, on the CPU."""
        if key not in self._rows:
            return self._files[0].get_tensor(key)
        return self.rows(key, 0, self.shapes[key][0])

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of the tensor called `key`, on the CPU."""
        if key not in self._rows:
            return self._files[0].get_slice(key)[start:stop]
        edges = self._rows[key]
        parts: list[Tensor] = []
        for file, first, last in zip(self._files, edges, edges[1:], strict=False):
            low, high = max(start, first), min(stop, last)
            if low < high or (first < last and not parts and start >= stop):
                parts.append(file.get_slice(key)[low - first : max(high, low) - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
