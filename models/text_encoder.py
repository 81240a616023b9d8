"""Text encoders: captions to tokens to `Conditioning`.

Notable choices: one tokenizer (CLIP's byte-pair vocabulary), padded with the end-of-text token as Stable
Diffusion does, small enough to live in a loader worker; it loads only the vocabulary and never the rest of
`open_clip`. Two encoders: a small transformer trained with the rest, and any frozen text tower of
`open_clip`. Nothing here reaches the network: weights that are not on the machine are refused at once,
random ones unless asked for.

Used by the diffusion and text stages, by data loading (the tokenizer) and by sampling.
"""

import difflib
import importlib.util
import json
import logging
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import attention
from models.blocks import Block
from models.conditioning import Conditioning
from models.float8 import Linear

log = logging.getLogger(__name__)

VOCABULARY = 49408
START, END = 49406, 49407


@lru_cache(maxsize=1)
def byte_pair_encoder() -> Any:
    """`open_clip`'s SimpleTokenizer, one for each process.

    Its file is loaded on its own: importing the package takes seconds and brings torchvision into every
    worker.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open_clip is not installed: pip install open_clip_torch")
    path = Path(package.origin).parent / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded: reinstall open_clip_torch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


class Tokenizer:
    """Captions to ids: start, byte pairs, end, and the end token again up to `context_length`.

    Light and picklable: the vocabulary is loaded at the first use in each process. HTML entities are
    unescaped and case is dropped. A caption that spells out a special token does not get to use it.
    """

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 2:
            raise ValueError(f"context_length {context_length} leaves no room for the start and end tokens")
        self.context_length = context_length

    def encode(self, text: str) -> tuple[list[int], int]:
        """The `context_length` ids of `text`, and how many of its tokens did not fit."""
        pairs = [token for token in byte_pair_encoder().encode(text) if token < START]
        kept = pairs[: self.context_length - 2]
        padding = self.context_length - 1 - len(kept)
        return [START, *kept, *[END] * padding], len(pairs) - len(kept)

    def dropped(self, texts: list[str]) -> list[int]:
        """How many tokens of each text do not fit into `context_length`; 0 where all do."""
        return [self.encode(text)[1] for text in texts]

    def __call__(self, texts: list[str]) -> Tensor:
        """The tokens int64 [B L] of `texts`."""
        return torch.tensor([self.encode(text)[0] for text in texts], dtype=torch.int64)


def first_end(tokens: Tensor) -> Tensor:
    """The position [B] of the first end token in `tokens` [B L]; L - 1 where there is none."""
    before = ((tokens == END).cumsum(dim=1) == 0).sum(dim=1)
    return before.clamp(max=tokens.shape[1] - 1)


def conditioning_from_states(states: Tensor, tokens: Tensor, mask_padding: bool) -> Conditioning:
    """Conditioning from final `states` [B L D], pooled at the first end token of `tokens` [B L].

    With `mask_padding` the states after that token are hidden; else all are valid, as in Stable Diffusion.
    """
    end = first_end(tokens)
    last = end if mask_padding else torch.full_like(end, tokens.shape[1] - 1)
    mask = torch.arange(tokens.shape[1], device=tokens.device) <= last[:, None]
    pooled = states.gather(1, end[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    return Conditioning(tokens=states, mask=mask, pooled=pooled)


class TextEncoder(nn.Module, ABC):
    """The interface of text encoders: width `dim`, `context_length`, a tokenizer; tokens to Conditioning."""

    def __init__(self, context_length: int, dim: int, mask_padding: bool) -> None:
        super().__init__()
        self.context_length = context_length
        self.dim = dim
        self.mask_padding = mask_padding
        self.tokenizer = Tokenizer(context_length)

    def tokenize(self, texts: list[str]) -> Tensor:
        """The tokens int64 [B L] of `texts`, on the CPU."""
        return self.tokenizer(texts)

    @abstractmethod
    def forward(self, tokens: Tensor) -> Conditioning:
        """The conditioning of `tokens` int64 [B L]: states [B L D] float32, mask [B L], pooled [B D]."""

    def encode(self, texts: list[str]) -> Conditioning:
        """The conditioning of `texts`, on the weights' device; of `[""]` it is the null conditioning."""
        return self(self.tokenize(texts).to(next(self.parameters()).device))


