"""Autoencoder: shapes, moments, normalisation, the divergence, refusals."""

import pytest
import torch
from torch.nn import functional as F

from models.autoencoder import Autoencoder


def small(
    levels: int = 3, mid_attention: bool = True, patch_size: int = 1, linear_path: bool = False
) -> Autoencoder:
    channels = (8, 16, 16, 24)[:levels]
    return Autoencoder(channels, 1, 3, mid_attention, 4, patch_size=patch_size, linear_path=linear_path)


@torch.no_grad()
@pytest.mark.parametrize(("levels", "patch_size"), [(1, 1), (3, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("mid_attention", [True, False])
def test_shapes(rng: torch.Generator, levels: int, patch_size: int, mid_attention: bool) -> None:
    autoencoder = small(levels, mid_attention, patch_size)
    factor = patch_size * 2 ** (levels - 1)
    assert autoencoder.factor == factor
    images = torch.randn(2, 3, 16, 24, generator=rng)
    moments = autoencoder.encode(images)
    assert moments.shape == (2, 6, 16 // factor, 24 // factor)
    latents = autoencoder.mode(moments)
    assert latents.shape == (2, 3, 16 // factor, 24 // factor)
    assert autoencoder.decode(latents).shape == images.shape
    assert autoencoder.kl(moments).shape == (2,)


@pytest.mark.parametrize("linear_path", [False, True])
def test_every_weight_gets_a_gradient_once_the_branches_speak(
    rng: torch.Generator, linear_path: bool
) -> None:
    autoencoder = small(linear_path=linear_path)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    images = torch.randn(1, 3, 16, 16, generator=rng)
    moments = autoencoder.encode(images)
    noise = torch.randn(1, 3, 4, 4, generator=rng)
    loss = (autoencoder.decode(autoencoder.sample(moments, noise)) - images).abs().mean()
    (loss + 1e-3 * autoencoder.kl(moments).mean()).backward()
    silent = [n for n, p in autoencoder.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # A key's bias moves all scores of a query alike, which the softmax does not see.
    assert all(name.endswith("attention.key.bias") for name in silent)


@torch.no_grad()
def test_log_variance_is_clamped(rng: torch.Generator) -> None:
    autoencoder = small()
    autoencoder.quant_conv.bias[3:] = torch.tensor([-1e3, 0.0, 1e3])
    log_variance = autoencoder.encode(torch.randn(1, 3, 16, 16, generator=rng)).chunk(2, dim=1)[1]
    assert (log_variance[:, 0] == -30).all()
    assert (log_variance[:, 2] == 20).all()


@torch.no_grad()
def test_sample_has_the_moments_it_is_given(rng: torch.Generator) -> None:
    autoencoder = small()
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 1.0, 2.0])
    moments = torch.cat([mean, 2 * std.log()]).reshape(1, 6, 1, 1).expand(64, 6, 8, 8)
    latents = autoencoder.sample(moments, torch.randn(64, 3, 8, 8, generator=rng))
    torch.testing.assert_close(latents.mean((0, 2, 3)), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(latents.std((0, 2, 3)), std, rtol=0.05, atol=0)
    assert torch.equal(autoencoder.mode(moments), moments[:, :3])


@torch.no_grad()
def test_normalisation_gives_unit_latents_and_is_undone_by_decode(rng: torch.Generator) -> None:
    autoencoder = small()
    moments = autoencoder.encode(torch.randn(4, 3, 32, 32, generator=rng))
    raw = autoencoder.mode(moments)
    image = autoencoder.decode(raw)
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    autoencoder.set_normalisation(mean, std)
    latents = autoencoder.mode(moments)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(autoencoder.decode(latents), image, rtol=1e-4, atol=1e-5)
    assert {"latent_mean", "latent_std"} <= autoencoder.state_dict().keys()


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_useless_statistics_are_refused(std: float) -> None:
    autoencoder = small()
    with pytest.raises(ValueError, match="not usable"):
        autoencoder.set_normalisation(torch.zeros(3), torch.tensor([1.0, std, 1.0]))


def test_kl_is_the_closed_form(rng: torch.Generator) -> None:
    autoencoder = small()
    moments = torch.randn(2, 6, 2, 2, generator=rng)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    exact = torch.distributions.kl_divergence(posterior, prior).sum((1, 2, 3))
    torch.testing.assert_close(autoencoder.kl(moments), exact)
    assert autoencoder.kl(torch.zeros(1, 6, 2, 2)).item() == 0


@torch.no_grad()
def test_channels_last_gives_the_same(rng: torch.Generator) -> None:
    autoencoder = small()
    images = torch.randn(2, 3, 16, 16, generator=rng)
    expected = autoencoder.decode(autoencoder.mode(autoencoder.encode(images)))
    autoencoder.to(memory_format=torch.channels_last)
    last = images.to(memory_format=torch.channels_last)
    result = autoencoder.decode(autoencoder.mode(autoencoder.encode(last)))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patch_is_what_a_convolution_of_its_size_and_stride_sees(rng: torch.Generator) -> None:
    """Alone in a grid of one position, the middle of the kernel sees the p x p pixels of its patch."""
    autoencoder = small(1, patch_size=4)
    images = torch.randn(2, 3, 4, 4, generator=rng)
    conv = autoencoder.encoder.conv_in
    kernel = conv.weight[:, :, 1, 1].unflatten(1, (3, 4, 4))
    expected = F.conv2d(images, kernel, conv.bias, stride=4)
    seen: list[torch.Tensor] = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    autoencoder.encode(images)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_patches_come_out_where_they_went_in(rng: torch.Generator) -> None:
    """A decoder of which only the bias of its last layer speaks repeats one patch over the picture."""
    autoencoder = small(1, patch_size=2)
    patch = torch.randn(3, 2, 2, generator=rng)
    last = autoencoder.decoder.conv_out
    last.weight.zero_()
    last.bias.copy_(patch.flatten())
    decoded = autoencoder.decode(torch.randn(1, 3, 4, 6, generator=rng))
    assert torch.equal(decoded[0], patch.repeat(1, 4, 6))


@torch.no_grad()
def test_the_linear_path_is_linear_and_goes_past_all_layers(rng: torch.Generator) -> None:
    """With the layers' last word silenced, a patch that repeats is coded and decoded by two matrices."""
    autoencoder = small(2, patch_size=2, linear_path=True)
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    assert encoder.linear is not None
    assert decoder.linear is not None
    for last in (encoder.conv_out, decoder.conv_out, encoder.linear, decoder.linear):
        last.bias.zero_()
    for last in (encoder.conv_out, decoder.conv_out):
        last.weight.zero_()
    images = torch.randn(2, 3, 8, 8, generator=rng)
    features = encoder(images)
    pixels = images[:, :, 4:8, 0:4].flatten(1)  # the 4 x 4 of position (1, 0)
    torch.testing.assert_close(features[:, :, 1, 0], pixels @ encoder.linear.weight[:, :, 0, 0].T)

    alone = torch.zeros(1, 3, 3, 3)
    alone[0, :, 1, 1] = torch.randn(3, generator=rng)
    patch = decoder.linear.weight[:, :, 1, 1] @ alone[0, :, 1, 1]
    torch.testing.assert_close(decoder(alone)[0, :, 4:8, 4:8], patch.reshape(3, 4, 4))


@torch.no_grad()
def test_patches_of_one_pixel_are_pixels(rng: torch.Generator) -> None:
    """Checkpoints that know of no patches are those of patches of one pixel, to the bit."""
    autoencoder = small(patch_size=1)
    assert autoencoder.state_dict().keys() == small(patch_size=2).state_dict().keys()
    images = torch.randn(1, 3, 8, 8, generator=rng)
    first = autoencoder.encoder.conv_in
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    autoencoder.encode(images)
    assert torch.equal(seen[0], images)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        small().encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="multiple of 8"):
        small(2, patch_size=4).encode(torch.zeros(1, 3, 16, 12))
    with pytest.raises(ValueError, match="patch_size is 0"):
        small(patch_size=0)
    with pytest.raises(ValueError, match="norm_groups 32"):
        Autoencoder((48, 64))


def test_stable_diffusion_has_its_size() -> None:
    with torch.device("meta"):
        autoencoder = Autoencoder()
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
