"""Does a picture show the class that its prompt names? A classifier of any labelled pictures of our own.

A small residual network (He et al. 2015, arXiv 1512.03385) that learns the classes of training pictures in a
few minutes on one core: mirrored, cropped, turned a little in colour, and blurred, so that a picture that
came through an autoencoder is judged by what it shows and not by its sharpness. It never sees a generated
picture, and is independent of every network that it judges. Its limits: it sorts whatever it is shown into
one of its classes; it tells classes apart and not whether a picture is good or varied; classes that differ in
left and right are one to it; and how often it is right about real pictures that it has not seen bounds what
its scores mean, so that this stands beside them.

    classifier = train_classifier(pictures, labels, seed=0)
    save_classifier(classifier, Path("classifier")); classifier = load_classifier(Path("classifier"))
    classifier.classify(pictures)                      # ["roses", "tulips", ...]
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.asks import Ask
from evaluation.features import check_pictures, sized
from evaluation.kept import data_sha256, keep, packed, read_kept
from evaluation.prompts import Prompt
from evaluation.scorers import Scorer
from models.portions import Portions, one_thread
from models.registry import ConfigError

CLASSIFIER_VERSION = 1
RESOLUTION = 64
#: Classes at most, and pictures that each must have at least.
MOST, FEWEST = 100, 16
#: Pictures of a training step, and at most so many held out.
_BATCH, _HELD_OUT = 128, 1_000
_ROWS = 32
_NAME = "classifier"


@dataclass(frozen=True)
class ClassifierCard:
    """What is known of a classifier.

    Args:
        seed: of its training.
        steps: of it, of up to 128 pictures each.
        pictures: that it learnt from.
        classes: their names, in the order of its answers.
        data: SHA-256 of the pictures and labels given.
        held_out: the share in [0, 1] of pictures of the same data, not seen in training, that it is right
            about.
        held_out_pictures: how many these were.
        version: of its construction.
    """

    seed: int
    steps: int
    pictures: int
    classes: tuple[str, ...]
    data: str
    held_out: float
    held_out_pictures: int
    version: int = CLASSIFIER_VERSION


class ClassifierNetwork(nn.Module):
    """Logits `[B K]` of K `classes` for images float32 `[B 3 64 64]` in [-1, 1].

    Weights are drawn from `rng`.
    """

    def __init__(self, classes: int, rng: torch.Generator, width: int = 24) -> None:
        super().__init__()
        # Whole 2 x 2 blocks go in as channels: far cheaper than convolutions at full size.
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), *_convolved(12, width, 1)]
        for before, after in ((width, 2 * width), (2 * width, 4 * width)):
            layers += [*_convolved(before, after, 2), _Residual(after)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
            if isinstance(module, _Residual):  # begins as nothing added
                nn.init.zeros_(module.norm_out.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """The logits `[B K]`."""
        return self.head(self.features(images).mean((2, 3)))


class _Residual(nn.Module):
    """Two convolutions beside an identity: `[B C h w]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_convolved(channels, channels, 1))
        self.outer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_out = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_out(self.outer(self.inner(x))))


def _convolved(before: int, after: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


class Classifier:
    """A trained network with its card."""

    def __init__(self, network: nn.Module, card: ClassifierCard) -> None:
        self.network = network.eval()
        self.card = card
        self.sha256 = hashlib.sha256(packed(network)).hexdigest()
        self.portions = Portions()

    def classify(self, pictures: Tensor) -> list[str]:
        """The likeliest class of each of the pictures uint8 `[N 3 H W]`; a picture's is its own alone."""
        check_pictures(pictures)
        if not len(pictures):
            return []
        numbers = self.portions(_ROWS, self._answer, pictures)
        return [self.card.classes[number] for number in numbers.tolist()]

    def _answer(self, pictures: Tensor) -> Tensor:
        """Class numbers `[B]`, by the picture and its mirror image together."""
        images = sized(pictures, RESOLUTION)
        return (self.network(images).softmax(1) + self.network(images.flip(3)).softmax(1)).argmax(1)


def train_classifier(
    pictures: Tensor,
    labels: Sequence[str],
    seed: int = 0,
    steps: int = 500,
    progress: Callable[[int], None] | None = None,
) -> Classifier:
    """A classifier trained on `pictures` uint8 `[N 3 H W]` and the name of the class of each.

    A tenth of them, at most 1,000, are held out for its card. Deterministic for a seed, on one thread.
    `progress` is called with the steps done.

    Raises:
        ValueError: other numbers of pictures and labels, fewer than two classes, too many of them, or too few
            pictures of one, or no steps.
    """
    check_pictures(pictures)
    N, names = len(pictures), sorted(set(labels))
    if len(labels) != N or steps < 1:
        raise ValueError(f"train_classifier: {N} pictures, {len(labels)} labels, {steps} steps")
    if reason := _unfit(labels):
        raise ValueError(f"train_classifier: {reason}")
    rng = torch.Generator().manual_seed(seed)
    order, out = torch.randperm(N, generator=rng), min(N // 10, _HELD_OUT)
    targets = torch.tensor([names.index(label) for label in labels])
    card = ClassifierCard(seed, steps, N - out, tuple(names), data_sha256(pictures, list(labels)), 0.0, out)
    with torch.random.fork_rng(devices=[]), one_thread():
        network = ClassifierNetwork(len(names), rng)
        _fit(network, pictures[order[out:]], targets[order[out:]], steps, rng, progress)
        classifier = Classifier(network, card)
        found = classifier.classify(pictures[order[:out]])
    right = [label == labels[k] for label, k in zip(found, order[:out].tolist(), strict=True)]
    return Classifier(network, replace(card, held_out=sum(right) / out))


def _unfit(labels: Sequence[str]) -> str:
    """Why no classifier can be trained on these labels; "" where one can."""
    counts = Counter(labels)
    if not 2 <= len(counts) <= MOST:
        return f"there are {len(counts):,} classes, but must be from 2 to {MOST}"
    name, least = min(counts.items(), key=lambda each: (each[1], each[0]))
    return f"class '{name}' has {least} pictures, but must have {FEWEST}" if least < FEWEST else ""


def _fit(
    network: ClassifierNetwork,
    pictures: Tensor,
    targets: Tensor,
    steps: int,
    rng: torch.Generator,
    progress: Callable[[int], None] | None,
) -> None:
    images = torch.cat([sized(part, RESOLUTION) for part in pictures.split(_BATCH)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    network.train()
    for step in range(steps):
        rows = torch.randperm(len(images), generator=rng)[:_BATCH]
        logits = network(_disturbed(images[rows], rng))
        loss = F.cross_entropy(logits, targets[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if progress is not None:
            progress(step + 1)


def _disturbed(images: Tensor, rng: torch.Generator) -> Tensor:
    """Crops of 3/4 to all of a side, half of them mirrored, of another tint, blurred, a little noisy."""
    B, side = len(images), images.shape[-1]
    scale = 0.75 + 0.25 * torch.rand(B, generator=rng)
    mirrored = torch.randint(0, 2, (B,), generator=rng) * 2 - 1
    affine = torch.zeros(B, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = scale * mirrored, scale
    affine[:, :, 2] = (1 - scale)[:, None] * (2 * torch.rand(B, 2, generator=rng) - 1)
    grid = F.affine_grid(affine, [B, 3, side, side], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    factor = (1, 2, 2, 4)[int(torch.randint(0, 4, (), generator=rng))]
    if factor > 1:
        soft = F.interpolate(F.avg_pool2d(images, factor), (side, side), mode="bilinear")
        images = images.lerp(soft, torch.rand(B, 1, 1, 1, generator=rng))
    gain = 1 + 0.1 * torch.randn(B, 3, 1, 1, generator=rng)
    shift = 0.05 * torch.randn(B, 3, 1, 1, generator=rng)
    amount = 0.1 * torch.rand(B, 1, 1, 1, generator=rng)
    return images * gain + shift + amount * torch.randn(images.shape, generator=rng)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Writes `classifier.safetensors`, then `classifier.json` with its card and a SHA-256, into `folder`."""
    keep(folder, _NAME, classifier.network, asdict(classifier.card))


def load_classifier(folder: Path) -> Classifier:
    """The classifier saved in `folder`.

    Raises:
        CheckpointError: a file is missing or damaged, or of another version.
    """
    card, network = read_kept(
        folder,
        _NAME,
        ClassifierCard,
        CLASSIFIER_VERSION,
        lambda card: ClassifierNetwork(len(card.classes), torch.Generator()),
    )
    return Classifier(network, replace(card, classes=tuple(card.classes)))


# --- the classes of prompts ---------------------------------------------------------------------------------


def labels_of(asks: Sequence[Ask]) -> list[str]:
    """The class of each sample: that which its JSON names, or its caption where no field of it is given.

    Raises:
        ConfigError: too few or too many classes, or too few pictures of one.
    """
    labels = [ask.of_class or ask.text for ask in asks]
    if reason := _unfit(labels):
        raise ConfigError(
            f"scorer=classifier: {reason}; give variety.class_field a field of the samples' JSON that names "
            "the class, or take scorer=tower"
        )
    return labels


class ClassifierScorer(Scorer):
    """Whether the classifier sorts a picture into the class that its prompt names: `class`, 1 or 0.

    A prompt names the class that is its category, else that which all training captions of the same words
    have; prompts that name none have NaN.

    Args:
        classifier: that looks at the pictures.
        asks: training captions with their classes.
    """

    def __init__(self, classifier: Classifier, asks: Sequence[Ask]) -> None:
        self.classifier = classifier
        self.meanings = _meanings(asks)

    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        check_pictures(pictures)
        if len(pictures) != len(prompts) or not prompts:
            raise ValueError(f"score: {len(pictures)} pictures for {len(prompts)} prompts; give one for each")
        found = self.classifier.classify(pictures)
        wanted = [self.class_of(prompt) for prompt in prompts]
        right = [
            float("nan") if want is None else float(want == is_)
            for want, is_ in zip(wanted, found, strict=True)
        ]
        return {"class": np.array(right)}

    def class_of(self, prompt: Prompt) -> str | None:
        """The class that a prompt names, or None."""
        if prompt.category in self.classifier.card.classes:
            return prompt.category
        return self.meanings.get(prompt.text)


def _meanings(asks: Sequence[Ask]) -> Mapping[str, str]:
    """Caption -> its class, for captions of one class alone."""
    classes: dict[str, set[str]] = {}
    for ask, label in zip(asks, labels_of(asks), strict=True):
        classes.setdefault(ask.text, set()).add(label)
    return {text: next(iter(of)) for text, of in classes.items() if len(of) == 1}
