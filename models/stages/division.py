"""How a global batch is cut: into the ranks' shares, and a share into micro-batches.

What is learnt is a function of the global batch alone: the same samples, noise, times and learning rate for
any number of ranks and micro-batches. Use: `divide("plan.diffusion", 64, ranks=2, options)`.
"""

from dataclasses import dataclass

from models.registry import ConfigError
from models.stages.compute import Reduce, TrainerOptions

#: Micro-batches of a global batch under `Reduce.tree` where nothing else is said: 1, 2, 4 or 8 ranks.
_LEAVES = 8


@dataclass(frozen=True)
class Division:
    """A global batch of `batch_size` images on `ranks`, each of which computes `parts` micro-batches."""

    batch_size: int
    ranks: int = 1
    parts: int = 1

    @property
    def micro_batch(self) -> int:
        """Images that are computed at once."""
        return self.batch_size // (self.ranks * self.parts)

    def __str__(self) -> str:
        shares = f", on {self.ranks} ranks" if self.ranks > 1 else ""
        parts = f", in {self.parts} micro-batches of {self.micro_batch}" if self.parts > 1 else ""
        return f"{self.batch_size} images{shares}{parts}{' each' if shares and parts else ''}"


def divide(label: str, batch_size: int, ranks: int, options: TrainerOptions) -> Division:
    """The division of a stage's global batch.

    Args:
        label: of the stage's plan, for messages.
        batch_size: images of the global batch.
        ranks: that share it.
        options: what the user fixed.

    Raises:
        ConfigError: it does not divide; the message names the numbers and the nearest that work.
    """
    if batch_size % ranks:
        raise ConfigError(
            f"{label}.batch_size is {batch_size}, the batch of all ranks, but does not divide by {ranks} "
            f"ranks; give {_multiples(ranks, batch_size)}, or train on {_divisors(batch_size, ranks)} ranks"
        )
    share, accumulate = batch_size // ranks, options.accumulate
    if share % accumulate:
        raise ConfigError(
            f"trainer.accumulate is {accumulate}, but a rank's share of {label}.batch_size={batch_size} is "
            f"{share} images, which do not divide by it; give {_divisors(share, accumulate)}"
        )
    if options.reduce is Reduce.fast:
        return Division(batch_size, ranks, accumulate)
    leaf = _leaf(label, batch_size, options)
    leaves = batch_size // leaf
    if leaves % ranks:
        works = ", ".join(str(2**k) for k in range(leaves.bit_length()))
        raise ConfigError(
            f"trainer.reduce=tree adds up {leaves} micro-batches of {leaf} images ({label}.batch_size="
            f"{batch_size}), which works on {works} ranks and not on {ranks}; give another number of ranks, "
            "a smaller trainer.micro_batch, or trainer.reduce=fast"
        )
    most = share // accumulate
    if leaf > most:
        fits = max(size for size in _leaves(batch_size) if size <= most)
        raise ConfigError(
            f"trainer.accumulate is {accumulate}, so that at most {most} of {label}.batch_size={batch_size} "
            f"images are computed at once, but trainer.reduce=tree computes micro-batches of {leaf}; set "
            f"trainer.micro_batch={fits}, or leave out trainer.accumulate"
        )
    return Division(batch_size, ranks, leaves // ranks)


def _leaf(label: str, batch_size: int, options: TrainerOptions) -> int:
    """Images of a micro-batch under `Reduce.tree`, of which a power of two make the global batch."""
    possible = _leaves(batch_size)
    if options.micro_batch == 0:
        return min(leaf for leaf in possible if batch_size // leaf <= _LEAVES)
    if options.micro_batch not in possible:
        raise ConfigError(
            f"trainer.micro_batch is {options.micro_batch}, but for trainer.reduce=tree 1, 2, 4, ... of them "
            f"must make {label}.batch_size={batch_size}; give {_nearest(possible, options.micro_batch)}"
        )
    return options.micro_batch


def _leaves(batch_size: int) -> list[int]:
    """The sizes of which a power of two make the global batch."""
    return [batch_size // 2**k for k in range(batch_size.bit_length()) if batch_size % 2**k == 0]


def _multiples(of: int, near: int) -> str:
    below = near // of * of
    return f"{below} or {below + of}" if below else str(of)


def _divisors(of: int, near: int) -> str:
    return _nearest([n for n in range(1, of + 1) if of % n == 0], near)


def _nearest(possible: list[int], near: int) -> str:
    """The next number below and the next above, of those that are possible."""
    below = max((n for n in possible if n < near), default=None)
    above = min((n for n in possible if n > near), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)
