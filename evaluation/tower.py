"""A small tower trained by ourselves: pictures and captions of any data set in one space, in a minute or two.

Pictures go through a convolutional network, texts through a bag of their words and pairs of words (Joulin et
al. 2016, arXiv 1607.01759), and both learn to meet (Radford et al. 2021, arXiv 2103.00020). It learns from
training pictures only and never sees a generated one. Its limits: of the order of words it knows neighbours
only, of pictures what 64 pixels show; and its card says how well it finds pictures that it has not seen: no
score by it means more than that.

    tower = train_tower(pictures, captions, seed=0)
    save_tower(tower, Path("tower")); tower = load_tower(Path("tower"))
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.features import check_pictures, sized
from evaluation.kept import data_sha256, keep, packed, read_kept
from evaluation.retrieval import TextImageTower, retrieve
from models.portions import Portions, one_thread

TOWER_VERSION = 1
RESOLUTION, DIM, BUCKETS, FEATURES = 64, 64, 2**14, 96
#: Pictures of a training step, and at most so many held out.
_BATCH, _HELD_OUT = 128, 1_000
#: Rows of a portion, and pixels by which a training picture is moved at most.
_ROWS, _SHIFT = 32, 3
_NAME = "tower"


@dataclass(frozen=True)
class TowerCard:
    """What is known of a tower.

    Args:
        seed: of its training.
        steps: of it, of 128 pairs each.
        pictures: that it learnt from.
        data: SHA-256 of the pictures and captions given.
        held_out: retrieval among pictures of the same data that it has not seen.
        version: of its construction.
    """

    seed: int
    steps: int
    pictures: int
    data: str
    held_out: dict[str, Any]
    version: int = TOWER_VERSION


class TowerNetworks(nn.Module):
    """The two networks and the scale of their products. Weights are drawn from `rng`."""

    def __init__(self, rng: torch.Generator, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for before, after in ((12, 2 * width), (2 * width, 3 * width), (3 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        # The place of things is kept, so that left and right are told apart.
        self.picture = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, DIM))
        self.words = nn.EmbeddingBag(BUCKETS, 2 * DIM, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(2 * DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM))
        self.log_scale = nn.Parameter(torch.tensor(2.7))  # CLIP's 1 / 0.07
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.words.weight, generator=rng)

    def pictures(self, images: Tensor) -> Tensor:
        """Unit vectors `[B D]` of images float32 `[B 3 64 64]` in [-1, 1]."""
        return F.normalize(self.picture(images))

    def texts(self, ids: Tensor) -> Tensor:
        """Unit vectors `[B D]` of word ids int64 `[B 96]`."""
        return F.normalize(self.text(self.words(ids)))


class SmallTower(TextImageTower):
    """A trained tower with its card."""

    def __init__(self, networks: TowerNetworks, card: TowerCard) -> None:
        networks.eval()
        super().__init__("small tower", hashlib.sha256(packed(networks)).hexdigest())
        self.networks = networks
        self.card = card
        self.portions = Portions()

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        check_pictures(pictures)
        if not len(pictures):
            return torch.empty(0, DIM)
        return self.portions(_ROWS, lambda part: self.networks.pictures(sized(part, RESOLUTION)), pictures)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, DIM)
        return self.portions(_ROWS, self.networks.texts, word_ids(texts))


def word_ids(texts: Sequence[str]) -> Tensor:
    """Ids int64 `[N 96]` in [0, 2^14) of the words and pairs of words of `texts`, without case; 0 is none."""
    rows = torch.zeros(len(texts), FEATURES, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        words = re.findall(r"\w+", text.casefold())
        pairs = [f"{one} {two}" for one, two in pairwise(words)]
        ids = [1 + zlib.crc32(each.encode()) % (BUCKETS - 1) for each in (*words, *pairs)][:FEATURES]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return rows


def train_tower(
    pictures: Tensor,
    captions: Sequence[str],
    seed: int = 0,
    steps: int = 600,
    progress: Callable[[int], None] | None = None,
) -> SmallTower:
    """A tower trained on pairs of training `pictures` uint8 `[N 3 H W]` and their `captions`.

    A tenth of them, at most 1,000, are held out for its card. Deterministic for a seed, on one thread.
    `progress` is called with the steps done.

    Raises:
        ValueError: fewer than 32 pairs, other numbers of pictures and captions, or no steps.
    """
    check_pictures(pictures)
    N = len(pictures)
    if len(captions) != N or N < 32 or steps < 1:
        raise ValueError(
            f"train_tower: {N} pictures, {len(captions)} captions, {steps} steps; give at least 32 pairs"
        )
    data = data_sha256(pictures, list(captions))
    rng = torch.Generator().manual_seed(seed)
    held_out, learnt = torch.randperm(N, generator=rng).split([(out := min(N // 10, _HELD_OUT)), N - out])
    with torch.random.fork_rng(devices=[]), one_thread():
        networks = TowerNetworks(rng)
        _fit(networks, pictures[learnt], [captions[k] for k in learnt.tolist()], steps, rng, progress)
        card = TowerCard(seed, steps, len(learnt), data, {})
        tower = SmallTower(networks, card)
        texts = [captions[k] for k in held_out.tolist()]
        found = retrieve(tower.embed_pictures(pictures[held_out]), tower.embed_texts(texts), texts)
    return SmallTower(networks, TowerCard(seed, steps, len(learnt), data, asdict(found)))


def _fit(
    networks: TowerNetworks,
    pictures: Tensor,
    captions: Sequence[str],
    steps: int,
    rng: torch.Generator,
    progress: Callable[[int], None] | None,
) -> None:
    images = torch.cat([sized(part, RESOLUTION) for part in pictures.split(_BATCH)])
    images = F.pad(images, (_SHIFT,) * 4, mode="replicate")
    ids = word_ids(captions)
    same = torch.tensor([*map({text: k for k, text in enumerate(captions)}.__getitem__, captions)])
    optimizer = torch.optim.AdamW(networks.parameters(), lr=2e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    networks.train()
    for step in range(steps):
        rows = torch.randperm(len(images), generator=rng)[:_BATCH]
        loss = _loss(networks, _moved(images[rows], rng), ids[rows], same[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if progress is not None:
            progress(step + 1)


def _loss(networks: TowerNetworks, images: Tensor, ids: Tensor, same: Tensor) -> Tensor:
    """CLIP's cross-entropy both ways, a scalar; pairs with equal captions are no error, but share the target.

    Source: Yang et al. 2022 (arXiv 2204.03610), eq. 2 and 3.
    """
    logits = networks.pictures(images) @ networks.texts(ids).T * networks.log_scale.clamp(max=4.6).exp()
    targets = (same[:, None] == same).float()
    targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _moved(padded: Tensor, rng: torch.Generator) -> Tensor:
    """A crop of the padded images, each a little brighter or darker; not mirrored: captions may say left."""
    down, across = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=rng).tolist()
    gain = 1 + 0.1 * torch.randn(len(padded), 3, 1, 1, generator=rng)
    return padded[:, :, down : down + RESOLUTION, across : across + RESOLUTION] * gain


def save_tower(tower: SmallTower, folder: Path) -> None:
    """Writes `tower.safetensors`, then `tower.json` with its card and the weights' SHA-256, into `folder`."""
    keep(folder, _NAME, tower.networks, asdict(tower.card))


def load_tower(folder: Path) -> SmallTower:
    """The tower saved in `folder`.

    Raises:
        CheckpointError: a file is missing or damaged, or of another version.
    """
    card, networks = read_kept(
        folder, _NAME, TowerCard, TOWER_VERSION, lambda _: TowerNetworks(torch.Generator())
    )
    assert isinstance(networks, TowerNetworks)
    return SmallTower(networks, card)
