"""Encoding ahead of training: pictures to moments, captions to embeddings, and who made them.

Precomputed shards hold what these functions return; training compares the identities with its own networks
before it reads a shard. Text can be encoded ahead only where no parameter of the encoder is trained: each
step would make the stored embeddings those of another encoder.
"""

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.checkpoint import fingerprint
from models.text_encoder import TextEncoder, byte_pair_encoder


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    """The identity of an autoencoder's weights, as diffusion checkpoints keep it."""
    return fingerprint({f"autoencoder.{key}": value for key, value in autoencoder.state_dict().items()})


def is_frozen(text_encoder: TextEncoder) -> bool:
    """Whether no parameter of `text_encoder` is trained, so that its output may be stored."""
    return not any(parameter.requires_grad for parameter in text_encoder.parameters())


def text_identity(text_encoder: TextEncoder) -> dict[str, Any]:
    """What stored embeddings depend on: `weights`, `tokenizer`, `context_length`, `dim`, `mask_padding`."""
    return {
        "weights": fingerprint(text_encoder.state_dict()),
        "tokenizer": tokenizer_fingerprint(),
        "context_length": text_encoder.context_length,
        "dim": text_encoder.dim,
        "mask_padding": text_encoder.mask_padding,
    }


def tokenizer_fingerprint() -> str:
    """SHA-256 over the tokenizer's vocabulary and merges, in their order."""
    pairs = byte_pair_encoder()
    merges = sorted((rank, list(pair)) for pair, rank in pairs.bpe_ranks.items())
    return hashlib.sha256(json.dumps([sorted(pairs.encoder.items()), merges]).encode()).hexdigest()


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """The moments `[B 2C h w]`, float32 on the CPU, of `pixels` uint8 `[B 3 H W]`, computed in float32."""
    pixels = pixels.to(autoencoder.latent_mean.device)
    images = pixels.float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)
    return autoencoder.encode(images).float().cpu()


@torch.no_grad()
def encode_captions(text_encoder: TextEncoder, captions: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The valid states `[L D]` and the pooled vector `[D]` of each caption, float32; L differs."""
    conditioning = text_encoder.encode(captions).to("cpu")
    return [
        (states[mask].float().numpy(), pooled.float().numpy())
        for states, mask, pooled in zip(
            conditioning.tokens, conditioning.mask, conditioning.pooled, strict=True
        )
    ]
