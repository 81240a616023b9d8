"""UNet: shapes, masks, memory format, position map, refusals, compilation, Stable Diffusion 2's size."""

import pytest
import torch

from models.conditioning import Conditioning
from models.unet import UNet, position_waves

LENGTH, WIDTH = 6, 12


def randomise(network: torch.nn.Module, rng: torch.Generator) -> None:
    """Fill every weight with noise: a fresh network is silent, and a silent network passes any comparison."""
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * spread)


@pytest.fixture
def unet(rng: torch.Generator) -> UNet:
    network = UNet(
        4,
        WIDTH,
        channels=(16, 24, 32),
        blocks_per_level=2,
        transformer_depth=(0, 1, 2),
        head_dim=8,
        scale_shift=True,
        pooled_conditioning=True,
        position_size=8,
        norm_groups=8,
    )
    randomise(network, rng)
    return network


@pytest.fixture
def conditioning(rng: torch.Generator) -> Conditioning:
    return Conditioning(
        tokens=torch.randn(2, LENGTH, WIDTH, generator=rng),
        mask=torch.arange(LENGTH) < torch.tensor([[3], [6]]),
        pooled=torch.randn(2, WIDTH, generator=rng),
    )


@pytest.fixture
def x(rng: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=rng)


C_NOISE = torch.tensor([10.0, 900.0])


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 8)])
def test_output_has_the_shape_of_the_input(
    unet: UNet, conditioning: Conditioning, rng: torch.Generator, size: tuple[int, int]
) -> None:
    latents = torch.randn(2, 4, *size, generator=rng)
    result = unet(latents, C_NOISE, conditioning)
    assert result.shape == latents.shape
    assert torch.isfinite(result).all()


