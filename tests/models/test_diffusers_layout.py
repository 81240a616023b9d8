"""Weights moved to diffusers and back: the same outputs, the same gradients, nothing lost."""

import warnings

import pytest
import torch

from models.autoencoder import Autoencoder
from models.conditioning import Conditioning
from models.diffusers_layout import (
    autoencoder_config,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    unet_config,
    unet_from_diffusers,
    unet_to_diffusers,
)
from models.unet import UNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of the key map")
    from diffusers import AutoencoderKL, UNet2DConditionModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

WIDTH = 24
UNETS: dict[str, dict[str, object]] = {
    "tiny with pooled text": {
        "channels": (16, 32),
        "blocks_per_level": 1,
        "transformer_depth": (0, 1),
        "scale_shift": True,
        "pooled_conditioning": True,
    },
    "Stable Diffusion's levels": {"channels": (16, 24, 32, 32), "transformer_depth": (1, 1, 1, 0)},
    "deep middle": {"channels": (16, 32, 32), "transformer_depth": (0, 2, 3), "scale_shift": True},
    "attention at the top only": {"channels": (16, 24), "transformer_depth": (2, 0)},
    "no attention": {"channels": (16, 24), "transformer_depth": (0, 0), "pooled_conditioning": True},
}


def randomise(network: torch.nn.Module, rng: torch.Generator) -> None:
    """Fill every weight with noise: zero-initialised branches would hide a wrong name."""
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * spread)


def unet_pair(name: str, rng: torch.Generator) -> tuple[UNet, UNet2DConditionModel]:
    ours = UNet(4, WIDTH, **({"head_dim": 8, "norm_groups": 8} | UNETS[name]))
    theirs = UNet2DConditionModel(**unet_config(ours, sample_size=16))
    return ours, theirs


def inputs(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    conditioning = Conditioning(
        tokens=torch.randn(2, 7, WIDTH, generator=rng),
        mask=torch.arange(7) < torch.tensor([[3], [7]]),
        pooled=torch.randn(2, WIDTH, generator=rng),
    )
    return torch.randn(2, 4, 16, 8, generator=rng), torch.tensor([0.0, 731.5]), conditioning


def run_theirs(
    theirs: UNet2DConditionModel, x: torch.Tensor, c_noise: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    return theirs(
        x,
        c_noise,
        encoder_hidden_states=conditioning.tokens,
        encoder_attention_mask=conditioning.mask,
        class_labels=conditioning.pooled if theirs.config.class_embed_type else None,
    ).sample


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet_to_diffusers(rng: torch.Generator, name: str) -> None:
    ours, theirs = unet_pair(name, rng)
    randomise(ours, rng)
    theirs.load_state_dict(unet_to_diffusers(ours.state_dict()))
    x, c_noise, conditioning = inputs(rng)
    expected = ours(x, c_noise, conditioning)
    assert expected.std() > 0.1
    torch.testing.assert_close(run_theirs(theirs, x, c_noise, conditioning), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet_from_diffusers(rng: torch.Generator, name: str) -> None:
    ours, theirs = unet_pair(name, rng)
    randomise(theirs, rng)
    ours.load_state_dict(unet_from_diffusers(theirs.state_dict()))
    x, c_noise, conditioning = inputs(rng)
    expected = run_theirs(theirs, x, c_noise, conditioning)
    torch.testing.assert_close(ours(x, c_noise, conditioning), expected, rtol=1e-5, atol=1e-5)
    again = unet_to_diffusers(ours.state_dict())
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())


def test_unet_gradients_agree(rng: torch.Generator) -> None:
    ours, theirs = unet_pair("tiny with pooled text", rng)
    randomise(ours, rng)
    theirs.load_state_dict(unet_to_diffusers(ours.state_dict()))
    x, c_noise, conditioning = inputs(rng)
    target = torch.randn(x.shape, generator=rng)
    (ours(x, c_noise, conditioning) - target).square().mean().backward()
    (run_theirs(theirs, x, c_noise, conditioning) - target).square().mean().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    moved = unet_to_diffusers(gradients)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            moved[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max())
        )


def test_stable_diffusion_2_names_every_weight() -> None:
    with torch.device("meta"):
        ours = UNet(4, 1024)
        theirs = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    moved = unet_to_diffusers(ours.state_dict())
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in moved.items()} == expected
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    config = unet_config(ours, sample_size=96)
    written_by_hand = dict(theirs.config)
    for key in ("down_block_types", "up_block_types", "attention_head_dim", "cross_attention_dim"):
        assert config[key] == written_by_hand[key]


