"""The direction of imports between our packages, and the only addresses of third parties.

Read from the source by `ast`, nothing is imported. `RULES` is the whole law: what lies where may import what
of ours. The checker itself is checked on a small tree with planted faults.
"""

import ast
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import pytest

#: The modules that join networks and mathematics: docs/decisions/0001-registry-and-pipeline.md.
JOINS = ("models.registry", "models.pipeline", "models.loading", "models.sampling")
#: Modules at the root of models/ that no network needs: what builds on networks, and what stores them.
NOT_NETWORKS = (*JOINS, "models.checkpoint", "models.checkpoint_folders", "models.checkpoint_writer")
NOT_NETWORKS += ("models.checkpoint_shards",)
NOT_NETWORKS += ("models.canvas", "models.portions")

#: A zygote is `python train.py` after its imports.
EXCEPTIONS = {("scripts.faults.zygote", "train")}

_ALL = ("conf", "models.stages", "joins", "models", "models.diffusion", "data", "evaluation")

#: area -> areas and modules it may import.
RULES: dict[str, tuple[str, ...]] = {
    "models": ("models",),  # but for NOT_NETWORKS
    "models.diffusion": ("models.diffusion", "models.conditioning"),
    "joins": ("joins", "models", "models.diffusion"),
    "models.stages": (
        *("models.stages", "joins", "models", "models.diffusion"),
        *(
            "data.batch",
            "data.datamodule",
            "data.json_lines",
            "data.loader",
            "data.progress",
            "data.shard_index",
        ),
    ),
    "data": ("data",),
    "evaluation": ("evaluation", "models", "joins", "models.diffusion", "data"),
    "web": ("web", "evaluation", "models", "joins", "models.diffusion", "data"),
    "conf": _ALL,
    "scripts": (*_ALL, "web", "scripts"),
    "train": _ALL,
    "sample": _ALL,
}
#: third party -> the only folders and files that import it.
ADDRESSES: dict[str, tuple[str, ...]] = {
    "lightning": ("models/stages/", "train.py"),
    "pytorch_lightning": (),
    "hydra": ("conf/", "train.py", "sample.py", "scripts/"),
    "omegaconf": ("conf/", "train.py", "sample.py", "scripts/"),
    "webdataset": ("data/", "scripts/"),
    "open_clip": ("models/text_encoder.py", "evaluation/clip.py"),
    "wandb": ("models/stages/logs.py",),
    "starlette": ("web/",),
    "uvicorn": ("web/",),
    "sqlite3": ("evaluation/",),
    "optuna": ("scripts/",),
}


@dataclass(frozen=True)
class Import:
    """One imported module; `at_start` where it is imported as soon as the file is."""

    line: int
    module: str
    at_start: bool


