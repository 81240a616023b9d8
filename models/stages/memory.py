"""What to say when memory runs out: how much there was, what took most of it, and what helps, best first."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class OutOfMemory(OSError):  # noqa: N818 - named as torch names its own
    """The device's memory does not suffice for a training step."""


@contextmanager
def out_of_memory(stage: str, device: torch.device) -> Iterator[None]:
    """Turns torch's errors about memory into one line with peak, largest tensors and remedies.

    Raises:
        OutOfMemory: in their place; the step was not applied.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_explain(stage, device)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no type of its own
            raise
        raise OutOfMemory(_explain(stage, device)) from error


def _explain(stage: str, device: torch.device) -> str:
    if device.type == "cuda":
        peak = f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at the peak"
        extra = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, "
    else:
        peak = extra = ""
    tensors = ", ".join(
        f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} {t.nbytes / 2**20:.0f} MiB"
        for t in _largest(3)
    )
    return (
        f"stage {stage}: out of memory on {device.type}{peak}; the largest tensors: {tensors}; in order: "
        f"raise trainer.accumulate, lower plan.{stage}.batch_size, use trainer.precision=bf16, {extra}"
        "lower data.resolution, or choose a smaller backbone; "
        "the step was not applied: continue with resume=true"
    )


def _largest(count: int) -> list[Tensor]:
    with warnings.catch_warnings():  # looking at every object wakes deprecated ones
        warnings.simplefilter("ignore")
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]
    return sorted(tensors, key=lambda tensor: tensor.nbytes, reverse=True)[:count]
