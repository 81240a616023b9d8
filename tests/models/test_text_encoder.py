"""Text: end-token padding, HTML, truncation, masks, causality, frozen towers, refusals without weights."""

import json
import logging
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.text_encoder import (
    END,
    START,
    OpenClipTextEncoder,
    TextEncoder,
    TextTransformer,
    Tokenizer,
    first_end,
)

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(12)


@pytest.fixture(scope="module")
def transformer() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(width=16, layers=2, heads=2, context_length=12)


@pytest.fixture(scope="module")
def tower_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text tower's config; open_clip is imported here, outside the timed tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip  # noqa: F401
    path = tmp_path_factory.mktemp("tower") / "small.json"
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": {}, "text_cfg": text}), encoding="utf-8")
    return path


def test_tokens_start_end_and_are_padded_with_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["a photo of a cat", ""])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 12)
    # The ids of CLIP's vocabulary, known from the published tokenizer.
    assert tokens[0].tolist() == [START, 320, 1125, 539, 320, 2368] + [END] * 6
    assert tokens[1].tolist() == [START] + [END] * 11


def test_html_case_and_spaces_do_not_matter(tokenizer: Tokenizer) -> None:
    plain = tokenizer(["salt & pepper"])
    assert torch.equal(tokenizer(["Salt &amp; Pepper"]), plain)
    assert torch.equal(tokenizer(["  salt &amp;amp;  pepper "]), plain)


def test_long_text_keeps_its_end_and_is_reported(tokenizer: Tokenizer) -> None:
    texts = ["dog " * 30, "dog " * 10, "dog " * 11]
    tokens = tokenizer(texts)
    assert tokens.shape == (3, 12)
    assert tokens[:, 0].tolist() == [START] * 3
    assert tokens[:, -1].tolist() == [END] * 3
    assert (tokens[:, 1:-1] < START).all()
    assert tokenizer.dropped(texts) == [20, 0, 1]


def test_a_caption_cannot_end_itself(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["cat <end_of_text> dog <start_of_text>"])
    assert first_end(tokens).item() == 3
    assert (tokens[0] == START).sum() == 1


@pytest.mark.parametrize("text", ["\x00", "é" * 40, "日本語の文章", "🙂🙃", "\u202eabc"])
def test_any_text_has_tokens(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer([text])
    assert tokens.shape == (1, 12)
    assert tokens[0, -1] == END


def test_tokenizer_is_light_to_send_and_equal_after(tokenizer: Tokenizer) -> None:
    tokenizer(["warm"])
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent)(["a cat"]), tokenizer(["a cat"]))


