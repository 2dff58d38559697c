"""The ONNX file, opened without trusting it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.inference.exported_metadata import ExportFacts

if TYPE_CHECKING:
    import onnx

MAX_BYTES = (1 << 31) - (1 << 24)
"""What one file of ONNX can hold, by protobuf's limit, with some room for the graph itself."""
DIGEST = "content_sha256"
"""The key of the checksum in a file's metadata."""


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the graph with its weights, and of all else that the metadata say, by which damage is seen."""
    said = sorted((entry.key, entry.value) for entry in model.metadata_props if entry.key != DIGEST)
    found = hashlib.sha256(json.dumps(said).encode())
    found.update(model.graph.SerializeToString(deterministic=True))
    return found.hexdigest()


def read_onnx(path: Path) -> tuple[bytes, ExportFacts]:
    """The bytes of an exported file and what it says of itself. Nothing in it is run, and no other file is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, isn't one of Thaw's exports, or points to other files.
    """
    import onnx  # only exports need it
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than a file of ONNX can be")
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ValueError(f"{path} can't be opened as ONNX: it is damaged, or something else") from error
    strings = {entry.key: entry.value for entry in model.metadata_props}
    facts = ExportFacts.from_strings(strings, path)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise ValueError(f"{path} can't be used: its weights lie in other files, which is never so in Thaw's exports")
    if strings.get(DIGEST) != digest(model):
        raise ValueError(f"{path} is damaged: its checksum doesn't match, so it was changed after the export")
    return content, facts


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors in a model: weights, and attributes of nodes, also in graphs within graphs and in functions."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from (
                part
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors)
                for part in (sparse.values, sparse.indices)
            )
            graphs.extend(graph for graph in (attribute.g, *attribute.graphs) if graph.node or graph.initializer)
