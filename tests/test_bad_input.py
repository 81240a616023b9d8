"""What a person can get wrong: the right exit code and one line that helps, never a traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from conf.cli import FOLDER, quoted
from conf.schema import plain, register

Command = Callable[..., int]
SMALL = (
    "rendered.images=8", "rendered.held_out=2", "data.resolution=32", "data.workers=0",
    "autoencoder=f4c4", "optimizer/autoencoder=adamw", "optimizer/diffusion=adamw",
    "autoencoder.channels=[8,8,8]", "autoencoder.norm_groups=4", "backbone.channels=[16,16]",
    "backbone.norm_groups=4", "backbone.head_dim=16", "backbone.transformer_depth=[0,1]",
    "text_encoder.width=16", "text_encoder.layers=1", "text_encoder.heads=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(command: Command, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to fail with that exit code; returns the line it says why in."""

    def run(code: int, script: str, *words: str) -> str:
        assert command(script, *words) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert error.startswith(f"{script}.py: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["backbone.chanels=[8]"], 2, "did you mean 'backbone.channels'?"),
        (["+backbone.nonsense=1"], 2, "backbone: there is no key 'nonsense'"),
        (["seed=many"], 2, "seed: Value 'many'"),
        (["experiment=flower"], 2, "there is no experiment=flower (did you mean 'flowers'?)"),
        (["backbone._target_=os.system"], 2, "_target_ is not accepted"),
        (["backbone.channels=[1"], 2, "no viable alternative at input '[1'"),
        (["stages=[]"], 2, "stages is empty"),
        (["trainer.accelerator=tpu"], 2, "expected one of [auto, cpu, cuda]"),
        (["conditioning_dropout=1.5"], 2, "conditioning_dropout is 1.5"),
        (["data.workers=-1"], 2, "data.workers is -1"),
        (["data.resolution=50"], 2, "data.resolution is 50, but autoencoder and backbone need "
         "a multiple of 16; the nearest are 48 and 64"),
        (["data.resolution=48"], 2, "resolution 48 is not a power of two"),
        (["sampling.num_steps=0"], 2, "num_steps is 0"),
        (["sampling.guidance_scale=nan"], 2, "guidance_scale is nan"),
        (["objective/parameterization=eps"], 2, "use parameterization=v or flow"),
        (["text_encoder=vit_b_32"], 2, "set pretrained to a local file"),
        (["data.shards=absent"], 3, "absent: no such file or folder"),
        (["data.shards=empty"], 3, "empty: the folder is empty"),
        (["data.shards=pipe:ls"], 3, "only local files, http(s) and s3 are read"),
        (["data.max_bad_fraction=2"], 2, "max_bad_fraction=2.0; it must be from 0 to 1"),
        (["data.val_fraction=1"], 2, "val_fraction is 1"),
        (["folder=occupied"], 5, "occupied"),
        (["folder=/proc/absent"], 5, "/proc/absent"),
    ],
)  # fmt: skip
def test_train(words: list[str], code: int, said: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").write_text("a file")
    small = SMALL if not any("vit_b_32" in word for word in words) else SMALL[:-3]
    assert said in refused(code, "train", *small, *words)
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))


