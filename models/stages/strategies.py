"""How the ranks share a stage's work: Lightning's strategy and trainer for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from models.stages.compute import Reduce
from models.stages.ranks import Ranks
from models.stages.sharded import Sharding
from models.stages.stage import Stage


def make_trainer(
    ranks: Ranks, stage: Stage, reduce: Reduce, logger: Logger | bool, callbacks: list[Callback]
) -> Trainer:
    """A trainer of one pass over the data, whose every habit of its own is switched off.

    Args:
        ranks: that train together.
        stage: what is trained, and how it is spread over them.
        reduce: who adds up the gradients of the ranks: the strategy, or the project's own tree (reduce.py),
            of which Lightning knows nothing and sees one process.
        logger: besides `metrics.jsonl`; False on all ranks but the first.
        callbacks: in the order in which they are called.
    """
    device = stage.compute.device
    together = ranks if reduce is Reduce.fast else Ranks.alone()
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        strategy=make_strategy(together, device, stage.sharding),
        devices=together.local_size,
        num_nodes=together.size // together.local_size,
        plugins=[TorchElasticEnvironment() if together.size > 1 else LightningEnvironment()],
        max_epochs=1,
        precision="32-true",  # autocast is the stage's own, so that probes and pictures compute alike
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer._signal_connector = _OwnSignals(trainer)
    return trainer


def make_strategy(ranks: Ranks, device: torch.device, sharding: Sharding | None) -> Strategy:
    """How the ranks exchange gradients; one rank alone exchanges none."""
    if ranks.size == 1:
        return SingleDeviceStrategy(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    strategy: DDPStrategy | ModelParallelStrategy
    if sharding is None:
        # Where unused parameters are looked for, gradients are summed in one order from the first step on,
        # else in another after it, and a resumed run of more than two ranks would differ in the last bits.
        strategy = DDPStrategy(
            process_group_backend=backend, find_unused_parameters=ranks.size > 2, broadcast_buffers=False
        )
    else:
        # It leaves the model to the stage's `configure_model`; its mesh and the names of that are not used.
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks.size // sharding.shards,
            tensor_parallel_size=sharding.shards,
            process_group_backend=backend,
        )
    strategy.parallel_devices = (
        [torch.device("cuda", i) for i in range(ranks.local_size)]
        if device.type == "cuda"
        else [torch.device("cpu")] * ranks.local_size
    )
    return strategy


@contextmanager
def without_exchange(strategy: Strategy) -> Iterator[None]:
    """Backward passes within it keep their gradients to this rank; the next one exchanges them too."""
    if isinstance(strategy, DDPStrategy):
        with strategy.block_backward_sync():
            yield
    else:
        yield


class _OwnSignals(_SignalConnector):
    """Lightning's place for signal handlers, left empty: its own exchange data inside a handler, which hangs.

    It has no option for that; a test looks whether it still asks here.
    """

    def register_signal_handlers(self) -> None:
        """Registers none."""
