"""No way from a file or an option to running code: no pickle, no eval, no shell, in all of the source.

Names are resolved through the imports of each file, so `from torch import load as read` is found as well.
"""

import ast
from collections.abc import Iterator

import pytest

#: Modules that unpickle, or run what they read.
MODULES = (
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "runpy",
    "code",
)
#: Functions that do.
FUNCTIONS = (
    *("eval", "exec", "__import__"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"),
    *("torch.hub.load_state_dict_from_url", "torch.utils.model_zoo.load_url"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_class", "hydra.utils.get_method"),
    *("hydra.utils.get_object", "webdataset.gopen", "webdataset.WebDataset", "pandas.read_pickle"),
    "tempfile.mktemp",
)
#: Keyword arguments that turn a safe call into one.
KEYWORDS = {
    ("shell", "True"),
    ("weights_only", "False"),
    ("allow_pickle", "True"),
    ("trust_remote_code", "True"),
}


def findings(path: str, text: str) -> list[str]:
    """One line for each thing in a file that can run what it reads."""
    tree = ast.parse(text, path)
    return [f"{path}:{line}: {what}" for line, what in sorted(_findings(tree, _aliases(tree)))]


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Local name -> the full name that an import bound it to."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _findings(tree: ast.Module, aliases: dict[str, str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {m}") for m in modules if m.split(".")[0] in MODULES)
        elif isinstance(node, ast.Name | ast.Attribute):
            name = _full_name(node, aliases)
            if name in FUNCTIONS:
                yield node.lineno, f"uses {name}"
        elif isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in KEYWORDS:
            yield node.value.lineno, f"{node.arg}={ast.unparse(node.value)}"


def _full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """`torch.load` for `t.load` after `import torch as t`; empty for what is no dotted name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _full_name(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def test_the_source_runs_nothing_that_it_reads(sources: dict[str, str]) -> None:
    assert [line for path, text in sources.items() for line in findings(path, text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "import multiprocessing, shelve",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import torch\nf = torch.load",
        "import torch\ntorch.save({}, 'x')",
        "import torch.hub\ntorch.hub.load('a', 'b')",
        "read('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "eval('1')",
        "exec('1')",
        "def f():\n    return [eval(x) for x in y]",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
        "import yaml\nyaml.load(open('x'), Loader=yaml.Loader)",
        "from hydra.utils import instantiate\ninstantiate({})",
        "import webdataset as wds\nwds.gopen('pipe:ls')",
        "import tempfile\ntempfile.mktemp()",
    ],
)
def test_a_planted_hole_is_found(line: str) -> None:
    assert len(findings("planted.py", line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "network.eval()",
        "import torch\ntorch.compile(f)",
        "import re\nre.compile('x')",
        "import json\njson.load(file)",
        "import subprocess\nsubprocess.run(['git'], shell=False)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "from safetensors.torch import load\nload(data)",
        "'torch.load(x)'  # eval(x)",
        "self.load(x).system('x')",
    ],
)
def test_what_is_safe_is_not_found(line: str) -> None:
    assert findings("safe.py", line) == []
