"""Does a picture show what its caption says? A small judge for the procedural landscapes.

The judge is a convolutional classifier of the four factors (time, terrain, light, sky). It never sees a
generated picture or the training set: it learns from renders of its own seeds in about half a minute on one
core, blurred, tinted and made a little noisy, so that a picture that came through an autoencoder is judged
by what it shows and not by its sharpness. It is independent of every network that it judges.

Its limits: it knows landscapes only and always gives an answer, so a picture of anything else is sorted into
some class; it measures whether the factors can be read, not whether the picture is good or varied; and its
own errors (see the held-out accuracies in its card) bound what a score can reach.

    judge, accuracies = train_judge(seed=0)
    save_judge(judge, Path("judge")); judge = load_judge(Path("judge"))
    score(judge, images, [factors(scene) for scene in scenes])["all"]
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from data.landscapes import FACTORS, LANDSCAPES_VERSION, draw_scene, factors, render
from data.shard_index import write_atomic
from models.portions import one_thread

JUDGE_VERSION = 1
RESOLUTION = 64
# Seeds of training and validation data are small numbers; the judge's own begin here, an even one for its
# training pictures and the odd one after it for its held-out pictures.
JUDGE_SEEDS = 2**48
_HELD_OUT = 1024
_BATCH = 128
_WEIGHTS, _CARD = "judge.safetensors", "judge.json"
_NAMES = {name: tuple(member.value for member in members) for name, members in FACTORS.items()}


class JudgeError(Exception):
    """A saved judge that is missing, damaged, or made for other landscapes."""


@dataclass(frozen=True)
class JudgeCard:
    """Returns what is known of a judge: its seed, pictures seen, and held-out accuracies in [0, 1]."""

    seed: int = 0
    images: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)
    judge_version: int = JUDGE_VERSION
    landscapes_version: int = LANDSCAPES_VERSION


class AdherenceJudge(nn.Module):
    """Returns the logits of the four factors, {name: [B K]}, for images float32 [B 3 H W] in [-1, 1].

    Images of another size are brought to 64 x 64 first (area average where larger). K is the number of
    members of the factor's enum, in its order.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        # Whole 2 x 2 blocks go in as channels: twice as fast as a convolution at full size, and no worse.
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for before, after, stride in (
            (12, 2 * width, 2),
            (2 * width, 3 * width, 2),
            (3 * width, 4 * width, 1),
        ):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        # The side of the light is a matter of columns, so the width is kept where the height is pooled.
        self.pool = nn.AvgPool2d((2, 1))
        self.hidden = nn.Linear(4 * width * 32, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(names)) for name, names in _NAMES.items()})
        self.width = width
        self.card = JudgeCard()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits {name: [B K]} of `images` float32 [B 3 H W] in [-1, 1]."""
        images = self._sized(images)
        hidden = F.relu(self._hidden(images))
        return {name: head(hidden) for name, head in self.heads.items()}

    def _hidden(self, images: Tensor) -> Tensor:
        return self.hidden(self.pool(self.features(images)).flatten(1))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features float32 [B 128] of `images` float32 [B 3 H W] in [-1, 1]: what the answers are made of."""
        self.eval()
        return torch.cat([self._hidden(self._sized(chunk.float())) for chunk in images.split(_BATCH)])

    @staticmethod
    def _sized(images: Tensor) -> Tensor:
        if images.shape[-2:] == (RESOLUTION, RESOLUTION):
            return images
        smaller = min(images.shape[-2:]) < RESOLUTION
        return F.interpolate(images, (RESOLUTION, RESOLUTION), mode="bilinear" if smaller else "area")

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """The probabilities {name: float32 [B K]} of the classes, for images float32 [B 3 H W] in [-1, 1]."""
        was_training = self.training
        self.eval()
        parts = [self(chunk.float()) for chunk in images.split(_BATCH)]
        self.train(was_training)
        return {name: torch.cat([part[name] for part in parts]).softmax(1) for name in _NAMES}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """The likeliest classes {name: int64 [B]}, numbered in the order of the factor's enum."""
        return {name: values.argmax(1) for name, values in self.probabilities(images).items()}


def score(judge: AdherenceJudge, images: Tensor, captions_factors: list[dict[str, str]]) -> dict[str, float]:
    """The shares in [0, 1] of pictures that show what was asked for: time, terrain, light, sky, and all four.

    `images` float32 [B 3 H W] in [-1, 1]; `captions_factors` one dict of the four factors for each, as
    `data.landscapes.factors` gives them. Raises ValueError where their numbers differ, there are none, or a
    factor is missing or unknown.
    """
    if len(captions_factors) != len(images) or not captions_factors:
        raise ValueError(
            f"score: {len(images)} images for {len(captions_factors)} captions; give one for each"
        )
    return _shares(judge, images, class_ids(captions_factors).to(images.device))


