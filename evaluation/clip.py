"""CLIP of `open_clip`, both towers, from a local file of safetensors. Nothing is downloaded.

Used as a feature network by `evaluation.features` and as a tower by `evaluation.retrieval`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.weights import fill, read_weights
from models.text_encoder import Tokenizer, tower_config

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP.

    Args:
        model: its name among `open_clip`'s.
        sha256: of its file.
        network: both towers, in evaluation mode.
        side: pixels that it sees.
        dim: width of its vectors.
        tokenizer: of its texts.
    """

    model: str
    sha256: str
    network: Any
    side: int
    dim: int
    tokenizer: Tokenizer

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors float32 `[B D]` of `pictures` uint8 `[B 3 H W]`, brought whole to its square."""
        return F.normalize(self.network.encode_image(prepared(pictures, self.side, _MEAN, _STD)))

    def texts(self, tokens: Tensor) -> Tensor:
        """Unit vectors float32 `[B D]` of `tokens` int64 `[B L]`."""
        return F.normalize(self.network.encode_text(tokens))


def prepared(
    pictures: Tensor, side: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """Pictures uint8 `[B 3 H W]` as float32 `[B 3 side side]`: bicubic, antialiased, less mean over std."""
    images = pictures.float() / 255
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp_(0, 1)
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def load_clip(model: str, path: Path) -> Clip:
    """The CLIP `model`, one of `open_clip`'s names or a JSON file in its form, with the weights at `path`.

    OpenAI's own weights need a model whose name ends in `-quickgelu`.

    Raises:
        ValueError: no such model, or its text tower is not CLIP's.
        CheckpointError: the file cannot be read, or holds another network's weights.
    """
    import open_clip

    config = tower_config(model)
    state, sha256 = read_weights(path)
    with torch.random.fork_rng(devices=[]):
        network = open_clip.CLIP(
            config["embed_dim"], config["vision_cfg"], config["text_cfg"], config.get("quick_gelu", False)
        )
    fill(network, state, path)
    side, context = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    return Clip(model, sha256, network, side, config["embed_dim"], Tokenizer(context))
