"""Weights and configs in the form of diffusers' UNet2DConditionModel and AutoencoderKL, and back.

Notable choices: pure functions on state dicts, which need neither network nor diffusers. The networks have
Stable Diffusion's layout, so a key changes its name and a tensor stays as it is, with one exception: the
normalisation of the latents is folded into the two 1x1 convolutions beside them, so that an exported
autoencoder hands out the same normalised latents with diffusers' `scaling_factor` of 1.

A diffusers pipeline does not pass a text mask by itself: give the UNet
`encoder_attention_mask=conditioning.mask`, or train with a text encoder whose `mask_padding` is off. Used by
`scripts/export.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.unet import UNet, middle_depth

# Each pair is the same piece of a key, ours and diffusers'; # stands for an index.
SHARED = (
    ("residuals.#.norm_in", "resnets.#.norm1"),
    ("residuals.#.conv_in", "resnets.#.conv1"),
    ("residuals.#.modulation", "resnets.#.time_emb_proj"),
    ("residuals.#.norm_out", "resnets.#.norm2"),
    ("residuals.#.conv_out", "resnets.#.conv2"),
    ("residuals.#.shortcut", "resnets.#.conv_shortcut"),
    ("downsample.conv", "downsamplers.0.conv"),
    ("upsample.conv", "upsamplers.0.conv"),
    ("norm_out", "conv_norm_out"),
    ("down.#", "down_blocks.#"),
    ("up.#", "up_blocks.#"),
    ("middle", "mid_block"),
)
UNET = (
    ("time_embedding.linear_in", "time_embedding.linear_1"),
    ("time_embedding.linear_out", "time_embedding.linear_2"),
    ("pooled_embedding.linear_in", "class_embedding.linear_1"),
    ("pooled_embedding.linear_out", "class_embedding.linear_2"),
    ("blocks.#.norm_self", "transformer_blocks.#.norm1"),
    ("blocks.#.self_attention.out", "transformer_blocks.#.attn1.to_out.0"),
    ("blocks.#.self_attention", "transformer_blocks.#.attn1"),
    ("blocks.#.norm_cross", "transformer_blocks.#.norm2"),
    ("blocks.#.cross_attention.out", "transformer_blocks.#.attn2.to_out.0"),
    ("blocks.#.cross_attention", "transformer_blocks.#.attn2"),
    ("blocks.#.norm_feed", "transformer_blocks.#.norm3"),
    ("blocks.#.feed_forward.expand", "transformer_blocks.#.ff.net.0.proj"),
    ("blocks.#.feed_forward.contract", "transformer_blocks.#.ff.net.2"),
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("project_in", "proj_in"),
    ("project_out", "proj_out"),
    ("transformers.#", "attentions.#"),
)
AUTOENCODER = (
    ("middle.attention.norm", "mid_block.attentions.0.group_norm"),
    ("middle.attention.attention.query", "mid_block.attentions.0.to_q"),
    ("middle.attention.attention.key", "mid_block.attentions.0.to_k"),
    ("middle.attention.attention.value", "mid_block.attentions.0.to_v"),
    ("middle.attention.attention.out", "mid_block.attentions.0.to_out.0"),
)
LATENT_STATISTICS = ("latent_mean", "latent_std")


def rename(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """The key with each piece that matches the first of a pair, whole segments only, made the second."""
    for old, new in pairs:
        pattern = re.escape(old).replace(r"\#", r"(\d+)")
        key = re.sub(rf"(?<![^.]){pattern}(?![^.])", new.replace("#", r"\g<1>"), key)
    return key


def backwards(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The pairs that undo `pairs`: swapped, in the same order, in which the longer pieces come first."""
    return tuple((new, old) for old, new in pairs)


def unet_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's state dict under diffusers' names; ValueError for a learned position map."""
    if "position" in state:
        raise ValueError(
            "position_size > 0: diffusers has no learned position map: train with position_size=0 to export"
        )
    return {rename(key, UNET + SHARED): value for key, value in state.items()}


def unet_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers UNet's state dict under our names; 1x1 convolutions around attention become linear."""
    renamed = {rename(key, backwards(UNET + SHARED)): value for key, value in state.items()}
    return {
        key: value.flatten(1) if key.endswith(("project_in.weight", "project_out.weight")) else value
        for key, value in renamed.items()
    }


