"""Conversion of a traced graph to ONNX, with weights in fp32, fp16 or int8."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import ExportedProgram

from utils.inference.exported_metadata import INPUT, OUTPUT, ExportedMetadata
from utils.inference.onnx_file import DIGEST, OPSET, digest

if TYPE_CHECKING:
    import onnx


def make_onnx(program: ExportedProgram, metadata: ExportedMetadata) -> bytes:
    """The bytes of an ONNX file from a graph of `utils.export.graph.trace`, in the precision of `metadata`."""
    model = convert(program)
    strip_traces(model)
    precision = metadata.provenance["precision"]
    if precision == "fp16":
        halve_weights(model)
    elif precision == "int8":
        model = quantize(model)
    for name, value in metadata.as_strings().items():
        model.metadata_props.add(key=name, value=value)
    model.metadata_props.add(key=DIGEST, value=digest(model))
    return model.SerializeToString()


def convert(program: ExportedProgram) -> onnx.ModelProto:
    """The graph as an fp32 ONNX model."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, verbose=False
    )
    return exported.model_proto


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes about source code, which contain local paths."""
    graph = model.graph
    assert not model.functions
    del model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def halve_weights(model: onnx.ModelProto) -> None:
    """Store matrices in fp16 and cast them to fp32 for computation.

    ONNX Runtime casts them once, at load. On a CPU, fp16 computation would be no faster (few kernels exist) and less
    accurate. Biases, norms and the first convolution stay fp32: they are small, and rounding them costs more accuracy
    than rounding everything else.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) in (2, 4) and not takes_image(tensor):
            name = tensor.name
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
            casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize the weights of matrix products and convolutions to int8 per channel, and activations dynamically.

    The first convolution stays fp32: it is small, and everything after it depends on it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kernels = {tensor.name for tensor in model.graph.initializer if takes_image(tensor)}
    first = [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] in kernels]
    del model.graph.value_info[:]  # intermediate shapes, which change
    logging.disable(logging.WARNING)  # recommends a step that torch's exporter has done
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            # Only constant weights: the resize multiplies by computed ones.
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Conv"],
                nodes_to_exclude=first,
                per_channel=True,
                weight_type=QuantType.QUInt8,  # signed weights make convolutions four times slower
                extra_options={"MatMulConstBOnly": True},
            )
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


def takes_image(weights: onnx.TensorProto) -> bool:
    """Whether these are the weights of a convolution with three input channels, the first layer."""
    return len(weights.dims) == 4 and weights.dims[1] == 3