@torch.no_grad()
def test_convolutions_around_attention_become_linear(rng: torch.Generator) -> None:
    """Stable Diffusion 1 projects into its transformers by 1x1 convolutions."""
    ours = UNet(4, WIDTH, (16, 32), 1, (0, 1), head_dim=8, norm_groups=8)
    theirs = UNet2DConditionModel(**(unet_config(ours) | {"use_linear_projection": False}))
    randomise(theirs, rng)
    ours.load_state_dict(unet_from_diffusers(theirs.state_dict()))
    x, c_noise, conditioning = inputs(rng)
    expected = run_theirs(theirs, x, c_noise, conditioning)
    torch.testing.assert_close(ours(x, c_noise, conditioning), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNETS)
def test_norms_have_the_same_epsilon(rng: torch.Generator, name: str) -> None:
    """An epsilon is in no state dict and too small to show in outputs of ordinary size."""
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    ours, theirs = (
        {f"{key}.weight": torch.tensor(m.eps) for key, m in network.named_modules() if isinstance(m, norms)}
        for network in unet_pair(name, rng)
    )
    assert unet_to_diffusers(ours) == theirs


def test_a_position_map_is_refused() -> None:
    ours = UNet(4, WIDTH, (16, 32), 1, (0, 1), head_dim=8, norm_groups=8, position_size=4)
    with pytest.raises(ValueError, match="position_size"):
        unet_to_diffusers(ours.state_dict())
    with pytest.raises(ValueError, match="position_size"):
        unet_config(ours)


def test_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        unet_config(UNet(4, WIDTH, (16, 32), 1, (0, 1), head_dim=8, norm_groups=8, patch_size=2))


@pytest.mark.parametrize("option", [{"patch_size": 2}, {"linear_path": True}])
def test_an_autoencoder_of_another_layout_is_refused(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"autoencoder\.patch_size=1 and"):
        autoencoder_config(Autoencoder((16,), 1, 3, False, norm_groups=8, **option))


def autoencoder_pair(levels: int, mid_attention: bool) -> tuple[Autoencoder, AutoencoderKL]:
    ours = Autoencoder((16, 16, 24, 32)[:levels], 1, 3, mid_attention, norm_groups=8)
    return ours, AutoencoderKL(**autoencoder_config(ours, sample_size=32))


@torch.no_grad()
@pytest.mark.parametrize("levels", [3, 4], ids=["f4", "f8"])
@pytest.mark.parametrize("mid_attention", [True, False])
def test_autoencoder_both_ways(rng: torch.Generator, levels: int, mid_attention: bool) -> None:
    ours, theirs = autoencoder_pair(levels, mid_attention)
    randomise(ours, rng)
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict()))
    images = torch.randn(2, 3, 32, 48, generator=rng)
    posterior = theirs.encode(images).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
    moments = ours.encode(images)
    torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-5)
    latents = ours.mode(moments)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-5, atol=1e-5)

    randomise(theirs, rng)
    ours.load_state_dict(autoencoder_from_diffusers(theirs.state_dict()))
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.mode(ours.encode(images)), theirs.encode(images).latent_dist.mode(), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_normalisation_is_folded_into_the_weights(rng: torch.Generator) -> None:
    ours, theirs = autoencoder_pair(3, True)
    randomise(ours, rng)
    ours.set_normalisation(torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 3.0, 7.0]))
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict()))
    assert theirs.config.scaling_factor == 1.0
    images, noise = torch.randn(2, 3, 32, 32, generator=rng), torch.randn(2, 3, 8, 8, generator=rng)
    latents = ours.sample(ours.encode(images), noise)
    posterior = theirs.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean + posterior.std * noise, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.decode(latents).sample, ours.decode(latents), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scaling_factor_becomes_the_normalisation(rng: torch.Generator) -> None:
    ours, theirs = autoencoder_pair(3, True)
    ours.load_state_dict(autoencoder_from_diffusers(theirs.state_dict(), 0.18215, 0.5))
    images = torch.randn(1, 3, 16, 16, generator=rng)
    expected = (theirs.encode(images).latent_dist.mode() - 0.5) * 0.18215
    torch.testing.assert_close(ours.mode(ours.encode(images)), expected, rtol=1e-5, atol=1e-5)


def test_stable_diffusion_autoencoder_names_every_weight() -> None:
    with torch.device("meta"):
        ours, theirs = Autoencoder(), AutoencoderKL(**autoencoder_config(Autoencoder(), 512))
    moved = autoencoder_to_diffusers(ours.state_dict())
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in moved.items()} == expected
