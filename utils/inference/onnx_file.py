"""Read an exported ONNX file from an untrusted source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.inference.exported_metadata import ExportedMetadata

if TYPE_CHECKING:
    import onnx

MAX_BYTES = (1 << 31) - (1 << 24)
"""Protobuf's limit of 2 GB for the weights in one file, minus some space for the graph."""
DIGEST = "content_sha256"
"""The metadata key of the checksum."""


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the graph, the weights and all other metadata, to detect damage."""
    metadata = sorted((entry.key, entry.value) for entry in model.metadata_props if entry.key != DIGEST)
    sha256 = hashlib.sha256(json.dumps(metadata).encode())
    sha256.update(model.graph.SerializeToString(deterministic=True))
    return sha256.hexdigest()


def read_onnx(path: Path) -> tuple[bytes, ExportedMetadata]:
    """The bytes and the metadata of an exported file. Nothing is executed, and no other file is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, isn't an export of Thaw, or refers to other files.
    """
    import onnx  # only exported files need it
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than an ONNX file can be")
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ValueError(f"{path} can't be opened as ONNX: it is damaged or not an ONNX file") from error
    strings = {entry.key: entry.value for entry in model.metadata_props}
    metadata = ExportedMetadata.from_strings(strings, path)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise ValueError(f"{path} can't be used: its weights are in other files, unlike those of Thaw's exports")
    if strings.get(DIGEST) != digest(model):
        raise ValueError(f"{path} is damaged: its checksum doesn't match, so it was changed after the export")
    return content, metadata


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model: weights and node attributes, including those of subgraphs and functions."""
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
            sparse_tensors = (attribute.sparse_tensor, *attribute.sparse_tensors)
            yield from (part for sparse in sparse_tensors for part in (sparse.values, sparse.indices))
            graphs.extend(graph for graph in (attribute.g, *attribute.graphs) if graph.node or graph.initializer)
