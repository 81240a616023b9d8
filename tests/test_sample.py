"""`sample.py` end to end: the same bytes however the work is cut up, gone on with, verified; odd prompts."""

import json
import os
import random
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.pictures import read_record
from evaluation.request import VERSION
from models.pipeline import Pipeline
from models.sampling import Job, Sampling

PROJECT = Path(__file__).resolve().parents[1]
Command = Callable[..., int]
WORDS = ("checkpoint=run", "device=cpu", "num_steps=2")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def model(make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny_config)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.*"))}


def test_the_bytes_do_not_depend_on_how_the_work_is_cut_up(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("sea\nhills at night\n\nsnow\n")
    words = [*WORDS, "prompts_file=prompts.txt", "num_images=3"]
    assert command("sample", *words, "output=one") == 0
    wanted = pictures(tmp_path / "one")
    assert len(wanted) == 18
    for batch_size in (1, 2, 4, 8):
        assert command("sample", *words, f"output=b{batch_size}", f"batch_size={batch_size}") == 0
        assert pictures(tmp_path / f"b{batch_size}") == wanted
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "ranks" / "contact_sheet.png").exists()
        monkeypatch.setenv("RANK", rank)
        assert command("sample", *words, "output=ranks") == 0
    assert pictures(tmp_path / "ranks") == wanted
    assert (tmp_path / "ranks" / "contact_sheet.png").read_bytes() == (
        tmp_path / "one" / "contact_sheet.png"
    ).read_bytes()


def test_an_interrupted_command_goes_on(command: Command, tmp_path: Path, capsys: Any) -> None:
    words = [*WORDS, "prompt=sea", "num_images=4", "output=out"]
    assert command("sample", *words) == 0
    wanted, out = pictures(tmp_path / "out"), tmp_path / "out"
    for name in ("00001.png", "00003.png", "00003.json", "contact_sheet.png"):
        (out / name).unlink()
    kept = (out / "00000.png").stat().st_mtime_ns
    assert command("sample", *words) == 0
    assert "2 of 4 pictures are there already" in capsys.readouterr().out
    assert pictures(out) == wanted
    assert (out / "00000.png").stat().st_mtime_ns == kept


def test_other_pictures_are_never_written_over_unasked(command: Command, tmp_path: Path, capsys: Any) -> None:
    words = [*WORDS, "num_images=1", "output=out"]
    assert command("sample", *words, "prompt=sea") == 0
    before = pictures(tmp_path / "out")
    assert command("sample", *words, "prompt=sea", "seed=1") == 2
    assert "00000.png is another picture (seed was 0)" in capsys.readouterr().err
    assert pictures(tmp_path / "out") == before
    assert command("sample", *words, "prompt=sea", "seed=1", "overwrite=true") == 0
    assert pictures(tmp_path / "out") != before
    Image.new("RGB", (16, 16)).save(tmp_path / "out" / "00000.png")
    assert command("sample", *words, "prompt=sea") == 2
    assert "is another picture (it holds no such record)" in capsys.readouterr().err


def test_how_files_are_written_is_part_of_what_is_asked_for(
    command: Command, tmp_path: Path, capsys: Any
) -> None:
    words = [*WORDS, "prompt=sea", "num_images=1"]
    for more in ([], ["watermark=mine"], ["format=jpg"], ["format=jpg", "quality=10"]):
        assert command("sample", *words, *more) == 0
    assert len(list((tmp_path / "samples").iterdir())) == 4
    assert command("sample", *words, "output=out") == 0
    assert command("sample", *words, "output=out", "watermark=mine") == 2
    assert "00000.png is another picture (watermark was '')" in capsys.readouterr().err
    assert command("sample", *words, "output=out", "format=jpg", "seed=3") == 2
    assert "00000.jpg is another picture (seed was 0)" in capsys.readouterr().err
    assert command("sample", *words, "output=out", "overwrite=true") == 0
    assert "1 of 1 pictures are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("feather=3", "feather has no effect here: there is no mask or extend"),
        ("repaint=2", "repaint has no effect here"),
        ("variation_seed=2", "variation is 0"),
        ("image_guidance_scale=2", "this checkpoint edits no pictures"),
        ("other_prompt=hills", "the first of num_images=1 is the prompt itself"),
        ("negative_prompt=fog", "negative_prompt has no effect here: guidance_scale is 1"),
        ("private_key=k", "private_key is given without certificate"),
        ("wrap=true", "set tiled=true as well"),
    ],
)
def test_options_without_effect_are_refused(word: str, said: str, command: Command, capsys: Any) -> None:
    assert command("sample", *WORDS, "prompt=sea", "num_images=1", "guidance_scale=1", word) == 2
    assert said in capsys.readouterr().err


