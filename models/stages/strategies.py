"""How the ranks share a stage's work: Lightning's strategy and trainer for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from models.stages.compute import Reduce
from models.stages.ranks import Ranks


def make_trainer(
    ranks: Ranks, device: torch.device, reduce: Reduce, logger: Logger | bool, callbacks: list[Callback]
) -> Trainer:
    """A trainer of one pass over the data, whose every habit of its own is switched off.

    Args:
        ranks: that train together.
        device: what the networks compute on.
        reduce: who adds up the gradients of the ranks: the strategy, or the project's own tree (reduce.py),
            of which Lightning knows nothing and sees one process.
        logger: besides `metrics.jsonl`; False on all ranks but the first.
        callbacks: in the order in which they are called.
    """
    together = ranks if reduce is Reduce.fast else Ranks.alone()
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        strategy=make_strategy(together, device),
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


def make_strategy(ranks: Ranks, device: torch.device) -> Strategy:
    """How the ranks exchange gradients; one rank alone exchanges none."""
    if ranks.size == 1:
        return SingleDeviceStrategy(device)
    # Where unused parameters are looked for, gradients are summed in one order from the first step on,
    # else in another after it, and a resumed run of more than two ranks would differ in the last bits.
    return DDPStrategy(
        parallel_devices=[torch.device(device.type, i) for i in range(ranks.local_size)]
        if device.type == "cuda"
        else [torch.device("cpu")] * ranks.local_size,
        process_group_backend="gloo" if device.type == "cpu" else "nccl",
        find_unused_parameters=ranks.size > 2,
        broadcast_buffers=False,
    )


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
