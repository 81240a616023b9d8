"""Do pictures and texts find each other? Retrieval and CLIP score, by any network that embeds both.

Works for any data with captions. Towers are read from a local file (`evaluation.clip`) or trained by
ourselves on training pictures (`evaluation.tower`). Embeddings are unit vectors, so a product is a cosine.

    found = retrieve(tower.embed_pictures(pictures), tower.embed_texts(captions), captions)
    TowerScorer(tower).score(pictures, prompts)["clip_score"]
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.clip import Clip
from evaluation.features import check_pictures
from evaluation.prompts import Prompt
from evaluation.scorers import Scorer
from models.portions import Portions, one_thread

#: Pictures or texts that go through a CLIP at a time.
_ROWS = 8


class TextImageTower(ABC):
    """Embeds pictures and texts in one space, on the CPU.

    Args:
        name: of the network.
        sha256: of its weights, in hexadecimal.
    """

    def __init__(self, name: str, sha256: str) -> None:
        self.name = name
        self.sha256 = sha256

    @abstractmethod
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors float32 `[N D]` of `pictures` uint8 `[N 3 H W]`; a row is its picture's alone."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 `[N D]` of `texts`; a row is its text's alone."""


class ClipTower(TextImageTower):
    """A CLIP from a local file: `ClipTower(load_clip("ViT-B-32", path))`."""

    def __init__(self, clip: Clip) -> None:
        super().__init__(f"clip {clip.model}", clip.sha256)
        self.clip = clip
        self.portions = Portions()

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        check_pictures(pictures)
        if not len(pictures):
            return torch.empty(0, self.clip.dim)
        return self.portions(_ROWS, self.clip.pictures, pictures)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.clip.dim)
        return self.portions(_ROWS, self.clip.texts, self.clip.tokenizer(list(texts)))


@dataclass(frozen=True)
class Found:
    """How well one side finds the other: shares in [0, 1] found first and among five, and the median rank."""

    recall_1: float
    recall_5: float
    median_rank: float


@dataclass(frozen=True)
class Retrieval:
    """Retrieval both ways among so many pictures with so many different texts; compare equal numbers only."""

    pictures: int
    texts: int
    text_to_image: Found
    image_to_text: Found


def retrieve(picture_vectors: Tensor, text_vectors: Tensor, texts: Sequence[str]) -> Retrieval:
    """Retrieval of pictures by their texts, and of texts by their pictures.

    Vectors are `[N D]`, row by row of one pair. Equal texts are one text, which every picture of it answers.
    Ranks begin at 1, and a tie counts against: pictures that are all alike find nothing.

    Raises:
        ValueError: no pairs, or other numbers of pictures, vectors and texts.
    """
    if not len(picture_vectors) == len(text_vectors) == len(texts) or not texts:
        raise ValueError(
            f"retrieve: {len(picture_vectors)} pictures, {len(text_vectors)} vectors of {len(texts)} texts; "
            "give one of each for each pair"
        )
    first, own = _different(texts)
    with one_thread():
        cosines = picture_vectors.double() @ text_vectors.double()[first].T
    return Retrieval(len(texts), len(first), _found(_ranks(cosines.T, own.T)), _found(_ranks(cosines, own)))


def ranks_among(picture_vectors: Tensor, pool_vectors: Tensor, own: Sequence[int], count: int) -> np.ndarray:
    """The rank int64 `[N]`, from 1, of each picture's own text among `count` texts of a pool.

    Every picture is shown its own text and those that follow it in the pool, round to its beginning: as many
    for each, and the same whatever pictures are asked about. A tie counts against.

    Args:
        picture_vectors: `[N D]`.
        pool_vectors: `[M D]` of M different texts.
        own: for each picture, the number of its text in the pool.
        count: of texts, its own among them; all where the pool has fewer.

    Raises:
        ValueError: another number of pictures than of own texts, or a text that the pool has not.
    """
    N, M = len(picture_vectors), len(pool_vectors)
    mine = torch.tensor(own, dtype=torch.int64)
    if len(own) != N or not N or int(mine.min()) < 0 or int(mine.max()) >= M or count < 1:
        raise ValueError(
            f"ranks_among: {N} pictures with {len(own)} texts of a pool of {M}, {count} at a time"
        )
    with one_thread():
        cosines = picture_vectors.double() @ pool_vectors.double().T
    shown = (mine[:, None] + torch.arange(min(count, M))) % M
    among = cosines.gather(1, shown)
    ranks: np.ndarray = (1 + (among[:, 1:] >= among[:, :1]).sum(1)).numpy()
    return ranks


def clip_score(tower: TextImageTower, pictures: Tensor, texts: Sequence[str]) -> np.ndarray:
    """The CLIP score in [0, 100], float64 `[N]`, of `pictures` uint8 `[N 3 H W]` with their `texts`.

    `100 max(cos, 0)` (Hessel et al. 2021, arXiv 2104.08718, whose factor is 2.5). Compare figures of one
    tower only.
    """
    return _scores(tower.embed_pictures(pictures), tower.embed_texts(texts))


class TowerScorer(Scorer):
    """The CLIP score of each picture, and whether its own prompt is the nearest of all the different ones.

    `clip_score` in [0, 100]; `retrieved` 1 or 0, which depends on the other prompts.
    """

    def __init__(self, tower: TextImageTower) -> None:
        self.tower = tower

    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        check_pictures(pictures)
        texts = [prompt.text for prompt in prompts]
        if len(pictures) != len(texts) or not texts:
            raise ValueError(f"score: {len(pictures)} pictures for {len(texts)} prompts; give one for each")
        one, two = self.tower.embed_pictures(pictures), self.tower.embed_texts(texts)
        first, own = _different(texts)
        with one_thread():
            ranks = _ranks(one.double() @ two[first].double().T, own)
        return {"clip_score": _scores(one, two), "retrieved": (ranks == 1).double().numpy()}


def _different(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Where each of the M different texts comes first, int64 `[M]`, and which each text is, bool `[N M]`."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text, place)
    places = torch.tensor(list(first.values()))
    return places, torch.tensor([first[text] for text in texts])[:, None] == places


def _scores(pictures: Tensor, texts: Tensor) -> np.ndarray:
    return 100 * (pictures.double() * texts.double()).sum(1).clamp(min=0).numpy()


def _ranks(cosines: Tensor, own: Tensor) -> Tensor:
    """The rank `[N]` of the best of its own in each row of `cosines` `[N M]`, among the others and it."""
    best = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return 1 + ((cosines >= best) & ~own).sum(1)


def _found(ranks: Tensor) -> Found:
    middle = float(np.median(ranks.numpy()))
    return Found(float((ranks == 1).double().mean()), float((ranks <= 5).double().mean()), middle)
