"""How the ranks share a stage's work: Lightning's strategy and trainer for it."""

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from models.stages.ranks import Ranks


def make_trainer(
    ranks: Ranks, device: torch.device, logger: Logger | bool, callbacks: list[Callback]
) -> Trainer:
    """A trainer of one pass over the data, whose every habit of its own is switched off.

    Args:
        ranks: that train together.
        device: what the networks compute on.
        logger: besides `metrics.jsonl`; False on all ranks but the first.
        callbacks: in the order in which they are called.
    """
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        strategy=make_strategy(ranks, device),
        devices=ranks.local_size if ranks.size > 1 else 1,
        num_nodes=ranks.size // ranks.local_size,
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
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="gloo" if device.type == "cpu" else "nccl",
        find_unused_parameters=ranks.size > 2,
        broadcast_buffers=False,
    )


class _OwnSignals(_SignalConnector):
    """Lightning's place for signal handlers, left empty: its own exchange data inside a handler, which hangs.

    It has no option for that; a test looks whether it still asks here.
    """

    def register_signal_handlers(self) -> None:
        """Registers none."""