def test_panoramas_have_a_sheet(command: Command, tmp_path: Path) -> None:
    words = [*WORDS, "prompt=sea", "num_images=2", "tiled=true", "size=[320,16]"]
    assert command("sample", *words, "wrap=true", "output=ring") == 0
    assert (tmp_path / "ring" / "contact_sheet.png").exists()
    assert command("sample", *words, "output=open") == 0
    ring, line = (Image.open(tmp_path / folder / "00000.png").tobytes() for folder in ("ring", "open"))
    assert ring != line


def test_one_of_a_runs_checkpoints(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (folder,) = (tmp_path / "run" / "diffusion" / "checkpoints").glob("images-*")
    assert command("sample", f"checkpoint={folder}", "prompt=sea", "num_images=1", "output=out") == 0
    (other,) = (tmp_path / "run" / "autoencoder" / "checkpoints").glob("images-*")
    assert command("sample", f"checkpoint={other}", "prompt=sea", "num_images=1", "output=out2") == 4
    assert "is a checkpoint of another stage" in capsys.readouterr().err
    monkeypatch.chdir(folder.parent)
    assert command("sample", f"checkpoint={folder.name}", "prompt=sea", "num_images=1", "output=out") == 0


def test_the_version_is_the_projects() -> None:
    wanted = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert wanted == VERSION


def test_each_request_has_a_folder_of_its_own(command: Command, tmp_path: Path) -> None:
    for words in (["prompt=Sea!"], ["prompt=hills"], ["prompt=Sea!", "seed=2"]):
        assert command("sample", *WORDS, "num_images=1", *words) == 0
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "samples").iterdir())
    assert names == ["hills", "sea", "sea"]


def test_a_picture_says_what_made_it(command: Command, tmp_path: Path, capsys: Any) -> None:
    assert (
        command("sample", *WORDS, "prompt=a sea", "negative_prompt=hills", "output=out", "num_images=1") == 0
    )
    record, intact = read_record(tmp_path / "out" / "00000.png")
    assert intact
    beside = json.loads((tmp_path / "out" / "00000.json").read_text())
    assert {key: value for key, value in record.items() if key != "pixels_sha256"} == beside
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == ("a sea", "hills", 0)
    assert (record["num_steps"], record["sampler"]["name"], record["size"]) == (2, "multistep", [16, 16])
    capsys.readouterr()
    assert command("sample", "verify=out/00000.png") == 0
    printed = capsys.readouterr().out
    assert '"prompt": "a sea"' in printed
    assert "its pixels are those it was made with" in printed
    with Image.open(tmp_path / "out" / "00000.png") as image:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("firstlight", image.text["firstlight"])  # type: ignore[attr-defined]
        image.putpixel((3, 3), (1, 2, 3))
        image.save(tmp_path / "changed.png", pnginfo=info)
    assert command("sample", "verify=changed.png") == 3
    assert "was changed after it was made" in capsys.readouterr().err


def test_a_record_is_enough_to_make_the_picture_again(command: Command, tmp_path: Path) -> None:
    words = [*WORDS, "prompt=sea", "num_images=3", "sampler=ancestral", "grid=karras", "guidance=refined"]
    assert command("sample", *words, "guidance.rescale=0.5", "guidance_scale=4", "output=out") == 0
    record, _ = read_record(tmp_path / "out" / "00002.png")
    pipeline = Pipeline.from_checkpoint(record["checkpoint"], "cpu")
    from models.registry import build

    how = Sampling(
        seed=record["seed"],
        **{group: build(group, record[group]) for group in ("sampler", "grid", "guidance")},
        **{name: record[name] for name in ("guidance_scale", "num_steps")},
    )
    made = pipeline.generate([Job(record["prompt"], record["index"])], how)[0]
    with Image.open(tmp_path / "out" / "00002.png") as image:
        assert image.tobytes() == made.permute(1, 2, 0).numpy().tobytes()


def test_on_the_way_to_another_prompt_the_noise_stays(command: Command, tmp_path: Path) -> None:
    words = [*WORDS, "prompt=sea", "num_images=3", "guidance_scale=8"]
    assert command("sample", *words, "other_prompt=hills at night", "output=way") == 0
    for prompt, k in (("sea", 0), ("hills at night", 2)):
        assert command("sample", *words, f"prompt={prompt}", f"output=end{k}") == 0
        ends = [Image.open(tmp_path / name).tobytes() for name in (f"way/{k:05d}.png", f"end{k}/00000.png")]
        assert ends[0] == ends[1]


