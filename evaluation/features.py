"""What a network sees in pictures, as rows of numbers: the space in which every distance is measured.

The landscapes judge is always at hand; Inception, DINOv2 and CLIP are read from a local file of safetensors
when one is given, and nothing is downloaded. A row depends on its picture alone, to the last bit: pictures
go through in portions of one fixed size, each on one thread (`models.portions`).

    network = open_features("judge", Path("judge"))
    frechet_distance(network.features(pictures), network.features(others))
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from evaluation.adherence import RESOLUTION, AdherenceJudge, load_judge
from models.portions import Portions
from models.registry import ConfigError, did_you_mean

#: Pictures in a portion: few enough that several portions at a time fit into a laptop's memory.
_JUDGE_ROWS = 32


class FeatureNetwork(ABC):
    """Returns features of pictures. What a card must say of them stands beside.

    Args:
        name: of the network and its layer.
        sha256: of its weights, in hexadecimal.
        dim: the width D of its features.
        resize: in words, how pictures are brought to the size that the network sees.
    """

    def __init__(self, name: str, sha256: str, dim: int, resize: str) -> None:
        self.name = name
        self.sha256 = sha256
        self.dim = dim
        self.resize = resize

    @abstractmethod
    def features(self, pictures: Tensor) -> Tensor:
        """Features float32 `[N D]`, on the CPU, of `pictures` uint8 `[N 3 H W]`.

        A row does not depend on the other pictures, on N, or on the number of threads.
        """


class PortionedFeatures(FeatureNetwork):
    """A feature network made of a function that is called on a fixed number of pictures at a time.

    Args:
        name: as in `FeatureNetwork`, and so the next three.
        sha256: of the weights.
        dim: the width D.
        resize: in words.
        rows: pictures in a portion.
        function: pictures uint8 `[rows 3 H W]` -> features float32 `[rows D]`.
    """

    def __init__(
        self, name: str, sha256: str, dim: int, resize: str, rows: int, function: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(name, sha256, dim, resize)
        self.rows = rows
        self.function = function
        self.portions = Portions()

    def features(self, pictures: Tensor) -> Tensor:
        check_pictures(pictures)
        if not len(pictures):
            return torch.empty(0, self.dim)
        return self.portions(self.rows, self.function, pictures)


def check_pictures(pictures: Tensor) -> None:
    """None; raises ValueError unless `pictures` are uint8 `[N 3 H W]`."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}; give uint8 [N 3 H W]")


def judge_features(judge: AdherenceJudge) -> FeatureNetwork:
    """The 128 features from which the landscapes `judge` reads the four factors."""
    judge.eval()
    weights = save({name: value.detach().cpu().contiguous() for name, value in judge.state_dict().items()})

    def embed(pictures: Tensor) -> Tensor:
        return judge.embed(pictures.float() / 127.5 - 1)

    resize = f"to {RESOLUTION} x {RESOLUTION}: area average of larger sides, bilinear where one is smaller"
    sha256 = hashlib.sha256(weights).hexdigest()
    return PortionedFeatures("judge", sha256, judge.hidden.out_features, resize, _JUDGE_ROWS, embed)


def _open_judge(folder: Path) -> FeatureNetwork:
    return judge_features(load_judge(folder))


#: name -> opens the network from its file; the judge from its folder.
NETWORKS: dict[str, Callable[[Path], FeatureNetwork]] = {"judge": _open_judge}


def open_features(name: str, path: Path) -> FeatureNetwork:
    """The feature network `name`, with the weights at `path`: the judge's folder, or a safetensors file.

    Raises:
        ConfigError: no such network.
        JudgeError: no judge at `path`.
        CheckpointError: the file cannot be read, or holds another network's weights.
    """
    if name not in NETWORKS:
        raise ConfigError(f"no feature network '{name}'{did_you_mean(name, NETWORKS)}")
    return NETWORKS[name](path)