class TextBlock(Block):
    """Causal self-attention and a GELU feed-forward, each behind a LayerNorm: [B L D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.expand = Linear(width, 4 * width)
        self.contract = Linear(4 * width, width)

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        """The transformed tokens [B L D]; `mask` [L L] is True where a query may see a key."""
        h = self.norm_attention(x)
        query, key, value = (
            states.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for states in (self.query(h), self.key(h), self.value(h))
        )
        x = x + self.out(attention(query, key, value, mask).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm_feed(x))))


class TextTransformer(TextEncoder):
    """A small causal transformer in the layout of CLIP's text tower, trained with the rest.

    `mask_padding` as in `conditioning_from_states`. Source: Radford et al. 2021 (arXiv:2103.00020) section
    2.4; the initialisation is theirs too, but for the token embedding.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context_length: int = 32,
        mask_padding: bool = True,
    ) -> None:
        if width % heads != 0:
            raise ValueError(f"text width {width} is no multiple of heads {heads}")
        super().__init__(context_length, width, mask_padding)
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.register_buffer(
            "causal", torch.ones(context_length, context_length, dtype=torch.bool).tril(), persistent=False
        )
        self.causal: Tensor
        self.initialise(width, layers)

    def initialise(self, width: int, layers: int) -> None:
        """None; draws the weights: residual outputs narrower by the square root of twice the depth."""
        # Not CLIP's 0.02: Adam's first steps, each about the learning rate, would overwrite what tells rare
        # words apart. Measured: terrain and sky stayed at chance with 0.02, and were learnt with 1.
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.position, std=0.01)
        inner, outer = width**-0.5, width**-0.5 * (2 * max(layers, 1)) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, TextBlock):
                for layer in (module.query, module.key, module.value):
                    nn.init.normal_(layer.weight, std=inner)
                nn.init.normal_(module.expand.weight, std=(2 * width) ** -0.5)
                for layer in (module.out, module.contract):
                    nn.init.normal_(layer.weight, std=outer)

    def forward(self, tokens: Tensor) -> Conditioning:
        """The conditioning of `tokens` int64 [B L]; L may be shorter than `context_length`."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position[:length]
        mask = self.causal[:length, :length]
        for block in self.blocks:
            x = block(x, mask)
        conditioning = conditioning_from_states(self.norm_out(x).float(), tokens, self.mask_padding)
        return replace(conditioning, pooled=self.pool(conditioning.tokens, tokens))

    @staticmethod
    def pool(states: Tensor, tokens: Tensor) -> Tensor:
        """The sum of the `states` [B L D] up to the first end token over the root of their number: [B D].

        Every word reaches the pooled vector from the first step on, where the end token's own state (CLIP's
        choice) would first have to learn to look at it.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        valid = (positions <= first_end(tokens)[:, None]).float()[:, :, None]
        return (states * valid).sum(1) / valid.sum(1).sqrt()


class OpenClipTextEncoder(TextEncoder):
    """Any causal text tower of `open_clip` with CLIP's vocabulary, frozen and always in eval mode.

    `model` is one of `open_clip`'s names, or a JSON file in the form of its model configs. `pretrained` is a
    local file of weights, or one of `open_clip`'s tags whose weights lie in the local cache: nothing is
    downloaded. Without it the weights are random, which is refused unless `allow_random`. `context_length` 0
    means the tower's own; `mask_padding` as in `conditioning_from_states`. Raises ValueError for a tower
    that does not fit, FileNotFoundError for missing weights.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = None,
        allow_random: bool = False,
        context_length: int = 0,
        mask_padding: bool = True,
    ) -> None:
        if pretrained is None and not allow_random:
            raise ValueError(
                f"text encoder {model} has no weights: set pretrained to a local file or a tag, "
                "or allow_random=true for random ones"
            )
        config = tower_config(model)
        text = config["text_cfg"]
        length = context_length or text["context_length"]
        if length > text["context_length"]:
            raise ValueError(f"context_length {length} is more than the {text['context_length']} of {model}")
        weights = None if pretrained is None else find_weights(model, pretrained)
        super().__init__(length, text["width"], mask_padding)
        self.tower = build_tower(config, length, quick_gelu_of(config, model, pretrained))
        if weights is None:
            log.warning("text encoder %s has RANDOM weights: captions mean nothing to it", model)
        else:
            load_tower(self.tower, weights)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """This encoder, in eval mode whatever `mode` says: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Conditioning:
        """The conditioning of `tokens` int64 [B context_length], without gradient."""
        _, states = self.tower(tokens)
        return conditioning_from_states(states.float(), tokens, self.mask_padding)