def module_of(path: str) -> str:
    """The dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def area_of(module: str) -> str:
    """The key of `RULES` that a module of ours falls under."""
    if module in JOINS:
        return "joins"
    return next((a for a in ("models.stages", "models.diffusion") if within(module, a)), module.split(".")[0])


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports_of(path: str, text: str, modules: Collection[str]) -> list[Import]:
    """All imports of a file, also those inside functions and those written as `import_module("...")`."""
    return list(_imports(ast.parse(text, path), path, modules, at_start=True))


def _imports(node: ast.AST, path: str, modules: Collection[str], at_start: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(node.lineno, alias.name, at_start) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, path)
        names = [f"{base}.{alias.name}" for alias in node.names]  # a module of ours, or a name in `base`
        yield from (Import(node.lineno, name if name in modules else base, at_start) for name in names)
    elif isinstance(node, ast.Call) and _imports_by_name(node.func):
        first = node.args[0] if node.args else None
        named = first.value if isinstance(first, ast.Constant) else "(computed)"
        yield Import(node.lineno, str(named), at_start)
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    skipped = (
        node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
    )
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, path, modules, at_start and not inside and child not in skipped)


def _absolute(node: ast.ImportFrom, path: str) -> str:
    """The package that a `from ... import` names, relative ones resolved."""
    package = path.split("/")[: -node.level] if node.level else []
    return ".".join([*package, *([node.module] if node.module else [])])


def _imports_by_name(function: ast.expr) -> bool:
    return ast.unparse(function) in ("importlib.import_module", "import_module", "__import__")


def violations(tree: Mapping[str, str]) -> list[str]:
    """One line for each import that the rules do not allow."""
    modules = {module_of(path) for path in tree}
    found = []
    for path, text in tree.items():
        for each in imports_of(path, text, modules):
            reason = _refusal(path, each.module, {m.split(".")[0] for m in modules})
            if reason:
                found.append(f"{path}:{each.line}: imports {each.module}, but {reason}")
    return found


def _refusal(path: str, imported: str, ours: Collection[str]) -> str | None:
    top = imported.split(".")[0]
    if top not in ours:
        if imported == "(computed)":
            return "no name that a reader can see"
        if not path.startswith(ADDRESSES.get(top, ("",))):
            return f"{top} is imported only in {', '.join(ADDRESSES[top]) or 'nothing'}"
        return None
    importer = module_of(path)
    area, target = area_of(importer), area_of(imported)
    if area not in RULES:
        return f"tests/test_imports.py has no rule for {area}"
    if area == "models" and importer not in NOT_NETWORKS and imported in NOT_NETWORKS:
        return "a network does not know what is built on networks"
    if (importer, imported) in EXCEPTIONS:
        return None
    if target in RULES[area] or any(within(imported, allowed) for allowed in RULES[area] if "." in allowed):
        return None
    return f"{area} may import {', '.join(RULES[area])}"


def path_to(third_party: str, start: str, tree: Mapping[str, str]) -> list[str]:
    """The chain of imports by which loading module `start` loads `third_party`; empty if it does not."""
    modules = {module_of(path): path for path in tree}
    chains, seen = deque([[start]]), {start}
    while chains:
        chain = chains.popleft()
        path = modules[chain[-1]]
        for each in imports_of(path, tree[path], modules):
            if not each.at_start:
                continue
            if within(each.module, third_party):
                return [*chain, each.module]
            parts = each.module.split(".")
            for name in (
                ".".join(parts[: i + 1]) for i in range(len(parts))
            ):  # packages run before their modules
                if name in modules and name not in seen:
                    seen.add(name)
                    chains.append([*chain, name])
    return []


def test_every_import_goes_the_allowed_way(sources: dict[str, str]) -> None:
    assert len(sources) > 30
    assert violations(sources) == []


@pytest.mark.parametrize("third_party", ["lightning", "wandb", "open_clip"])
def test_sampling_starts_without_what_it_does_not_need(sources: dict[str, str], third_party: str) -> None:
    assert path_to(third_party, "sample", sources) == []


@pytest.mark.parametrize("third_party", ["lightning", "hydra", "open_clip", "wandb"])
def test_a_loader_worker_starts_without_what_it_does_not_need(
    sources: dict[str, str], third_party: str
) -> None:
    assert path_to(third_party, "data.datamodule", sources) == []


def test_help_waits_for_no_lightning(sources: dict[str, str]) -> None:
    assert path_to("lightning", "train", sources) == []


# --- the checker, checked -----------------------------------------------------------------------------------

ALLOWED = {
    "train.py": "from conf.schema import make\nfrom models.stages.diffusion import Stage\nimport lightning",
    "sample.py": "import hydra\nfrom conf.schema import make\nfrom models.pipeline import Pipeline",
    "conf/__init__.py": "",
    "conf/schema.py": "from models.stages.optim import AdamW\nfrom models.registry import f\nimport hydra",
    "models/__init__.py": "",
    "models/conditioning.py": "import torch",
    "models/blocks.py": "import torch",
    "models/unet.py": "from models.blocks import block\nfrom models import conditioning",
    "models/layout.py": "from models.unet import UNet",
    "models/text_encoder.py": "def load():\n    import open_clip",
    "models/checkpoint.py": "import safetensors",
    "models/registry.py": "from models.unet import UNet\nfrom models.diffusion.samplers import euler",
    "models/pipeline.py": "from models.registry import build\nfrom models.checkpoint import newest",
    "models/diffusion/__init__.py": "",
    "models/diffusion/samplers.py": "from models.conditioning import Conditioning\nfrom .grids import grid",
    "models/diffusion/grids.py": "import math",
    "models/stages/__init__.py": "",
    "models/stages/optim.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lightning",
    "models/stages/diffusion.py": "import lightning\nfrom data.batch import B\nfrom models import pipeline",
    "models/stages/logs.py": "def build():\n    import wandb",
    "data/__init__.py": "",
    "data/batch.py": "import numpy",
    "data/datamodule.py": "from data.batch import Batch",
    "data/writer.py": "import webdataset",
    "evaluation/__init__.py": "",
    "evaluation/judge.py": "from models.diffusion.samplers import euler\nfrom data.batch import Batch",
    "scripts/__init__.py": "",
    "scripts/evaluate.py": "from conf.schema import make\nfrom evaluation.judge import f\nimport webdataset",
}


def test_the_checker_allows_what_is_allowed() -> None:
    assert violations(ALLOWED) == []
    assert path_to("lightning", "sample", ALLOWED) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("models/unet.py", "from models.diffusion.samplers import euler"),
        ("models/unet.py", "from models.diffusion import samplers"),
        ("models/unet.py", "from .diffusion import samplers"),
        ("models/unet.py", "import models.registry"),
        ("models/unet.py", "from models import pipeline"),
        ("models/unet.py", "from models.checkpoint import newest"),
        ("models/unet.py", "from models.stages.optim import AdamW"),
        ("models/unet.py", "from data.batch import Batch"),
        ("models/unet.py", "import open_clip"),
        ("models/checkpoint.py", "from models.diffusion.samplers import euler"),
        ("models/registry.py", "from models.stages.optim import AdamW"),
        ("models/registry.py", "from conf.schema import make"),
        ("models/pipeline.py", "from data.batch import Batch"),
        ("models/pipeline.py", "import lightning"),
        ("models/diffusion/samplers.py", "from models.unet import UNet"),
        ("models/diffusion/samplers.py", "from models.conditioning_extra import x"),
        ("models/diffusion/samplers.py", "from models.registry import build"),
        ("models/diffusion/samplers.py", "from ..unet import UNet"),
        ("models/diffusion/__init__.py", "from models.unet import UNet"),
        ("models/stages/diffusion.py", "from data.writer import write"),
        ("models/stages/diffusion.py", "from data import writer"),
        ("models/stages/diffusion.py", "from evaluation.judge import judge"),
        ("models/stages/diffusion.py", "from conf.schema import make"),
        ("models/stages/diffusion.py", "import wandb"),
        ("models/stages/diffusion.py", "from hydra.utils import instantiate"),
        ("data/batch.py", "from models.conditioning import Conditioning"),
        ("data/batch.py", "from evaluation.judge import judge"),
        ("data/batch.py", "def f():\n    from models.unet import UNet"),
        ("data/batch.py", "if True:\n    import lightning"),
        ("data/batch.py", "import importlib\nimportlib.import_module('models.unet')"),
        ("data/batch.py", "import importlib\nimportlib.import_module('mod' + 'els')"),
        ("data/datamodule.py", "import lightning.pytorch"),
        ("data/batch.py", "import scripts.evaluate"),
        ("evaluation/judge.py", "from conf.schema import make"),
        ("evaluation/judge.py", "from models.stages.optim import AdamW"),
        ("evaluation/judge.py", "import omegaconf"),
        ("evaluation/judge.py", "import webdataset.writer as writer"),
        ("conf/schema.py", "import train"),
        ("conf/schema.py", "import sample"),
        ("conf/schema.py", "from scripts.evaluate import main"),
        ("scripts/evaluate.py", "import lightning"),
        ("scripts/evaluate.py", "from train import main"),
        ("sample.py", "import lightning"),
        ("sample.py", "import pytorch_lightning"),
        ("newcomer/part.py", "from models.unet import UNet"),
    ],
)
def test_the_checker_finds_a_planted_import(path: str, line: str) -> None:
    text = ALLOWED.get(path, "") + "\n" + line + "\n"
    found = violations({**ALLOWED, "models/conditioning_extra.py": "", path: text})
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{len(text.splitlines())}: imports ")


@pytest.mark.parametrize(
    ("path", "line", "chain"),
    [
        ("sample.py", "import lightning", ["sample", "lightning"]),
        ("models/conditioning.py", "from lightning import X", ["sample", "models.pipeline", "lightning"]),
        ("models/__init__.py", "import lightning.pytorch", ["sample", "models", "lightning.pytorch"]),
        ("models/stages/optim.py", "class A:\n    import lightning", ["conf.schema", "lightning"]),
        (
            "models/stages/__init__.py",
            "try:\n    import lightning\nexcept ImportError:\n    pass",
            ["lightning"],
        ),
        ("models/diffusion/grids.py", "import lightning", ["models.diffusion.samplers", "lightning"]),
    ],
)
def test_the_walk_finds_a_way_to_lightning(path: str, line: str, chain: list[str]) -> None:
    found = path_to("lightning", "sample", {**ALLOWED, path: ALLOWED[path] + "\n" + line})
    assert found[0] == "sample"
    assert found[-1] == chain[-1]
    assert module_of(path) in found


@pytest.mark.parametrize(
    "line",
    ["def f():\n    import lightning", "f = lambda: __import__('lightning')", "import lightning_utilities"],
)
def test_the_walk_passes_over_what_does_not_run_at_once(line: str) -> None:
    assert path_to("lightning", "sample", {**ALLOWED, "models/unet.py": line}) == []
