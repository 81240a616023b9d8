"""The machine's own kernels, the C++ beside this file, compiled for this processor.

Where there is a C++ compiler, the first process that asks compiles it, in some seconds, into the user's cache
folder; the others load it from there. Without a compiler, or where anything else stands in the way, there are
no kernels, and `models.fused` computes the same by torch's own operations.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import library as operations

_NAMES = ("kernels", "winograd", "feed_forward", "attention_float", "attention_bfloat16", "muon")
SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in _NAMES)
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("numbers", "product", "heads"))
#: Neither flag lets numbers that are not finite pass for others, which the guard of the training looks for.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
COMPILERS = ("g++", "c++", "clang++")
#: Seconds after which a compiler is given up.
PATIENCE = 300.0
#: Floats of working memory that a thread keeps at most; what takes more gets memory of its own.
KEPT = 8 * 1024 * 1024
#: Of each thread, kept: memory that no cache holds any more costs more than a transform.
_rooms = threading.local()
#: What one thread compiles, another waits for.
_compiling = threading.Lock()

_OPERATIONS = operations.Library("firstlight", "DEF")


class Shape(ctypes.Structure):
    """Of a feature map: samples, channels, positions, groups; channels or 0 from one gain to the next."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("samples", "channels", "positions", "groups", "row"))


def operation(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes `function` one of `torch.ops.firstlight`, which compiled networks call as it is.

    Args:
        schema: name, arguments and results, as torch writes them.
        function: computes it on a CPU.
        fake: makes results of the right shape, type and layout without computing.
    """
    name = _OPERATIONS.define(schema)
    _OPERATIONS.impl(name, function, "CPU")
    operations.register_fake(f"firstlight::{name}", fake, lib=_OPERATIONS)


def room(floats: int) -> Tensor:
    """Memory for the kernels' own use, whatever was there before."""
    kept: Tensor | None = getattr(_rooms, "room", None)
    if kept is None or len(kept) < floats:
        kept = torch.empty(floats, dtype=torch.float32, device="cpu")
        if floats <= KEPT:
            _rooms.room = kept
    return kept


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL | None:
    """The compiled functions; None where this machine cannot have them."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        folder = cache_folder()
        if folder is None:
            with tempfile.TemporaryDirectory() as made:  # what is loaded stays loaded
                return load(compiler, Path(made))
        return load(compiler, folder)
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def compile_ahead() -> None:
    """Begins to compile while this process imports for seconds; who asks for the kernels waits for that."""
    threading.Thread(target=kernels, name="kernels").start()


def load(compiler: str, folder: Path) -> ctypes.CDLL:
    """The library in `folder`, compiled by `compiler` where it is not there yet.

    Raises:
        OSError: it cannot be written or loaded.
        SubprocessError: the compiler fails.
    """
    library = folder / f"kernels-{fingerprint(compiler)}.so"
    with _compiling:
        if not library.exists():
            _compile(compiler, library)
    return ctypes.CDLL(str(library))


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        objects = [Path(name, f"{source.stem}.o") for source in SOURCES]
        commands = [
            [compiler, *FLAGS, "-c", str(source), "-o", str(made)]
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(_run, commands))
        # Not linked to a library of OpenMP: the functions are found in the one that torch has loaded.
        linked = Path(name, "kernels.so")
        _run([compiler, "-shared", *map(str, objects), "-o", str(linked)])
        os.replace(linked, library)  # processes that start together may both write: the same


def fingerprint(compiler: str) -> str:
    """Of what the library depends on: source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE)
    processor = "".join(
        line
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines(keepends=True)
        if line.startswith(("model", "flags", "Features", "CPU"))
    )
    parts = (
        *(source.read_bytes() for source in (*SOURCES, *HEADERS)),
        " ".join(FLAGS).encode(),
        version.stdout,
        processor.encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def cache_folder() -> Path | None:
    """The user's folder for compiled kernels; None where there is none that nobody else may write to."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser() / "firstlight"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    open_to_others = found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if open_to_others or not os.access(folder, os.W_OK) else folder


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