TOWER_DEFAULTS = {"context_length": 77, "vocab_size": VOCABULARY, "width": 512, "heads": 8, "layers": 12}
IGNORED_SETTINGS = {"proj_bias", "proj_type", "pool_type", "pad_id", "eos_id", "output_tokens", "mlp_ratio"}


def tower_config(model: str) -> dict[str, Any]:
    """The config of an `open_clip` model, by name or from a JSON file, with the text defaults filled in.

    Raises ValueError for an unknown name and for a tower that is not CLIP's causal transformer and
    vocabulary.
    """
    path = Path(model)
    if path.suffix == ".json":
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        import open_clip

        config = open_clip.get_model_config(model)
        if config is None:
            close = difflib.get_close_matches(model, open_clip.list_models())
            raise ValueError(
                f"open_clip has no model {model}: did you mean {' or '.join(close) or 'another'}?"
            )
    text = TOWER_DEFAULTS | config["text_cfg"]
    odd = sorted(k for k, v in text.items() if v and k not in TOWER_DEFAULTS and k not in IGNORED_SETTINGS)
    if odd or text["vocab_size"] != VOCABULARY:
        what = ", ".join(odd) or f"vocab_size {text['vocab_size']}"
        raise ValueError(
            f"text tower of {model} is not CLIP's ({what}): choose one with its vocabulary and causality"
        )
    return config | {"text_cfg": text}


def find_weights(model: str, pretrained: str) -> Path:
    """The local file of the weights `pretrained`: a file itself, or a tag found in the local cache.

    Only safetensors are looked for: other files of weights hold pickle, which is read nowhere.
    Raises ValueError for an unknown tag and FileNotFoundError for weights that are not on this machine.
    """
    path = Path(pretrained)
    if path.is_file():
        return path
    if path.suffix:
        raise FileNotFoundError(f"text encoder {model}: no file {pretrained}: check the path of pretrained")
    import open_clip
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME

    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"text encoder {model} has no weights tagged {pretrained}: known tags are {known}")
    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    found = try_to_load_from_cache(repository, name or HF_SAFE_WEIGHTS_NAME) if repository else None
    if isinstance(found, str):
        return Path(found)
    raise FileNotFoundError(
        f"text encoder {model}: the weights tagged {pretrained} are not in the local cache and are "
        "not downloaded: give pretrained a local file of safetensors"
    )


def quick_gelu_of(config: dict[str, Any], model: str, pretrained: str | None) -> bool:
    """Whether the tower was trained with the sigmoid form of GELU, by its tag or else by its config."""
    if pretrained is not None and not Path(pretrained).is_file():
        import open_clip

        return bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False))
    return bool(config.get("quick_gelu", False))


def build_tower(config: dict[str, Any], context_length: int, quick_gelu: bool) -> nn.Module:
    """The text tower alone, without its image tower and projection; it returns (pooled, states)."""
    from open_clip.transformer import QuickGELU, TextTransformer

    text = config["text_cfg"]
    return TextTransformer(
        context_length=context_length,
        vocab_size=text["vocab_size"],
        width=text["width"],
        heads=text["heads"],
        layers=text["layers"],
        mlp_ratio=text.get("mlp_ratio", 4.0),
        output_dim=None,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        output_tokens=True,
    )


def load_tower(tower: nn.Module, path: Path) -> None:
    """None; fills `tower` from a safetensors file of a whole model's or a text tower's weights.

    Positions beyond the tower's context are left out. Raises ValueError naming the weights that are missing.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not safetensors ({error}): no other form is read, as it could hold code; convert it"
        ) from None
    state = {key.removeprefix("module.").removeprefix("text."): value for key, value in state.items()}
    wanted = tower.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ValueError(
            f"{path}: no text tower's weights, {missing[0]} and {len(missing) - 1} more are missing"
        )
    state = {key: state[key] for key in wanted}
    state["positional_embedding"] = state["positional_embedding"][: len(wanted["positional_embedding"])]
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, the tower's "
            f"{tuple(wanted[wrong[0]].shape)}: the weights are of another model"
        )
    tower.load_state_dict(state)