def unet_config(unet: UNet, sample_size: int | None = None) -> dict[str, Any]:
    """The keyword arguments of the UNet2DConditionModel that takes the weights of `unet`.

    `sample_size` is the side of the latents it was trained on, which pipelines take as their default.
    """
    if unet.position is not None:
        raise ValueError(
            "position_size > 0: diffusers has no learned position map: train with position_size=0 to export"
        )
    if unet.patch_size > 1:
        raise ValueError(
            "patch_size > 1: diffusers' UNet takes no patches: train with patch_size=1 to export"
        )
    depths, middle = unet.transformer_depth, middle_depth(unet.transformer_depth)
    pooled = unet.pooled_embedding is not None
    return {
        "sample_size": sample_size,
        "in_channels": unet.latent_channels * (2 if unet.image_conditioning else 1),
        "out_channels": unet.latent_channels,
        "block_out_channels": unet.channels,
        "layers_per_block": unet.blocks_per_level,
        "down_block_types": tuple("CrossAttnDownBlock2D" if d > 0 else "DownBlock2D" for d in depths),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle > 0 else "UNetMidBlock2D",
        "up_block_types": tuple("CrossAttnUpBlock2D" if d > 0 else "UpBlock2D" for d in reversed(depths)),
        # Levels without attention ignore theirs, but the middle takes the last.
        "transformer_layers_per_block": tuple(d or max(middle, 1) for d in depths),
        # The number of heads, whatever the name says.
        "attention_head_dim": tuple(max(width // unet.head_dim, 1) for width in unet.channels),
        "cross_attention_dim": unet.conditioning_dim,
        "use_linear_projection": True,
        "norm_num_groups": unet.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
        "class_embed_type": "projection" if pooled else None,
        "projection_class_embeddings_input_dim": unet.conditioning_dim if pooled else None,
    }


def autoencoder_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's state dict under diffusers' names, the normalisation of the latents folded in."""
    renamed = {rename(key, AUTOENCODER + SHARED): value for key, value in state.items()}
    mean, std = (renamed.pop(key).double().flatten() for key in LATENT_STATISTICS)

    # Moments of (z - mean) / std: the mean is shifted and scaled, the log-variance falls by 2 log std.
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2 * std.log()])
    weight, bias = renamed["quant_conv.weight"], renamed["quant_conv.bias"]
    renamed["quant_conv.weight"] = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
    renamed["quant_conv.bias"] = (bias.double() * scale + shift).to(bias.dtype)

    # The decoder undoes it: its input is latents * std + mean.
    weight, bias = renamed["post_quant_conv.weight"], renamed["post_quant_conv.bias"]
    matrix = weight.double().flatten(1)
    renamed["post_quant_conv.weight"] = (matrix * std)[:, :, None, None].to(weight.dtype)
    renamed["post_quant_conv.bias"] = (bias.double() + matrix @ mean).to(bias.dtype)
    return renamed


def autoencoder_from_diffusers(
    state: Mapping[str, Tensor], scaling_factor: float = 1.0, shift_factor: float = 0.0
) -> dict[str, Tensor]:
    """A diffusers autoencoder's state dict under our names, its latents normalised as its config says.

    diffusers hands `(z - shift_factor) * scaling_factor` to diffusion: 0.18215 and 0 in Stable Diffusion.
    """
    renamed = {rename(key, backwards(AUTOENCODER + SHARED)): value for key, value in state.items()}
    channels = renamed["post_quant_conv.weight"].shape[1]
    renamed["latent_mean"] = torch.full((1, channels, 1, 1), shift_factor)
    renamed["latent_std"] = torch.full((1, channels, 1, 1), 1 / scaling_factor)
    return renamed


def autoencoder_config(autoencoder: Autoencoder, sample_size: int = 256) -> dict[str, Any]:
    """The keyword arguments of the AutoencoderKL that takes the weights of `autoencoder`.

    `sample_size` is the side in pixels of the images it was trained on. Raises ValueError for patches and for
    a linear path.
    """
    if autoencoder.patch_size > 1 or autoencoder.linear_path:
        raise ValueError(
            "diffusers' AutoencoderKL takes no patches and has no linear path: train with "
            "autoencoder.patch_size=1 and autoencoder.linear_path=false to export"
        )
    levels = len(autoencoder.channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": autoencoder.channels,
        "layers_per_block": autoencoder.blocks_per_level,
        "latent_channels": autoencoder.latent_channels,
        "norm_num_groups": autoencoder.norm_groups,
        "sample_size": sample_size,
        "mid_block_add_attention": autoencoder.mid_attention,
        "scaling_factor": 1.0,
    }
