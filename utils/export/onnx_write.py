"""A graph becomes one ONNX file, with weights in fp32, fp16 or int8."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import ExportedProgram

from utils.inference.exported_metadata import INPUT, OUTPUT, ExportedMetadata
from utils.inference.onnx_file import DIGEST, digest

if TYPE_CHECKING:
    import onnx

OPSET = 18


def make_onnx(program: ExportedProgram, facts: ExportedMetadata) -> bytes:
    """The ONNX file of a graph from `utils.export.graph.trace`, in the precision that `facts` has: "fp32", "fp16" or
    "int8"."""
    model = convert(program)
    strip_traces(model)
    precision = facts.provenance["precision"]
    if precision == "fp16":
        halve_weights(model)
    elif precision == "int8":
        model = quantise(model)
    for name, value in facts.as_strings().items():
        model.metadata_props.add(key=name, value=value)
    model.metadata_props.add(key=DIGEST, value=digest(model))
    return model.SerializeToString()


def convert(program: ExportedProgram) -> onnx.ModelProto:
    """The same graph in ONNX's operations, in fp32."""
    made = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, verbose=False
    )
    return made.model_proto


def strip_traces(model: onnx.ModelProto) -> None:
    """Take out what the exporter notes of the code that it went through: it names the folders of this machine."""
    graph = model.graph
    assert not model.functions
    del model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def halve_weights(model: onnx.ModelProto) -> None:
    """Keep matrices in fp16 and cast them back when they are used, so that all arithmetic stays fp32.

    ONNX Runtime casts them once, when it opens the file. Arithmetic in fp16 would gain nothing on a processor, where it
    has few kernels for it, and lose digits. Biases, norms and the convolution that takes the image are small, and
    rounding them costs more than rounding all else does.
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


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of matrix products and convolutions in 8 bits, a scale for each column or channel; what they are
    multiplied by is brought to 8 bits while it runs. The convolution that takes the image stays as it is: it is
    small, and all that follows rests on it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kernels = {tensor.name for tensor in model.graph.initializer if takes_image(tensor)}
    first = [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] in kernels]
    del model.graph.value_info[:]  # shapes between the operations, which change
    logging.disable(logging.WARNING)  # it recommends a step that torch's exporter has done
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            # Only constant weights: the resize's products, whose weights are computed, are not among them.
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Conv"],
                nodes_to_exclude=first,
                per_channel=True,
                weight_type=QuantType.QUInt8,  # signed ones make convolutions four times as slow
                extra_options={"MatMulConstBOnly": True},
            )
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


def takes_image(weights: onnx.TensorProto) -> bool:
    """Whether weights are those of a convolution of three colours."""
    return len(weights.dims) == 4 and weights.dims[1] == 3
