"""Features: a row is its picture's alone, weights are named by their hash, other files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.landscapes import draw_scene, render
from evaluation.adherence import AdherenceJudge, JudgeError, save_judge
from evaluation.clip import load_clip
from evaluation.features import FeatureNetwork, judge_features, open_features
from evaluation.retrieval import ClipTower
from models.checkpoint import CheckpointError
from models.registry import ConfigError


def pictures(count: int, side: int = 64) -> Tensor:
    pixels = np.stack([render(draw_scene(3, index), side) for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def judge() -> AdherenceJudge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdherenceJudge(width=4).eval()


def assert_rows_stand_alone(network: FeatureNetwork, images: Tensor) -> None:
    """All together, each alone, any part, on one thread and on two: the same features to the bit."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = network.features(images)
        torch.set_num_threads(2)
        assert torch.equal(network.features(images), whole)
        assert torch.equal(network.features(images.flip(0)).flip(0), whole)
        assert torch.equal(torch.cat([network.features(image[None]) for image in images[-3:]]), whole[-3:])
        assert torch.equal(network.features(images[1:]), whole[1:])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert whole.shape == (len(images), network.dim)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert len(whole.unique(dim=0)) == len(images)
    assert network.features(images[:0]).shape == (0, network.dim)


@pytest.mark.parametrize("side", [64, 128, 32])
def test_rows_of_the_judge_stand_alone(judge: AdherenceJudge, side: int) -> None:
    assert_rows_stand_alone(judge_features(judge), pictures(67, side))


def test_the_judge_is_read_with_its_hash(judge: AdherenceJudge, tmp_path: Path) -> None:
    save_judge(judge, tmp_path)
    network = open_features("judge", tmp_path)
    assert network.sha256 == json.loads((tmp_path / "judge.json").read_text())["sha256"]
    images = pictures(5)
    assert torch.equal(network.features(images), judge_features(judge).features(images))
    torch.testing.assert_close(network.features(images), judge.embed(images.float() / 127.5 - 1))


def test_what_is_no_picture_or_no_network_is_refused(judge: AdherenceJudge, tmp_path: Path) -> None:
    network = judge_features(judge)
    for wrong in (pictures(2).float(), pictures(2)[:, :1], pictures(2)[0]):
        with pytest.raises(ValueError, match="give uint8"):
            network.features(wrong)
    with pytest.raises(ConfigError, match="no feature network 'jugde' \\(did you mean 'judge'"):
        open_features("jugde", tmp_path)
    with pytest.raises(JudgeError, match="no judge can be read"):
        open_features("judge", tmp_path)


def random_weights(network: nn.Module, path: Path, drop: str = "?") -> Path:
    """A file of a network's weights, its running statistics moved so that they matter."""
    rng = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=rng)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5, generator=rng)  # type: ignore[union-attr]
    state = {name: value.contiguous() for name, value in network.state_dict().items() if name != drop}
    save_file(state, path)
    return path


@pytest.fixture
def clip_config(tmp_path: Path) -> Path:
    """A CLIP of open_clip's that is small enough for every day: its real towers, two layers each."""
    tower = {"layers": 2, "width": 32}
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 16, **tower},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, **tower},
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    return path


def test_clip_from_a_local_file(clip_config: Path, tmp_path: Path) -> None:
    import open_clip

    config = json.loads(clip_config.read_text())
    network = open_clip.CLIP(**config).eval()
    path = random_weights(network, tmp_path / "clip.safetensors")
    features = open_features(f"clip:{clip_config}", path)
    images = pictures(19, 32)
    assert_rows_stand_alone(features, images)
    mean, std = (
        torch.tensor(each).view(3, 1, 1)
        for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        wanted = network.encode_image((images / 255 - mean) / std, normalize=True)
        texts = network.encode_text(open_clip.tokenize(["a sea at night", ""], 16), normalize=True)
    torch.testing.assert_close(features.features(images), wanted)
    tower = ClipTower(load_clip(str(clip_config), path))
    torch.testing.assert_close(tower.embed_pictures(images), wanted)
    # Texts are padded by the end token, as CLIP's own zeros come after what the causal tower looks at.
    found = tower.embed_texts(["a sea at night", ""])
    assert found.shape == (2, 24)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found, texts)
    assert tower.sha256 == features.sha256
    assert open_features(f"clip:{clip_config}", path).features(pictures(2, 64)).shape == (2, 24)


def test_files_of_other_networks_are_refused(clip_config: Path, tmp_path: Path) -> None:
    name = f"clip:{clip_config}"
    other = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(1_008, 2), "cls_token": torch.zeros(1, 1, 7)}, other)
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(b"PK\x03\x04" + bytes(100))
    for kind, path, message in [
        ("inception", other, "another network|it is another"),
        ("dinov2", other, "no DINOv2 in timm's layout"),
        (name, other, "it is another network"),
        ("inception", pickled, "not safetensors"),
        ("dinov2", tmp_path / "absent.safetensors", "cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_features(kind, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="needs its model"):
        open_features("clip", other)
    with pytest.raises(ConfigError, match="no model ViT-B-33"):
        open_features("clip:ViT-B-33", other)
    with pytest.raises(ConfigError, match="no feature network 'inception:x'"):
        open_features("inception:x", other)


@pytest.mark.slow
def test_inception_of_published_distances(tmp_path: Path) -> None:
    """Against torchvision's network: the same but for the pooling, which the last two blocks show."""
    from torchvision.models import Inception3

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = Inception3(1_008, aux_logits=True, init_weights=False).eval()
        plain = Inception3(1_000, aux_logits=False, init_weights=False).eval()
    images = pictures(9)
    published = open_features("inception", random_weights(ours, tmp_path / "fid.safetensors"))
    assert_rows_stand_alone(published, images)
    vision = open_features("inception", random_weights(plain, tmp_path / "vision.safetensors"))
    assert (published.dim, vision.dim) == (2_048, 2_048)
    assert "published" in published.name
    assert "torchvision" in vision.name
    plain.fc = nn.Identity()
    large = nn.functional.interpolate(images.float(), (299, 299), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(vision.features(images), plain((large - 128) / 128), rtol=1e-4, atol=1e-5)
        ours.fc = nn.Identity()
        assert not torch.allclose(published.features(images), ours((large - 128) / 128), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("registers", ["", "reg4_"])
def test_dinov2_from_a_local_file(tmp_path: Path, registers: str) -> None:
    import timm

    model = f"vit_small_patch14_{registers}dinov2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(model, pretrained=False, num_classes=0, img_size=518).eval()
    network_file = random_weights(network, tmp_path / "dino.safetensors")
    features = open_features("dinov2", network_file)
    assert (features.name, features.dim) == (f"dinov2 {model}", 384)
    assert_rows_stand_alone(features, pictures(9))
    with pytest.raises(CheckpointError, match=r"no norm\.weight"):
        open_features("dinov2", random_weights(network, tmp_path / "less.safetensors", drop="norm.weight"))
