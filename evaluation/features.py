"""What a network sees in pictures, as rows of numbers: the space in which every distance is measured.

The landscapes judge is always at hand; Inception, DINOv2 and CLIP are read from a local file of safetensors
when one is given, and nothing is downloaded. A row depends on its picture alone, to the last bit: pictures
go through in portions of one fixed size, each on one thread (`models.portions`).

    network = open_features("judge", Path("judge"))
    network = open_features("inception", Path("pt_inception-2015-12-05.safetensors"))
    frechet_distance(network.features(pictures), network.features(others))
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from evaluation.adherence import RESOLUTION, AdherenceJudge, load_judge
from evaluation.clip import load_clip, prepared
from evaluation.weights import fill, read_weights
from models.checkpoint import CheckpointError
from models.portions import Portions
from models.registry import ConfigError, did_you_mean

#: Pictures in a portion: few enough that several portions at a time fit into a laptop's memory.
_JUDGE_ROWS, _LARGE_ROWS = 32, 8
_INCEPTION_SIDE, _DINO_SIDE = 299, 224
#: Blocks of Inception whose pooled branch averages.
_AVERAGED = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
#: Width of a DINOv2 -> its size.
_DINO_SIZES = {384: "small", 768: "base", 1_024: "large", 1_536: "giant"}
#: Of networks trained on ImageNet, for values in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def sized(pictures: Tensor, side: int) -> Tensor:
    """Pictures uint8 `[N 3 H W]` as images float32 `[N 3 side side]` in [-1, 1]."""
    images = pictures.float() / 127.5 - 1
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def judge_features(judge: AdherenceJudge) -> FeatureNetwork:
    """The 128 features from which the landscapes `judge` reads the four factors."""
    judge.eval()
    weights = save({name: value.detach().cpu().contiguous() for name, value in judge.state_dict().items()})

    def embed(pictures: Tensor) -> Tensor:
        return judge.embed(pictures.float() / 127.5 - 1)

    resize = f"to {RESOLUTION} x {RESOLUTION}: area average of larger sides, bilinear where one is smaller"
    sha256 = hashlib.sha256(weights).hexdigest()
    return PortionedFeatures("judge", sha256, judge.hidden.out_features, resize, _JUDGE_ROWS, embed)


def _open_judge(folder: Path, _: str) -> FeatureNetwork:
    return judge_features(load_judge(folder))


class _Pooled(nn.Module):
    """A block of torchvision's Inception, its pooled branch fed by another pooling: `[B C h w]`."""

    def __init__(self, block: Any, pool: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """The branches side by side."""
        branches = self.block._forward(x)[:-1]
        return torch.cat([*branches, self.block.branch_pool(self.pool(x))], 1)


def _open_inception(path: Path, _: str) -> FeatureNetwork:
    """The pooled features of Inception v3 (Szegedy et al. 2016, arXiv 1512.00567).

    A file of 1,008 classes is that of published FIDs, whose blocks do not count the padding where they
    average, and take the maximum in the last one; one of 1,000 is torchvision's.
    """
    from torchvision.models import Inception3

    state, sha256 = read_weights(path)
    classes = len(state.get("fc.weight", ()))
    with torch.random.fork_rng(devices=[]):
        network = Inception3(classes, aux_logits=False, init_weights=False)
    fill(network, state, path)
    network.fc = nn.Identity()
    published = classes == 1_008
    if published:
        for block in _AVERAGED:
            network.set_submodule(
                block, _Pooled(network.get_submodule(block), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
            )
        network.Mixed_7c = _Pooled(network.Mixed_7c, nn.MaxPool2d(3, 1, 1))
    resize = f"to {_INCEPTION_SIDE} x {_INCEPTION_SIDE}, bilinear, antialiased"

    def embed(pictures: Tensor) -> Tensor:
        images = F.interpolate(pictures.float(), (_INCEPTION_SIDE,) * 2, mode="bilinear", antialias=True)
        return network((images - 128) / 128)

    name = "inception v3 of published FIDs" if published else "inception v3 of torchvision"
    return PortionedFeatures(name, sha256, 2_048, resize, _LARGE_ROWS, embed)


def _open_dinov2(path: Path, _: str) -> FeatureNetwork:
    """The class token of DINOv2 (Oquab et al. 2023, arXiv 2304.07193), at 224 pixels as in Stein et al. 2023.

    Which of the networks it is shows in the weights, which are laid out as timm's.
    """
    import timm

    state, sha256 = read_weights(path)
    dim = state["cls_token"].shape[-1] if "cls_token" in state else 0
    size = _DINO_SIZES.get(dim)
    if size is None:
        raise CheckpointError(f"{path}: no DINOv2 in timm's layout; take a model.safetensors of timm's")
    model = f"vit_{size}_patch14_{'reg4_' if 'reg_token' in state else ''}dinov2"
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(model, pretrained=False, num_classes=0, dynamic_img_size=True)
    fill(network, state, path)

    def embed(pictures: Tensor) -> Tensor:
        return network(prepared(pictures, _DINO_SIDE, IMAGENET_MEAN, IMAGENET_STD))

    resize = f"to {_DINO_SIDE} x {_DINO_SIDE}, bicubic, antialiased"
    return PortionedFeatures(f"dinov2 {model}", sha256, dim, resize, _LARGE_ROWS, embed)


def _open_clip(path: Path, model: str) -> FeatureNetwork:
    """CLIP's picture vectors (Radford et al. 2021, arXiv 2103.00020); CMMD takes ViT-L-14-336-quickgelu."""
    if not model:
        raise ConfigError("feature network 'clip' needs its model: clip:ViT-L-14-336-quickgelu, for one")
    try:
        clip = load_clip(model, path)
    except ValueError as error:
        raise ConfigError(f"feature network 'clip:{model}': {error}") from None
    resize = f"to {clip.side} x {clip.side}, bicubic, antialiased"
    return PortionedFeatures(f"clip {model}", clip.sha256, clip.dim, resize, _LARGE_ROWS, clip.pictures)


#: name -> opens the network from its file, or the judge from its folder, and the model named after a colon.
NETWORKS: dict[str, Callable[[Path, str], FeatureNetwork]] = {
    "judge": _open_judge,
    "inception": _open_inception,
    "dinov2": _open_dinov2,
    "clip": _open_clip,
}


def open_features(name: str, path: Path) -> FeatureNetwork:
    """The feature network `name`, with the weights at `path`: the judge's folder, or a safetensors file.

    Names are those of `NETWORKS`, clip with a model of `open_clip` after a colon: `clip:ViT-B-32`.

    Raises:
        ConfigError: no such network.
        JudgeError: no judge at `path`.
        CheckpointError: the file cannot be read, or holds another network's weights.
    """
    kind, _, model = name.partition(":")
    if kind not in NETWORKS or (model and kind != "clip"):
        raise ConfigError(f"no feature network '{name}'{did_you_mean(kind, NETWORKS)}")
    return NETWORKS[kind](path, model)
