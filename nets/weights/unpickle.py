"""Convert a pickled file of weights (`.pth`, `.pt`, `.bin`, `.ckpt`) to safetensors, in a process of its own.

    python nets/weights/unpickle.py FILE OUTPUT

Unpickling may call any function. Here it can only call those below, which return inert descriptions: of a tensor, the
place of its bytes in the file. So no code of the file is run, and a tensor is made of nothing but the file's bytes.
What remains, using up memory or time, is limited by the process. This module imports no torch, to start fast.

The output has the tensors; its metadata has the rest as JSON, see `nets.weights.tree.split`.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First value of a file in torch's format before 1.6: five pickles, then the storages."""
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""Name in safetensors and bytes per value, by torch's name."""
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "",  # the tensor has the type
}
MAX_VALUES = 2_000_000
"""Maximum number of plain values in nested dicts and lists, which can share parts and so be exponentially many."""


class Refused(Exception):
    """The file isn't a file of weights; the message says why."""


class Inert:
    """Anything that isn't weights: takes all arguments and states, and holds nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Inert:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class Dict(dict):
    """A dict that ignores attributes, as of `collections.OrderedDict`."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        pass


class Namespace(dict):
    """The command line in a checkpoint of Meta, as a dict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class Dtype(str):
    """A torch type by name."""

    __slots__ = ()


class Storage(tuple):
    """The key of a storage in the file, and the type of its values, or "" if it has none."""

    __slots__ = ()


class TensorPlace(tuple):
    """A tensor: storage, offset, size, stride in values, and type."""

    __slots__ = ()


def rebuild_tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> TensorPlace:
    """`torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`."""
    return TensorPlace((storage, offset, size, stride, storage[1]))


def rebuild_tensor_v3(
    storage: Storage, offset: int, size: tuple, stride: tuple, _: bool, __: Any, dtype: Dtype, *___: Any
) -> TensorPlace:
    """`torch._utils._rebuild_tensor_v3`: the storage has no type."""
    return TensorPlace((storage, offset, size, stride, dtype))


def rebuild_parameter(data: TensorPlace, *_: Any) -> TensorPlace:
    """`torch._utils._rebuild_parameter` and others."""
    return data


FUNCTIONS: dict[str, Any] = {
    "collections.OrderedDict": Dict,
    "argparse.Namespace": Namespace,
    "torch.Size": lambda values=(): tuple(values),
    "torch.device": Inert,
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    # Numbers of numpy, such as the best accuracy, are dropped.
    "numpy.core.multiarray.scalar": Inert,
    "numpy._core.multiarray.scalar": Inert,
    "numpy.dtype": Inert,
    "_codecs.encode": Inert,
}
for _name, _dtype in STORAGES.items():
    FUNCTIONS |= {f"torch.{_name}": Dtype(_dtype), f"torch.storage.{_name}": Dtype(_dtype)}
FUNCTIONS |= {f"torch.{name}": Dtype(name) for name in DTYPES}


class Unpickler(pickle.Unpickler):
    """An unpickler that knows only `FUNCTIONS`."""

    def find_class(self, module: str, name: str) -> Any:
        known = FUNCTIONS.get(f"{module}.{name}")
        if known is None:
            raise Refused(f"it holds code ({module}.{name}), which is never run")
        return known

    def persistent_load(self, saved: Any) -> Storage:
        if not (isinstance(saved, tuple) and len(saved) >= 5 and saved[0] == "storage" and isinstance(saved[1], Dtype)):
            raise Refused("it has an unknown kind of storage")
        return Storage((str(saved[2]), saved[1]))


Read = Callable[[str], bytes]
"""Returns the bytes of a storage by its key."""


def open_archive(path: Path) -> tuple[Any, Read]:
    """The content of a file of torch since 1.6, and a function that reads storages."""
    archive = zipfile.ZipFile(path)
    names = [entry.filename for entry in archive.infolist()]
    pickles = [name for name in names if name.casefold().endswith("data.pkl")]
    if len(pickles) != 1 or len(set(map(str.casefold, names))) < len(names):
        raise Refused("it is no archive of torch, or it contains two")
    if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
        raise Refused("it would unpack to more than its size; torch writes archives without compression")
    prefix = pickles[0][: -len("data.pkl")]
    if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
        raise Refused("its bytes are in big-endian order")
    content = Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    return content, lambda key: archive.read(f"{prefix}data/{key}")


def open_legacy(path: Path) -> tuple[Any, Read]:
    """The content of a file of torch before 1.6, and a function that reads storages."""
    with path.open("rb") as file:
        if Unpickler(file).load() != LEGACY_MAGIC:
            raise Refused("it has another format")
        Unpickler(file).load()  # the version
        Unpickler(file).load()  # sizes of the writer's types
        content = Unpickler(file).load()
        keys = Unpickler(file).load()
        return content, _legacy_storages(file, keys, content).__getitem__


def _legacy_storages(file: BinaryIO, keys: Any, content: Any) -> dict[str, memoryview]:
    """The bytes of each storage; they follow each other, each after the number of its values."""
    widths = {place[0][0]: DTYPES[place[0][1]][1] for place in _places(content) if place[0][1] in DTYPES}
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    storages, start = {}, file.tell()
    for key in map(str, keys):
        (count,) = struct.unpack("<q", data[start : start + 8])
        end = start + 8 + count * widths.get(key, 1)
        if count < 0 or end > len(data):
            raise Refused("it ends too early")
        storages[key], start = data[start + 8 : end], end
    return storages


def _places(content: Any) -> list[TensorPlace]:
    """All tensors in nested dicts and lists.

    Raises:
        Refused: there are too many values.
    """
    found, waiting, count = [], [content], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            raise Refused(f"its nested lists have over {MAX_VALUES:,} values")
        if isinstance(value, TensorPlace):
            found.append(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return found


def read_tensor(place: TensorPlace, read: Read) -> tuple[str, list[int], bytes]:
    """Type, shape and bytes of a tensor, row by row.

    Raises:
        Refused: its description is invalid, or the file doesn't contain all its values.
    """
    (key, _), offset, size, stride, dtype = place
    numbers = [offset, *size, *stride]
    if dtype not in DTYPES or any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise Refused(f"it has a tensor of an unknown type ({dtype!s:.20}) or shape")
    name, width = DTYPES[dtype]
    data = read(key)
    count, contiguous, expected = 1, True, 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        contiguous &= length == 1 or step == expected
        expected *= length
        count *= length
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and ((offset + last + 1) * width > len(data) or count * width > len(data)):
        raise Refused(f"it doesn't contain all values of a tensor of shape {size}")
    if contiguous or not count:
        return name, list(size), bytes(data[offset * width : (offset + count) * width])
    import numpy as np

    values = np.frombuffer(data, f"V{width}", offset=offset * width)
    view = np.lib.stride_tricks.as_strided(values, size, [step * width for step in stride])
    return name, list(size), np.ascontiguousarray(view).tobytes()


def convert(path: Path, output: Path) -> None:
    """Write the tensors and plain values of `path` as safetensors.

    Raises:
        Refused: it isn't a file of weights.
        Exception: it is damaged.
    """
    with path.open("rb") as file:
        start = file.read(4)
    content, read = open_archive(path) if start == b"PK\x03\x04" else open_legacy(path)
    names: dict[TensorPlace, str] = {}
    for place in _places(content):
        names.setdefault(place, str(len(names)))
    total, limit = 0, 2 * path.stat().st_size
    with output.with_suffix(".data").open("w+b") as data, output.open("wb") as file:
        header: dict[str, Any] = {"__metadata__": {"plain": json.dumps(_to_plain(content, names))}}
        for place, name in names.items():
            dtype, shape, values = read_tensor(place, read)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [total, total + len(values)]}
            data.write(values)
            total += len(values)
            if total > limit:
                raise Refused("its tensors overlap: together they are larger than the file")
        text = json.dumps(header).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        data.seek(0)
        while block := data.read(1 << 22):
            file.write(block)


def _to_plain(value: Any, names: dict[TensorPlace, str]) -> Any:
    """`value` as JSON has it, see `nets.weights.tree.split`; what is no plain value becomes None."""
    if isinstance(value, TensorPlace):
        return {"$tensor": names[value]}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _to_plain(item, names) for key, item in value.items()}
        return {"$items": [[_to_plain(key, names), _to_plain(item, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_to_plain(item, names) for item in value]
    return value if type(value) in (str, int, float, bool) else None


def limit_resources(size: int, seconds: int) -> None:
    """Limit memory to twice `size` above what is used, and the time, where the system can."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * size + (512 << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    except (ImportError, OSError, ValueError):  # not Linux: the time is limited by the caller
        pass


if __name__ == "__main__":
    source, target, allowed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    limit_resources(source.stat().st_size, allowed)
    try:
        convert(source, target)
    except Refused as error:
        sys.exit(f"{error}"[:500])
    except MemoryError:
        sys.exit("opening it needs far more memory than its size")
    except Exception as error:  # unpickling a damaged file may raise anything
        sys.exit(f"it is damaged or has another format ({type(error).__name__})")
