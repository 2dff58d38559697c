"""Read an exported ONNX file from an untrusted source: only what export.py writes is accepted."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from utils.inference.exported_metadata import ExportedMetadata

if TYPE_CHECKING:
    import onnx

MAX_BYTES = (1 << 31) - (1 << 24)
"""Protobuf's limit of 2 GB for the weights in one file, minus some space for the graph."""
DIGEST = "content_sha256"
"""The metadata key of the checksum."""
OPSET = 18
OPERATORS = """
Abs Add And AveragePool BatchNormalization Cast Clip Concat ConstantOfShape Conv ConvInteger Div
DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor Gather Gelu Gemm GlobalAveragePool GlobalMaxPool
Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization
LeakyRelu Less LessOrEqual Log MatMul MatMulInteger Max MaxPool Min Mul Neg Not Or PRelu Pad Pow Range Reciprocal
ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize Round ScatterND Shape Sigmoid Sign Slice Softmax
Softplus Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
"""The operators that export.py writes for the supported networks, and some that other networks of timm have. None has
a subgraph, so none can loop."""
MAX_CONSTANTS = 64 << 20
"""Bytes that constants may take when they are computed, beside twice the size of the file."""


TENSOR_TYPES = frozenset((1, 2, 3, 6, 7, 9, 10, 11))
"""Types of weights by their number in ONNX: FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, DOUBLE."""


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the whole model without itself, to detect damage."""
    metadata = sorted((entry.key, entry.value) for entry in model.metadata_props if entry.key != DIGEST)
    opsets = sorted((opset.domain, opset.version) for opset in model.opset_import)
    sha256 = hashlib.sha256(json.dumps([metadata, opsets, model.ir_version]).encode())
    for part in (model.graph, *model.functions, *model.training_info):
        sha256.update(part.SerializeToString(deterministic=True))
    return sha256.hexdigest()


def read_onnx(path: Path) -> tuple[bytes, ExportedMetadata]:
    """The bytes and the metadata of an exported file. Nothing is executed, and no other file is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, isn't an export of Thaw, or has parts that exports don't have.
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
    if reason := find_foreign_part(model, len(content)):
        raise ValueError(f"{path} can't be used: it has {reason}, unlike the files that export.py writes")
    if strings.get(DIGEST) != digest(model):
        raise ValueError(f"{path} is damaged: its checksum doesn't match, so it was changed after the export")
    return content, metadata


def find_foreign_part(model: onnx.ModelProto, size: int) -> str:
    """What a model, from a file of `size` bytes, has that no export has; empty if there is nothing."""
    graph = model.graph
    if model.functions or model.training_info:
        return "functions of its own"
    if [(opset.domain, opset.version) for opset in model.opset_import] != [("", OPSET)]:
        return f"other operators than those of version {OPSET}"
    if graph.sparse_initializer:
        return "sparse weights"
    for tensor in graph.initializer:
        if reason := _find_foreign_tensor(tensor):
            return reason
    for node in graph.node:
        if node.domain or node.op_type not in OPERATORS.split():
            return f"the operator {node.domain}{'.' if node.domain else ''}{node.op_type}"
        if reason := _find_foreign_attribute(node):
            return reason
    return "" if _size_of_constants(model) <= 2 * size + MAX_CONSTANTS else "constants that are larger than the file"


def _size_of_constants(model: onnx.ModelProto) -> float:
    """The bytes of all values that depend on constants only; infinite if a shape can't be told. ONNX
    Runtime computes them when it opens the file."""
    import onnx
    from onnx import helper, shape_inference

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    known, nodes = set(constants), []
    for node in graph.node:
        if not known.issuperset(filter(None, node.input)):
            continue
        known.update(node.output)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    outputs = [helper.make_empty_tensor_value_info(name) for node in nodes for name in node.output]
    part = helper.make_graph(nodes, "constants", [], outputs, [constants[name] for name in used if name in constants])
    try:
        part_model = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        inferred = shape_inference.infer_shapes(part_model, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError, onnx.checker.ValidationError):
        return math.inf
    total = 0.0
    for value in inferred.graph.output:
        kind = value.type.tensor_type
        if not kind.HasField("shape") or kind.elem_type not in TENSOR_TYPES:
            return math.inf
        dims = [dim.dim_value if dim.HasField("dim_value") else math.inf for dim in kind.shape.dim]
        total += helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize * math.prod(dims)
    return total


def _find_foreign_attribute(node: onnx.NodeProto) -> str:
    """What an attribute holds beside numbers and strings: a graph, a sparse tensor, a type, a foreign tensor."""
    import onnx

    plain = onnx.AttributeProto
    for attribute in node.attribute:
        if attribute.type == plain.TENSOR:
            if reason := _find_foreign_tensor(attribute.t):
                return reason
        elif attribute.type not in (plain.FLOAT, plain.INT, plain.STRING, plain.FLOATS, plain.INTS):
            return f"an attribute of another type ({attribute.name})"
    return ""


def _find_foreign_tensor(tensor: onnx.TensorProto) -> str:
    """Whether the values of a tensor are elsewhere than in its bytes."""
    import onnx
    from onnx import helper

    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        return "weights in other files"
    if tensor.data_type == onnx.TensorProto.STRING or tensor.data_type not in TENSOR_TYPES:
        return f"weights of another type ({tensor.name})"
    width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if any(size < 0 for size in tensor.dims) or len(tensor.raw_data) not in (0, math.prod(tensor.dims) * width):
        return f"weights whose size isn't that of their shape ({tensor.name})"
    stored = len(tensor.float_data) + len(tensor.int32_data) + len(tensor.int64_data) + len(tensor.uint64_data)
    if not tensor.raw_data and stored != math.prod(tensor.dims):
        return f"weights whose size isn't that of their shape ({tensor.name})"
    return ""