def class_ids(captions_factors: Sequence[Mapping[str, Any]]) -> Tensor:
    """The ids int64 [B 4] of what the records say, numbered in the order of each factor's enum.

    Raises ValueError where a factor is missing or unknown.
    """
    rows = []
    for number, values in enumerate(captions_factors):
        for name, names in _NAMES.items():
            if values.get(name) not in names:
                raise ValueError(
                    f"caption {number}: {name} is {values.get(name)!r}; it must be one of {names}"
                )
        rows.append([names.index(values[name]) for name, names in _NAMES.items()])
    return torch.tensor(rows, dtype=torch.int64)


class _Told:
    """Counts pictures rendered and learnt from, and tells the share done about a hundred times."""

    def __init__(self, total: int, progress: Callable[[float], None] | None) -> None:
        self.total, self.done, self.next = total, 0, 0.01
        self.progress = progress

    def add(self, pictures: int) -> None:
        self.done += pictures
        share = min(self.done / self.total, 1.0)
        if self.progress is not None and share >= self.next:
            self.progress(share)
            self.next = share + 0.01


def _rendered(seed: int, count: int, told: _Told) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [B 3 64 64] and class ids int64 [B 4] of scenes 0 to `count` - 1 of `seed`."""
    pixels = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8)
    wanted = []
    for index in range(count):
        scene = draw_scene(seed, index)
        pixels[index] = render(scene, RESOLUTION)
        wanted.append(factors(scene))
        told.add(1)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), class_ids(wanted)


def _signed(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1.0


class _Disturbance:
    """Makes of clean pictures what a mediocre generator might give: blurred, noisy, tinted, a little shifted.

    Never mirrored, and never shifted far enough (2 pixels) to change the side of the light. Noise is a window
    of one long draw: new noise for every batch would take a third of the training.
    """

    def __init__(self, rng: torch.Generator) -> None:
        self.rng = rng
        self.spare = 2**18
        self.noise = torch.rand(_BATCH * 3 * RESOLUTION**2 + self.spare, generator=rng).sub_(0.5)

    def __call__(self, padded: Tensor) -> Tensor:
        """Images float32 [B 3 64 64] in [-1, 1] from `padded` uint8 [B 3 68 68], pictures with a rim of 2."""
        B, rng = len(padded), self.rng
        across, down, start = (int(torch.randint(0, high, (), generator=rng)) for high in (5, 5, self.spare))
        images = padded[:, :, down : down + RESOLUTION, across : across + RESOLUTION].float()
        factor = (1, 2, 2, 4)[int(torch.randint(0, 4, (), generator=rng))]
        if factor > 1:
            soft = F.interpolate(F.avg_pool2d(images, factor), images.shape[-2:], mode="bilinear")
            images.lerp_(soft, torch.rand(B, 1, 1, 1, generator=rng))
        gain = (1.0 + 0.08 * torch.randn(B, 3, 1, 1, generator=rng)) / 127.5
        shift = 0.05 * torch.randn(B, 3, 1, 1, generator=rng) - 1.0
        amount = 0.2 * torch.rand(B, 1, 1, 1, generator=rng)
        noise = self.noise[start : start + images.numel()].view(images.shape)
        return images.mul_(gain).add_(shift).addcmul_(noise, amount).clamp_(-1.0, 1.0)


def _initialise(judge: AdherenceJudge, rng: torch.Generator) -> None:
    """Draws every weight from `rng` (He et al. 2015, arXiv 1502.01852), so that no global seed is needed."""
    for module in judge.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _loss(logits: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The cross-entropy of the four factors together, a scalar; `targets` int64 [B 4]."""
    losses = [
        F.cross_entropy(logits[name], targets[:, k], label_smoothing=0.02) for k, name in enumerate(_NAMES)
    ]
    return torch.stack(losses).sum()


