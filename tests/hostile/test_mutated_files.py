"""Files that attack, at every door: refused by a clear error or opened, within limits of time and memory.

The long form has 500 mutated files of each kind: `python -m pytest -m slow tests/hostile`.
"""

import hashlib
import json
import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import pytest

import export
from utils.inference.onnx_file import DIGEST, OPERATORS, digest
from utils.runs.checkpoint import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30
"""Time limit of a file."""


def open_all(kind: str, paths: Iterable[Path]) -> dict[str, list[str]]:
    """The outcomes of each file, one for each door, see `tests/hostile/doors.py`."""
    command = [sys.executable, "-m", "tests.hostile.doors", kind, *map(str, paths)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    rows = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("\t")]
    assert done.returncode == 0, f"after {len(rows)} files: {done.stderr[-2000:]}"
    assert all(float(seconds) < SECONDS for *_, seconds in rows)
    assert len(rows) == len(list(paths))
    broken = [row for row in rows if any(not outcome.startswith(("opened", "refused")) for outcome in row[1:-1])]
    assert not broken, "\n".join(map(str, broken))
    return {Path(path).name: outcomes for path, *outcomes, _ in rows}


def count_refused(outcomes: dict[str, list[str]]) -> int:
    """The number of files that no door opened."""
    return sum(all(outcome.startswith("refused") for outcome in of_file) for of_file in outcomes.values())


def seal(model: onnx.ModelProto) -> None:
    """Give a changed model a checksum that is right."""
    for entry in model.metadata_props:
        if entry.key == DIGEST:
            entry.value = digest(model)


def test_hostile_onnx_files_are_refused(shared, tmp_path):
    """Files that read others, never end, take 6 GB, hide functions, or give no probabilities."""
    files = []
    for source in sorted((shared / "data/hostile_files").glob("*.onnx")):
        model = onnx.load(source, load_external_data=False)
        seal(model)  # or the checksum alone would refuse it
        files.append(tmp_path / source.name)
        files[-1].write_bytes(model.SerializeToString())
    outcomes = open_all("onnx", files)
    assert len(outcomes) >= 8
    assert count_refused(outcomes) == len(outcomes), outcomes