def test_tokenizer_does_not_import_the_package() -> None:
    code = (
        "import sys\nfrom models.text_encoder import Tokenizer\nTokenizer(8)(['a cat'])\n"
        "bad = [m for m in ('open_clip', 'torchvision', 'timm', 'lightning') if m in sys.modules]\n"
        "sys.exit(' '.join(bad) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_context_needs_room() -> None:
    with pytest.raises(ValueError, match="context_length 1"):
        Tokenizer(1)


def test_first_end_is_the_first_of_many() -> None:
    tokens = torch.tensor([[START, 5, END, END], [START, END, 7, END], [START, 5, 6, 7]])
    assert first_end(tokens).tolist() == [2, 1, 3]


@torch.no_grad()
def test_mask_and_pooled_stop_at_the_first_end(transformer: TextTransformer) -> None:
    conditioning = transformer.encode(["a cat", ""])
    assert conditioning.mask.sum(1).tolist() == [4, 2]
    assert conditioning.mask[0].tolist() == [True] * 4 + [False] * 8
    for i, length in enumerate((4, 2)):
        total = conditioning.tokens[i, :length].sum(0) / length**0.5
        torch.testing.assert_close(conditioning.pooled[i], total)
    assert conditioning.tokens.shape == (2, transformer.context_length, transformer.dim)


@torch.no_grad()
def test_states_do_not_see_later_tokens(transformer: TextTransformer) -> None:
    tokens = transformer.tokenize(["a cat on a mat"])
    changed = tokens.clone()
    changed[0, 4] = 1000
    before, after = transformer(tokens).tokens, transformer(changed).tokens
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    short = transformer(tokens[:, :6]).tokens
    torch.testing.assert_close(short, before[:, :6], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unmasked_padding_is_all_valid() -> None:
    encoder = TextTransformer(16, 1, 2, 12, mask_padding=False)
    conditioning = encoder.encode(["a cat"])
    assert conditioning.mask.all()
    torch.testing.assert_close(conditioning.pooled[0], conditioning.tokens[0, :4].sum(0) / 2)


def test_transformer_learns_and_is_float32_under_autocast(transformer: TextTransformer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        conditioning = transformer.encode(["a cat", "two dogs"])
    assert conditioning.tokens.dtype == torch.float32
    (conditioning.tokens.square() * torch.arange(16)).sum().backward()
    silent = [n for n, p in transformer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert silent == []


def test_the_interface_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        TextEncoder(8, 8, True)  # type: ignore[abstract]


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="heads 3"):
        TextTransformer(16, 1, 3)


def test_random_tower_is_frozen_and_said_loudly(tower_json: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder = OpenClipTextEncoder(str(tower_json), allow_random=True, context_length=10)
    assert "RANDOM" in caplog.text
    assert (encoder.dim, encoder.context_length) == (32, 10)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training
    conditioning = encoder.encode(["a cat", ""])
    assert conditioning.tokens.shape == (2, 10, 32)
    assert conditioning.mask.sum(1).tolist() == [4, 2]
    assert torch.equal(conditioning.pooled[1], conditioning.tokens[1, 1])
    assert not conditioning.tokens.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "text.", "module.text."])
def test_local_weights_give_the_towers_own_states(tower_json: Path, tmp_path: Path, prefix: str) -> None:
    from open_clip.transformer import TextTransformer as Tower

    tower = Tower(20, 49408, 32, 4, 2, output_dim=24, output_tokens=True)
    state = {**tower.state_dict(), "visual.proj": torch.zeros(3)}
    path = tmp_path / "weights.safetensors"
    save_file({f"{prefix}{key}": value for key, value in state.items()}, path)
    encoder = OpenClipTextEncoder(str(tower_json), str(path))
    tokens = encoder.tokenize(["a cat", "many words in this one"])
    torch.testing.assert_close(encoder(tokens).tokens, tower(tokens)[1])
    shorter = OpenClipTextEncoder(str(tower_json), str(path), context_length=8)
    states = shorter.encode(["a cat"]).tokens
    torch.testing.assert_close(states, tower(tokens)[1][:1, :8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "pretrained", "error", "message"),
    [
        ("ViT-B-32", None, ValueError, "allow_random"),
        ("ViT-B-32", "laion2b_s34b_b79k", FileNotFoundError, "laion2b_s34b_b79k.*local file"),
        ("ViT-B-32", "no_such_tag", ValueError, "known tags are openai"),
        ("ViT-B-32", "missing.safetensors", FileNotFoundError, r"no file missing\.safetensors"),
        ("ViT-B33", "openai", ValueError, "did you mean"),
        ("ViT-B-16-SigLIP", "webli", ValueError, "no_causal_mask"),
    ],
)
def test_missing_weights_are_refused_at_once(
    tower_json: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    pretrained: str | None,
    error: type[Exception],
    message: str,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(error, match=message):
        OpenClipTextEncoder(model, pretrained)
    assert time.monotonic() - start < 2


def test_weights_that_could_hold_code_are_refused(tower_json: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"positional_embedding": torch.zeros(20, 32)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt: not safetensors"):
        OpenClipTextEncoder(str(tower_json), str(path))


def test_weights_of_another_model_are_refused(tower_json: Path, tmp_path: Path) -> None:
    from open_clip.transformer import TextTransformer as Tower

    path = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no text tower's weights"):
        OpenClipTextEncoder(str(tower_json), str(path))
    save_file(Tower(20, 49408, 16, 4, 2, output_dim=None).state_dict(), path)
    with pytest.raises(ValueError, match="another model"):
        OpenClipTextEncoder(str(tower_json), str(path))


def test_context_longer_than_the_towers_is_refused(tower_json: Path) -> None:
    with pytest.raises(ValueError, match="more than the 20"):
        OpenClipTextEncoder(str(tower_json), allow_random=True, context_length=21)