def test_painting_in_a_picture_and_around_it(command: Command, tmp_path: Path) -> None:
    photo = Image.effect_noise((16, 16), 60).convert("RGB")
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    words = [*WORDS, "prompt=sea", "image=photo.png", "num_images=2"]
    assert command("sample", *words, "mask=mask.png", "feather=2", "output=in") == 0
    assert command("sample", *words, "extend=[0,8,16,0]", "feather=0", "output=out") == 0
    for k in range(2):
        with Image.open(tmp_path / "in" / f"{k:05d}.png") as image:
            assert image.crop((0, 0, 6, 16)).tobytes() == photo.crop((0, 0, 6, 16)).tobytes()
            assert image.crop((8, 0, 16, 16)).tobytes() != photo.crop((8, 0, 16, 16)).tobytes()
        with Image.open(tmp_path / "out" / f"{k:05d}.png") as image:
            assert image.size == (32, 24)
            assert image.crop((0, 8, 16, 24)).tobytes() == photo.tobytes()
    record, _ = read_record(tmp_path / "out" / "00000.png")
    assert (record["extend"], record["size"]) == ([0, 8, 16, 0], [32, 24])


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_other_formats(kind: str, command: Command, tmp_path: Path) -> None:
    words = [*WORDS, "prompt=sea", "num_images=2", f"format={kind}", "watermark=mine", "output=out"]
    assert command("sample", *words) == 0
    assert command("sample", *words) == 0
    assert read_record(tmp_path / "out" / f"00001.{kind}")[1]


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("sea\x00\x07 at\x1b[31m dawn", "sea at[31m dawn"),
        ("  sea \n\t at   dawn ", "sea at dawn"),
        (
            "\u05d9\u05dd \u05d1\u05e9\u05e7\u05d9\u05e2\u05d4",
            "\u05d9\u05dd \u05d1\u05e9\u05e7\u05d9\u05e2\u05d4",
        ),
        ("\U0001f30a\U0001f305 by the sea", "\U0001f30a\U0001f305 by the sea"),
        ("cafe\u0301", "caf\u00e9"),
    ],
    ids=["controls", "spaces", "right to left", "emoji", "composed"],
)
def test_odd_prompts_are_cleaned_as_captions_are(
    prompt: str, kept: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_bytes(prompt.replace("\n", " ").encode())
    assert command("sample", *WORDS, "prompts_file=prompts.txt", "num_images=1", "output=out") == 0
    assert read_record(tmp_path / "out" / "00000.png")[0]["prompt"] == kept


def test_a_prompt_longer_than_the_text_encoder_reads(command: Command, tmp_path: Path, capsys: Any) -> None:
    assert command("sample", *WORDS, "prompt=" + "sea " * 500, "num_images=1", "output=out") == 0
    assert "longer than the 10 tokens that are read; up to 490 tokens" in capsys.readouterr().err


#: Values for the fuzzer: sensible, at the edge, out of range, of the wrong type.
POOL: dict[str, list[str]] = {
    "prompt": ["sea", "", "a,b=c", "{x: 1}", "[sea,hills]", "[]", "\u05d9", "\U0001f30a", "'", "${x}", "\\"],
    "negative_prompt": ["", "fog", "[a]", "${oc.env:HOME}"],
    "other_prompt": ["hills", "", "null"],
    "num_images": ["1", "2", "0", "-1", "x", "1e3", "null"],
    "num_steps": ["1", "2", "0", "-5", "99999", "1.5", "null", "inf"],
    "guidance_scale": ["1", "0", "-3", "7.5", "nan", "inf", "-inf", "1e30", "x"],
    "size": ["16", "24", "0", "-16", "20", "[16,24]", "[16]", "[1,2,3]", "x", "1e9", "100000", "{a: 1}"],
    "seed": ["0", "-1", "18446744073709551616", "x", "1.5"],
    "strength": ["0.5", "1", "0", "-1", "2", "nan"],
    "variation": ["0.1", "1", "-1", "nan", "2"],
    "variation_seed": ["3", "-3"],
    "image": ["photo.png", "none.png", "run", "prompts.txt", "null", ""],
    "mask": ["mask.png", "photo.png", "none.png", ""],
    "extend": ["[8,0,0,0]", "[0,0,8,8]", "[1,0,0,0]", "[-8,0,0,0]", "[8]", "[1e9,0,0,0]", "[9999999,0,0]"],
    "feather": ["0", "3", "-1", "100000", "x"],
    "repaint": ["1", "2", "0", "1000"],
    "tiled": ["true", "false", "maybe"],
    "wrap": ["true", "false"],
    "sampler": ["euler", "heun", "multistep", "unipc", "dpmpp_2m_sde", "none", "[a]"],
    "sampler.eta": ["0.5", "-1"],
    "grid": ["uniform", "karras", "log_snr", "sgm_uniform", "warped", "x"],
    "guidance": ["refined", "x", "null"],
    "guidance.rescale": ["0.5", "2", "nan"],
    "image_guidance_scale": ["1.5", "nan"],
    "batch_size": ["1", "3", "0", "1000000"],
    "device": ["cpu", "tpu", "cuda"],
    "format": ["png", "jpg", "webp", "gif"],
    "quality": ["50", "0", "101"],
    "watermark": ["mine", "\U0001f305", "x" * 300],
    "checkpoint": ["run", "absent", "photo.png", ""],
    "guide_checkpoint": ["run", "absent"],
    "prompts_file": ["prompts.txt", "none", "run"],
    "verify": ["photo.png", "none"],
    "nonsense": ["1"],
    "_target_": ["os.system"],
}  # fmt: skip


def fuzz(command: Command, capsys: Any, calls: int, seed: int) -> dict[int, int]:
    """Exit codes and their counts of so many calls with words drawn from the pool; none has a traceback."""
    draw, codes = random.Random(seed), dict[int, int]()
    for number in range(calls):
        keys = draw.sample([key for key in POOL if key not in ("prompt", "checkpoint")], draw.randint(0, 4))
        words = [f"{key}={draw.choice(POOL[key])}" for key in keys]
        words += [f"prompt={draw.choice(POOL['prompt'])}"] * (draw.random() < 0.95)
        words += [f"checkpoint={'run' if draw.random() < 0.95 else draw.choice(POOL['checkpoint'])}"]
        words += ["num_steps=1"] * ("num_steps" not in keys) + ["num_images=1"] * ("num_images" not in keys)
        code = command("sample", *words, f"output=out{number}")
        error = capsys.readouterr().err
        assert code in (0, 2, 3, 4, 5), (words, code, error)
        assert "Traceback" not in error, (words, error)
        assert code == 0 or error.startswith("sample.py: "), (words, error)
        assert code == 0 or error.count("\n") <= 2, (words, error)  # a warning may stand before
        codes[code] = codes.get(code, 0) + 1
    return codes


@pytest.fixture
def _files(tmp_path: Path) -> None:
    Image.effect_noise((16, 16), 60).convert("RGB").save(tmp_path / "photo.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    (tmp_path / "prompts.txt").write_text("sea\nhills\n")


@pytest.mark.usefixtures("_files")
def test_fuzzed_calls_end_in_pictures_or_in_one_line(command: Command, capsys: Any) -> None:
    codes = fuzz(command, capsys, 30, seed=0)
    assert codes[0] > 1
    assert codes[2] > 1


@pytest.mark.slow
@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_thousand_fuzzed_calls(seed: int, command: Command, capsys: Any) -> None:
    assert set(fuzz(command, capsys, 1_000, seed)) >= {0, 2, 3}


@pytest.mark.slow
def test_a_thousand_prompts_and_seeds(model: Path) -> None:
    pipeline = Pipeline.from_checkpoint(model, "cpu")
    assert pipeline.defaults is not None
    draw = random.Random(0)
    texts = [
        "".join(draw.choice("sea hills noon ") for _ in range(draw.randint(0, 30))) for _ in range(1_000)
    ]
    jobs = [Job(text, draw.randrange(2**40)) for text in texts]
    whole = pipeline.generate(jobs, pipeline.defaults, batch_size=8)
    for batch_size in (1, 2, 4):
        assert torch.equal(pipeline.generate(jobs, pipeline.defaults, batch_size=batch_size), whole)


def test_another_process_makes_the_same_bytes(command: Command, tmp_path: Path) -> None:
    words = [*WORDS, "prompt=sea", "num_images=2"]
    assert command("sample", *words, "output=here") == 0
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "2" if torch.get_num_threads() == 1 else "1"
    subprocess.run(
        [sys.executable, str(PROJECT / "sample.py"), *words, "output=there"],
        cwd=tmp_path, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert pictures(tmp_path / "there") == pictures(tmp_path / "here")
