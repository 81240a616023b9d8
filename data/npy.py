"""The one form in which arrays are stored in shards: numpy's format 1.0, floats in C order, no pickle.

The header is 128 bytes whatever the shape, so that a reader knows before the first read where the numbers
lie, and compares the header instead of parsing it; `numpy.load` reads the files as well. Source: numpy
enhancement proposal 1. Used by `data.moments`, which reads, and `scripts.precompute`, which writes.
"""

import re

import numpy as np

HEADER_BYTES = 128
#: Name of a type -> what the header calls it.
DTYPES = {"float32": "<f4", "float16": "<f2"}

_MAGIC = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
_DESCRIPTION = re.compile(
    rb"\{'descr': '(<f[24])', 'fortran_order': False, 'shape': \(([0-9]+,|[0-9]+(?:, [0-9]+)+)\), \} *\n"
)


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns the 128 bytes before an array of `dtype` (a key of DTYPES) and `shape`."""
    sides = f"{shape[0]}," if len(shape) == 1 else ", ".join(map(str, shape))
    text = f"{{'descr': '{DTYPES[dtype]}', 'fortran_order': False, 'shape': ({sides}), }}"
    return _MAGIC + text.encode().ljust(HEADER_BYTES - len(_MAGIC) - 1) + b"\n"


def encode_npy(array: np.ndarray) -> bytes:
    """Returns the file of a float32 or float16 array."""
    return npy_header(array.dtype.name, array.shape) + np.ascontiguousarray(array).tobytes()


def parse_header(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Returns (dtype, shape) that the first 128 bytes of a file state.

    Raises ValueError for anything but what `npy_header` writes: other types (objects above all), Fortran
    order, another version.
    """
    found = _DESCRIPTION.fullmatch(data[len(_MAGIC) : HEADER_BYTES])
    if not data.startswith(_MAGIC) or found is None:
        raise ValueError("its header is not that of a float32 or float16 array in C order")
    dtype = next(name for name, code in DTYPES.items() if code.encode() == found[1])
    return dtype, tuple(int(side) for side in found[2].split(b",") if side)