def test_debug_shows_where(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "stages=[]", "debug=true") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def model(make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny_config)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["prompt=sea"], 2, "checkpoint is not set"),
        (["checkpoint=run"], 2, "give either prompt="),
        (["checkpoint=run", "prompt=sea", "prompts_file=p.txt"], 2, "give either prompt="),
        (["checkpoint=run", "prompts_file=p.txt"], 2, "there is no file p.txt"),
        (["checkpoint=run", "prompts_file=blank.txt"], 2, "holds no prompt"),
        (["checkpoint=run", "prompt=sea", "num_steps=0"], 2, "num_steps is 0, but must be from 1 to"),
        (["checkpoint=run", "prompt=sea", "num_images=0"], 2, "num_images is 0"),
        (["checkpoint=run", "prompt=sea", "guidance_scale=nan"], 2, "guidance_scale is nan"),
        (["checkpoint=run", "prompt=sea", "size=20"], 2, "the nearest are 16 and 24"),
        (["checkpoint=run", "prompt=sea", "device=tpu"], 2, "must be auto, cpu or cuda"),
        (["checkpoint=run", "prompt=sea", "guidance=3"], 2, "Config group override must be a string"),
        (["checkpoint=run", "prompt=sea", "guidanse_scale=3"], 2, "did you mean 'guidance_scale'?"),
        (["checkpoint=run", "prompt=sea", "guidance_scale=1e9"], 2, "must be a number up to 1000"),
        (["checkpoint=run", "prompt=sea", "num_steps=999999"], 2, "must be from 1 to 10,000"),
        (["checkpoint=run", "prompt=sea", "num_images=9999999"], 2, "must be from 1 to 1,000,000"),
        (["checkpoint=run", "prompt=sea", "batch_size=0"], 2, "batch_size is 0"),
        (["checkpoint=run", "prompt=sea", "size=1000000"], 2, "with tiled=true up to 1024"),
        (["checkpoint=run", "prompt=sea", "size=[16,sea]"], 2, "must be a number of pixels"),
        (["checkpoint=run", "prompt=sea", "size=[16,16,16]"], 2, "must be a number of pixels"),
        (["checkpoint=run", "prompt=sea", "wrap=true"], 2, "set tiled=true as well"),
        (["checkpoint=run", "prompt=sea", "variation=2"], 2, "variation is 2"),
        (["checkpoint=run", "prompt=sea", "strength=0.5"], 2, "there is no image to start from"),
        (["checkpoint=run", "prompt=sea", "image=photo.png", "strength=0"], 2, "strength is 0.0"),
        (["checkpoint=run", "prompt=sea", "image=photo.png", "strength=1.5"], 2, "strength is 1.5"),
        (["checkpoint=run", "prompt=sea", "image=none.png"], 3, "image: there is no file none.png"),
        (["checkpoint=run", "prompt=sea", "image=blank.txt"], 3, "image: blank.txt cannot be used"),
        (["checkpoint=run", "prompt=sea", "image=empty"], 5, "empty: Is a directory"),
        (["checkpoint=run", "prompt=sea", "mask=photo.png"], 2, "mask needs a picture"),
        (["checkpoint=run", "prompt=sea", "image=photo.png", "mask=small.png"], 3, "make them one size"),
        (["checkpoint=run", "prompt=sea", "image=photo.png", "extend=[1,2]"], 2, "left, top, right, bottom"),
        (["checkpoint=run", "prompt=sea", "image=photo.png", "extend=[-8,0,0,0]"], 2, "left is -8 pixels"),
        (["checkpoint=run", "prompt=sea", "image=photo.png", "extend=[3,0,0,0]"], 2, "size is 19"),
        (["checkpoint=run", "prompt=sea", "repaint=0"], 2, "repaint is 0"),
        (["checkpoint=run", "prompt=sea", "feather=-1"], 2, "feather is -1"),
        (["checkpoint=run", "prompt=sea", "format=gif"], 2, "must be png, jpg or webp"),
        (["checkpoint=run", "prompt=sea", "quality=0"], 2, "quality is 0"),
        (["checkpoint=run", "prompt=sea", "other_prompt="], 2, "other_prompt is empty"),
        (["checkpoint=run", "prompt=sea", "certificate=c.pem"], 2, "without private_key"),
        (["checkpoint=run", "prompt=sea", "certificate=c", "private_key=k"], 3, "c: No such file"),
        (["checkpoint=run", "prompt=sea", "sampler=huen"], 2, "did you mean 'heun'?"),
        (["checkpoint=run", "prompt=sea", "guidance=refined", "guidance.rescale=2"], 2, "share is 2.0"),
        (["checkpoint=run", "prompt=a", "sea"], 2, "'sea' is no key=value; quote values that hold spaces"),
        (["checkpoint=run", "prompt=[]"], 2, "prompt is an empty list"),
        (["checkpoint=run", "prompt=" + "sea " * 10_000], 2, "a prompt is not usable text: "),
        (["checkpoint=run", "prompts_file=latin.txt"], 2, "no UTF-8 at byte"),
        (["checkpoint=run", "prompt=sea", "guide_checkpoint=absent"], 4, "there is no such run folder"),
        (["verify=absent.png"], 3, "verify: there is no file absent.png"),
        (["verify=photo.png"], 3, "holds no record of Firstlight's"),
        (["checkpoint=absent", "prompt=sea"], 4, "there is no such run folder or file"),
        (["checkpoint=empty", "prompt=sea"], 4, "has no verified diffusion checkpoint"),
        (["checkpoint=blank.txt", "prompt=sea"], 4, "not a readable safetensors file"),
        (["checkpoint=run", "prompt=sea", "output=blank.txt"], 5, "blank.txt"),
    ],
)  # fmt: skip
def test_sample(
    words: list[str], code: int, said: str, refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("mer \xe0 l'aube\n".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    assert said in refused(code, "sample", *words)
    assert not (tmp_path / "samples").exists()


def test_a_checkpoint_of_another_shape(
    refused: Callable[..., str], make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    make_run(tmp_path / "run", tiny_config)
    config = next((tmp_path / "run" / "diffusion").rglob("config.json"))
    wide = tiny_config | {"backbone": tiny_config["backbone"] | {"channels": [8, 32]}}
    folder = make_run(tmp_path / "wide", wide)
    # Weights of one run beside the configuration of another, as a careless copy makes them.
    (folder / "autoencoder").rename(folder / "old")
    (tmp_path / "run" / "autoencoder").rename(folder / "autoencoder")
    assert "another autoencoder" in refused(4, "sample", "checkpoint=wide", "prompt=sea")
    assert config.exists()


def test_an_empty_prompt_is_allowed(command: Command, model: Path, tmp_path: Path) -> None:
    assert command("sample", "checkpoint=run", "prompt=", "num_images=1", "device=cpu") == 0
    (folder,) = (tmp_path / "samples").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "00000.json", "00000.png", "contact_sheet.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "a clear night over the sea, the moon on the left",
        "it's noon: hills (green), 100% sun = warm",
        "a \\ backslash, {braces} and ${seed}",
        'said "hello", left',
        "",
    ],
)
def test_a_prompt_is_taken_to_the_letter(text: str) -> None:
    """Commas, quotes and brackets mean something to Hydra; in a prompt they are text."""
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        config = compose("sample", overrides=[quoted(f"prompt={text}")])
    assert plain(config)["prompt"] == text or (text == "" and plain(config)["prompt"] in ("", None))


def test_a_list_of_prompts_stays_a_list() -> None:
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        config = compose("sample", overrides=[quoted("prompt=[one,two]")])
    assert plain(config)["prompt"] == ["one", "two"]