def _fit(
    judge: AdherenceJudge, pixels: Tensor, targets: Tensor, epochs: int, rng: torch.Generator, told: _Told
) -> None:
    steps = epochs * (len(pixels) // _BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    disturb = _Disturbance(rng)
    padded = torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge"))
    judge.train().to(memory_format=torch.channels_last)  # a fifth faster here on a CPU
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < _BATCH:
            order = torch.randperm(len(pixels), generator=rng)
        rows, order = order[:_BATCH], order[_BATCH:]
        loss = _loss(
            judge(disturb(padded[rows]).contiguous(memory_format=torch.channels_last)), targets[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        told.add(_BATCH)
    judge.eval().to(memory_format=torch.contiguous_format)


def _shares(judge: AdherenceJudge, images: Tensor, targets: Tensor) -> dict[str, float]:
    """The shares in [0, 1] of `images` predicted as `targets` int64 [B 4]: each factor, and "all"."""
    predicted = judge.predict(images)
    right = torch.stack([predicted[name] == targets[:, k] for k, name in enumerate(_NAMES)], 1)
    shares = {name: right[:, k].float().mean().item() for k, name in enumerate(_NAMES)}
    return {**shares, "all": right.all(1).float().mean().item()}


def train_judge(
    seed: int, images: int = 6144, epochs: int = 6, progress: Callable[[float], None] | None = None
) -> tuple[AdherenceJudge, dict[str, float]]:
    """A judge trained on `images` renders, and its accuracies on held-out clean ones: the factors and "all".

    Deterministic for a seed; computes on one thread. Training and held-out pictures come from seeds of
    the judge's own, far from those of data sets, and apart from each other. `progress` is called with the
    share done, in [0, 1]. Raises ValueError for a negative seed, no epochs, or fewer than one batch of
    images.
    """
    if seed < 0 or epochs < 1 or images < _BATCH:
        raise ValueError(
            f"train_judge: seed {seed}, epochs {epochs}, images {images}; take at least 0, 1 and {_BATCH}"
        )
    rng = torch.Generator().manual_seed(seed)
    told = _Told(images * (1 + epochs) + _HELD_OUT, progress)
    # Layers draw weights as they are made, and the global generator must not notice.
    with torch.random.fork_rng(devices=[]):
        judge = AdherenceJudge()
    _initialise(judge, rng)
    pixels, targets = _rendered(JUDGE_SEEDS + 2 * seed, images, told)
    held_out, truth = _rendered(JUDGE_SEEDS + 2 * seed + 1, _HELD_OUT, told)
    # One thread: the work of a step is too small to share out, and on a busy machine the threads of a step
    # wait for each other ten times longer than they compute. It also makes the result independent of their
    # number.
    with one_thread():
        _fit(judge, pixels, targets, epochs, rng, told)
        accuracies = _shares(judge, _signed(held_out), truth)
    judge.card = JudgeCard(seed, images, accuracies)
    return judge, accuracies


def save_judge(judge: AdherenceJudge, folder: Path) -> None:
    """Writes `judge.safetensors`, then `judge.json` with its card and the weights' SHA-256, into `folder`.

    Each file appears whole or not at all, and a crash between the two is found by the SHA-256 when loading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: value.detach().cpu().contiguous() for name, value in judge.state_dict().items()})
    card = {**asdict(judge.card), "width": judge.width, "sha256": hashlib.sha256(weights).hexdigest()}
    write_atomic(folder / _WEIGHTS, weights)
    write_atomic(folder / _CARD, (json.dumps(card, indent=1) + "\n").encode())


def load_judge(folder: Path) -> AdherenceJudge:
    """The judge saved in `folder`, on the CPU, in evaluation mode.

    Raises JudgeError where a file is missing or damaged, or the judge was made for other landscapes than
    these.
    """
    remedy = "train the judge again"
    try:
        weights = (folder / _WEIGHTS).read_bytes()
        record = json.loads((folder / _CARD).read_text())
        sha256, width = record.pop("sha256"), record.pop("width")
        card = JudgeCard(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"{folder}: no judge can be read ({error}); {remedy}") from error
    if (card.judge_version, card.landscapes_version) != (JUDGE_VERSION, LANDSCAPES_VERSION):
        raise JudgeError(
            f"{folder / _CARD}: made by judge {card.judge_version} for landscapes {card.landscapes_version}, "
            f"not {JUDGE_VERSION} and {LANDSCAPES_VERSION}; {remedy}"
        )
    if hashlib.sha256(weights).hexdigest() != sha256:
        raise JudgeError(f"{folder / _WEIGHTS}: its SHA-256 is not the one in {_CARD}; {remedy}")
    with torch.random.fork_rng(devices=[]):
        judge = AdherenceJudge(width)
    judge.load_state_dict(load(weights))
    judge.card = card
    return judge.eval()
