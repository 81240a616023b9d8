"""Plain webdataset, as its documentation has it: Pillow, its own shuffle and collation, torch's DataLoader.

The stages are those that `WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil")
.to_tuple("jpg", "txt").map_tuple(transform).batched(64)` puts together, but for the opening of files, which
is `open`: webdataset's own opener can run commands, which no source of this project uses. In its favour only
the fields that are used are decoded, captions stay text, and pixels stay bytes, a quarter of the traffic of
the usual floats. Used by `scripts.benches.loader`.
"""

import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset.filters import pipelinefilter
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.index import IMAGE_FIELDS
from scripts.benches.loader_arms import BATCH, process_context
from scripts.benches.measuring import Arm

SHUFFLE = 1000  # samples in the buffer, webdataset's default


def plain(shards: list[Path], side: int, images: int, workers: int) -> Arm:
    """Returns the arm, `images` a round in batches of 64 from as many processes.

    Raises ValueError where there are fewer shards than processes, as each reads its own.
    """
    if len(shards) < workers:
        raise ValueError(
            f"{len(shards)} shards for workers={workers}: webdataset gives each whole ones; lower workers"
        )
    loader: DataLoader[Any] = DataLoader(
        batches(shards, side).with_epoch(nbatches=images // BATCH // workers),
        batch_size=None,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context=process_context(),
        generator=torch.Generator().manual_seed(0),
    )
    processes: list[BaseProcess] = []

    def run() -> int:
        before = set(multiprocessing.active_children())
        found = iter(loader)
        if not processes:
            processes.extend(each for each in multiprocessing.active_children() if each not in before)
        return sum(len(pixels) for pixels, _ in found)

    def close() -> None:
        for process in processes:
            process.kill()

    return Arm("plain", run, lambda: [process.pid or 0 for process in processes], close)


def batches(shards: list[Path], side: int) -> Any:
    """Returns batches of (uint8 [64 3 side side], 64 captions) without end, pass after pass."""
    # To repeat the whole would end each pass in a batch of what is left.
    return webdataset.DataPipeline(samples(shards, side).repeat(), webdataset.batched(BATCH))


def samples(shards: list[Path], side: int) -> Any:
    """Returns one pass over (uint8 [3 side side], caption) of this process's shards."""
    return webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path) for path in shards]),
        webdataset.split_by_worker,
        webdataset.shuffle(len(shards)),
        opened,
        pipelinefilter(tar_file_expander)(),
        pipelinefilter(group_by_keys)(),
        webdataset.shuffle(SHUFFLE),
        webdataset.decode("pil", only=[*IMAGE_FIELDS, "txt"], handler=webdataset.ignore_and_continue),
        webdataset.to_tuple(";".join(IMAGE_FIELDS), "txt", handler=webdataset.ignore_and_continue),
        webdataset.map_tuple(Transform(side)),
    )


def opened(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the shards opened, one at a time."""
    for source in sources:
        with Path(source["url"]).open("rb") as stream:
            yield {**source, "stream": stream}


class Transform:
    """Resizes the short side by Pillow's antialiased bicubic filter, crops the centre: uint8 [3 H W]."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the pixels of an RGB picture."""
        scale = self.side / min(image.size)
        width, height = (max(self.side, round(length * scale)) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