@torch.no_grad()
def test_padding_is_hidden(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    before = unet(x, C_NOISE, conditioning)
    tokens = conditioning.tokens.clone()
    tokens[0, 3:] = 100.0
    padded = Conditioning(tokens, conditioning.mask, conditioning.pooled)
    assert torch.equal(unet(x, C_NOISE, padded), before)
    tokens[0, 2] += 1.0
    changed = unet(x, C_NOISE, Conditioning(tokens, conditioning.mask, conditioning.pooled))
    assert not torch.allclose(changed[0], before[0])
    assert torch.allclose(changed[1], before[1])


@torch.no_grad()
def test_everything_told_to_the_network_matters(
    unet: UNet, conditioning: Conditioning, x: torch.Tensor
) -> None:
    before = unet(x, C_NOISE, conditioning)
    pooled = Conditioning(conditioning.tokens, conditioning.mask, conditioning.pooled + 1)
    assert not torch.allclose(unet(x, C_NOISE, pooled), before)
    assert not torch.allclose(unet(x, C_NOISE + 50, conditioning), before)
    tokens = Conditioning(conditioning.tokens.flip(2), conditioning.mask, conditioning.pooled)
    assert not torch.allclose(unet(x, C_NOISE, tokens), before)


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    together = unet(x, C_NOISE, conditioning)
    alone = Conditioning(conditioning.tokens[1:], conditioning.mask[1:], conditioning.pooled[1:])
    torch.testing.assert_close(unet(x[1:], C_NOISE[1:], alone), together[1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_channels_last_gives_the_same(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    expected = unet(x, C_NOISE, conditioning)
    unet.to(memory_format=torch.channels_last)
    result = unet(x.to(memory_format=torch.channels_last), C_NOISE, conditioning)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_channels_last_reaches_every_convolution(
    unet: UNet, conditioning: Conditioning, x: torch.Tensor
) -> None:
    unet.to(memory_format=torch.channels_last)
    strayed: list[str] = []

    def watch(name: str) -> None:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if not inputs[0].is_contiguous(memory_format=torch.channels_last):
                strayed.append(name)

        unet.get_submodule(name).register_forward_pre_hook(hook)

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            watch(name)
    unet(x.to(memory_format=torch.channels_last), C_NOISE, conditioning)
    assert strayed == []


@torch.no_grad()
def test_position_map_breaks_translation_and_is_resized(
    unet: UNet, conditioning: Conditioning, x: torch.Tensor, rng: torch.Generator
) -> None:
    assert unet.position is not None
    before = unet(x, C_NOISE, conditioning)
    latents = torch.randn(2, 4, 16, 16, generator=rng)
    ramp = torch.linspace(-1, 1, 8).expand(1, 16, 8, 8)
    unet.position.copy_(ramp)
    assert not torch.allclose(unet(x, C_NOISE, conditioning), before)
    resized = unet(latents, C_NOISE, conditioning)
    exact = torch.nn.functional.interpolate(ramp, size=(16, 16), mode="bilinear", align_corners=False)
    unet.position = torch.nn.Parameter(exact)
    torch.testing.assert_close(unet(latents, C_NOISE, conditioning), resized)


@torch.no_grad()
def test_patches_are_the_same_network_on_unshuffled_latents(
    conditioning: Conditioning, x: torch.Tensor, rng: torch.Generator
) -> None:
    """Patches of 2x2 are channels of a network that knows nothing of patches."""
    options = {"channels": (16, 32), "blocks_per_level": 1, "transformer_depth": (0, 1), "head_dim": 8}
    patched = UNet(4, WIDTH, **options, norm_groups=8, patch_size=2)
    plain = UNet(16, WIDTH, **options, norm_groups=8)
    randomise(patched, rng)
    plain.load_state_dict(patched.state_dict())
    unshuffled = torch.nn.functional.pixel_unshuffle(x, 2)
    expected = torch.nn.functional.pixel_shuffle(plain(unshuffled, C_NOISE, conditioning), 2)
    torch.testing.assert_close(patched(x, C_NOISE, conditioning), expected)
    assert patched.min_divisor == 2 * plain.min_divisor


def test_position_waves_tell_every_place_apart() -> None:
    """At the start no two places have the same position vector, and left differs from right."""
    waves = position_waves(16, 8)[0].flatten(1)
    distances = torch.cdist(waves.T, waves.T) + torch.eye(64)
    assert distances.min() > 0.1


def test_a_fresh_network_predicts_zero(conditioning: Conditioning, x: torch.Tensor) -> None:
    network = UNet(4, WIDTH, channels=(16, 32), transformer_depth=(0, 1), head_dim=8, norm_groups=8)
    assert network(x, C_NOISE, conditioning).abs().max() == 0


def test_every_weight_gets_a_gradient(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    unet(x, C_NOISE, conditioning).square().mean().backward()
    silent = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert silent == []


def test_attention_follows_the_depths(conditioning: Conditioning, x: torch.Tensor) -> None:
    network = UNet(4, WIDTH, channels=(16, 32), transformer_depth=(0, 0), norm_groups=8)
    assert not any("transformers" in name for name, _ in network.named_parameters())
    assert network(x, C_NOISE, conditioning).shape == x.shape
    network = UNet(4, WIDTH, (16, 32), 1, transformer_depth=(3, 0), head_dim=8, norm_groups=8)
    assert len(network.middle.transformers[0].blocks) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer_depth": (0, 1, 1)}, "3 entries for 2 levels"),
        ({"norm_groups": 5}, "norm_groups 5"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"blocks_per_level": 0}, "blocks_per_level"),
        ({"channels": (), "transformer_depth": ()}, "at least one level"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "channels": (16, 32),
        "transformer_depth": (0, 1),
        "head_dim": 8,
        "norm_groups": 8,
    }
    with pytest.raises(ValueError, match=message):
        UNet(4, WIDTH, **(good | settings))


@pytest.mark.parametrize(("size", "nearest"), [((8, 10), "nearest 8 or 12"), ((2, 8), "nearest 4")])
def test_latents_that_do_not_halve_are_refused(
    unet: UNet, conditioning: Conditioning, size: tuple[int, int], nearest: str
) -> None:
    assert unet.min_divisor == 4
    with pytest.raises(ValueError, match=nearest):
        unet(torch.zeros(2, 4, *size), C_NOISE, conditioning)


def test_bfloat16_autocast_keeps_near(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    exact = unet(x, C_NOISE, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        rough = unet(x, C_NOISE, conditioning)
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@torch.no_grad()
def test_pure_bfloat16_runs(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    assert unet.bfloat16()(x.bfloat16(), C_NOISE, conditioning).dtype == torch.bfloat16


def test_stable_diffusion_2_has_its_size() -> None:
    with torch.device("meta"):
        network = UNet(4, 1024)
        conditioning = Conditioning(
            torch.zeros(2, 77, 1024), torch.ones(2, 77, dtype=torch.bool), torch.zeros(2, 1024)
        )
        result = network(torch.zeros(2, 4, 96, 96), torch.zeros(2), conditioning)
    assert result.shape == (2, 4, 96, 96)
    assert sum(p.numel() for p in network.parameters()) == 865_910_724


@pytest.mark.slow
def test_compiles_as_one_graph(unet: UNet, conditioning: Conditioning, x: torch.Tensor) -> None:
    expected = unet(x, C_NOISE, conditioning)
    compiled = torch.compile(unet, fullgraph=True)
    torch.testing.assert_close(compiled(x, C_NOISE, conditioning), expected, rtol=1e-3, atol=1e-3)


def test_traces_as_one_graph(conditioning: Conditioning, x: torch.Tensor, rng: torch.Generator) -> None:
    unet = UNet(4, WIDTH, (16, 32), 1, (0, 1), 8, True, True, position_size=4, norm_groups=8)
    randomise(unet, rng)
    null = Conditioning(conditioning.tokens[:1], conditioning.mask[:1], conditioning.pooled[:1])
    where = torch.tensor([True, False])

    def step(latents: torch.Tensor, given: Conditioning) -> torch.Tensor:
        return unet(latents, C_NOISE, given.replace(where, null))

    traced = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x, conditioning), step(x, conditioning), rtol=1e-5, atol=1e-5)


@pytest.fixture
def editor(rng: torch.Generator) -> UNet:
    network = UNet(
        4, WIDTH, channels=(16, 24), blocks_per_level=1, transformer_depth=(0, 1), head_dim=8,
        patch_size=2, norm_groups=8, image_conditioning=True,
    )  # fmt: skip
    randomise(network, rng)
    return network


@torch.no_grad()
def test_a_picture_beside_x_matters(
    editor: UNet, conditioning: Conditioning, x: torch.Tensor, rng: torch.Generator
) -> None:
    image = torch.randn(x.shape, generator=rng)
    told = editor(x, C_NOISE, conditioning.with_image(image))
    assert told.shape == x.shape
    nothing = editor(x, C_NOISE, conditioning.with_image(torch.zeros_like(x)))
    assert not torch.allclose(told, nothing)
    assert torch.equal(editor(x, C_NOISE, conditioning), nothing), "no picture is a picture of zeros"
    alone = editor(x, C_NOISE, conditioning.with_image(torch.stack([image[0], torch.zeros_like(image[1])])))
    torch.testing.assert_close(alone[0], told[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[1], nothing[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_first_inputs_are_those_of_x(
    editor: UNet, conditioning: Conditioning, x: torch.Tensor, rng: torch.Generator
) -> None:
    """With zeros for the second half of the first convolution the picture is not seen, and x is as ever."""
    plain = UNet(
        4, WIDTH, channels=(16, 24), blocks_per_level=1, transformer_depth=(0, 1), head_dim=8,
        patch_size=2, norm_groups=8,
    )  # fmt: skip
    state = editor.state_dict()
    inputs = plain.conv_in.weight.shape[1]
    assert state["conv_in.weight"].shape[1] == 2 * inputs
    plain.load_state_dict(state | {"conv_in.weight": state["conv_in.weight"][:, :inputs]})
    editor.conv_in.weight[:, inputs:] = 0
    told = conditioning.with_image(torch.randn(x.shape, generator=rng))
    torch.testing.assert_close(editor(x, C_NOISE, told), plain(x, C_NOISE, conditioning))


def test_pictures_that_do_not_fit_are_refused(
    editor: UNet, unet: UNet, conditioning: Conditioning, x: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="this backbone takes none"):
        unet(x, C_NOISE, conditioning.with_image(x))
    with pytest.raises(ValueError, match="both are of one shape"):
        editor(x, C_NOISE, conditioning.with_image(x[:, :, :4, :4]))