def mutate_onnx(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change something about a graph, and seal it again."""
    nodes, weights = model.graph.node, model.graph.initializer
    for _ in range(rng.randint(1, 3)):
        node, tensor = rng.choice(nodes), rng.choice(weights)
        kind = rng.randrange(7)
        if kind == 0:
            node.op_type = rng.choice([*OPERATORS.split(), "Loop", "If"])
        elif kind == 1 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(weights).name
        elif kind == 2:
            node.input.append(rng.choice(nodes).output[0])
        elif kind == 3 and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i, attribute.f = rng.choice([-1, 0, 1 << 40]), rng.choice([0.0, -1.0, float("inf")])
            attribute.ints[:] = [rng.choice([-5, 0, 1 << 33]) for _ in attribute.ints]
        elif kind == 4 and tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, 1, 7, 1 << 40])
        elif kind == 5 and tensor.raw_data:
            tensor.raw_data = rng.randbytes(len(tensor.raw_data))
        elif kind == 6:
            del nodes[rng.randrange(len(nodes))]
    seal(model)


@pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_onnx_files(exported, tmp_path, number):
    whole = exported("fp32").read_bytes()
    rng = random.Random(number)
    paths = []
    for i in range(number):
        path = tmp_path / f"{i}.onnx"
        if i % 4 == 0:  # damage that the checksum finds
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        else:
            model = onnx.load_model_from_string(whole)
            mutate_onnx(model, rng)
            path.write_bytes(model.SerializeToString())
        paths.append(path)
    outcomes = open_all("onnx", paths)
    assert count_refused(outcomes) > number / 2


def mutate_value(value: object, rng: random.Random) -> object:
    """Another value of any type in place of a part of a plain tree."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return value | {key: mutate_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], mutate_value(value[i], rng), *value[i + 1 :]]
    return rng.choice([None, True, -1, 0, 1 << 70, 1e308, float("nan"), "", "x", [], {}, [[]], {"$tensor": "none"}])


def mutate_tensor(header: dict[str, Any], rng: random.Random) -> None:
    """Change the name, type, shape or place of a tensor in a header of safetensors."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(["F64", "F16", "BOOL", "x"])
    elif kind == 1:
        entry["dtype"] = {"F32": "I32", "F16": "BF16"}.get(entry["dtype"], "U8")
    elif kind == 2:
        entry["shape"] = rng.choice([[], [1 << 40], [-1]])
    elif kind == 3:  # of as many elements
        entry["shape"] = rng.choice([entry["shape"][::-1], [1, *entry["shape"]], [math.prod(entry["shape"])]])
    elif kind == 4:
        entry["data_offsets"] = rng.choice([[0, 4], [8, 0]])
    else:
        header[rng.choice(["x", "head.weight", "\x1b[31mred"]) + name] = header.pop(name)


def flip_bytes(whole: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(whole)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(min(len(damaged), rng.choice([200, 20_000, 1 << 30])))] = rng.randrange(256)
    return bytes(damaged)


def split_header(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file of safetensors."""
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def mutated_checkpoint(whole: bytes, rng: random.Random) -> bytes:
    """A checkpoint with flipped bytes, or with other plain values or tensors and checksums that are right."""
    if rng.random() < 0.3:
        return flip_bytes(whole, rng)
    header, data = split_header(whole)
    metadata = header["__metadata__"]
    if rng.random() < 0.7:
        metadata["plain"] = json.dumps(mutate_value(json.loads(metadata["plain"]), rng))
    else:
        mutate_tensor(header, rng)
    metadata["sha256"] = "0" * 64
    text = json.dumps(header).encode()
    text = text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_checkpoints(trained, tmp_path, number):
    whole = find_checkpoint("").read_bytes()
    rng = random.Random(number)
    paths = [tmp_path / f"{i}.safetensors" for i in range(number)]
    for path in paths:
        path.write_bytes(mutated_checkpoint(whole, rng))
    assert count_refused(open_all("checkpoint", paths)) > number / 4


def mutated_export(whole: bytes, rng: random.Random) -> bytes:
    """Weights of export.py, which have no checksum, cut or with flipped bytes, other metadata or other tensors."""
    kind = rng.randrange(10)
    if kind == 0:
        return whole[: rng.randrange(len(whole))]
    if kind < 3:
        return flip_bytes(whole, rng)
    header, data = split_header(whole)
    metadata = header["__metadata__"]
    if kind < 7:
        name = rng.choice(list(metadata))
        value = json.dumps(mutate_value(json.loads(metadata[name]), rng))
        metadata[name] = rng.choice([value, value, value, value, "{", "[" * 10_000, "9" * 5000, 3, None])
    elif kind == 7:
        del metadata[rng.choice(list(metadata))]
    else:
        mutate_tensor(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_weights(exported, tmp_path, number):
    """No door opens exports of `torch.export`, whole or not."""
    program = exported("pt2").read_bytes()
    export.main(format="safetensors", precision="fp16", out=str(tmp_path))
    wholes = [exported("safetensors").read_bytes(), (tmp_path / "model_fp16.safetensors").read_bytes()]
    rng = random.Random(number)
    paths = [tmp_path / f"{i}{'.safetensors' if i % 20 else '.pt2'}" for i in range(number)]
    for path in paths:
        damaged = flip_bytes(program, rng) if path != paths[0] else program
        path.write_bytes(damaged if path.suffix == ".pt2" else mutated_export(rng.choice(wholes), rng))
    outcomes = open_all("weights", paths)
    assert count_refused(outcomes) > number / 4
    assert count_refused({name: outcomes[name] for name in outcomes if name.endswith(".pt2")}) == number // 20
