"""A graph becomes one ONNX file, with weights in fp32, fp16 or int8."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import ExportedProgram

from utils.export_facts import INPUT, OUTPUT, ExportFacts
from utils.onnx_file import DIGEST, digest

if TYPE_CHECKING:
    import onnx

OPSET = 18


def make_onnx(program: ExportedProgram, facts: ExportFacts) -> bytes:
    """The ONNX file of a graph from `utils.export_graph.trace`, in the precision that `facts` has: "fp32", "fp16" or
    "int8"."""
    model = convert(program)
    forget_traces(model)
    precision = facts.provenance["precision"]
    if precision == "fp16":
        halve_weights(model)
    elif precision == "int8":
        model = quantise(model)
    for name, value in (facts.as_strings() | {DIGEST: digest(model)}).items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def convert(program: ExportedProgram) -> onnx.ModelProto:
    """The same graph in ONNX's operations, in fp32."""
    made = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, verbose=False
    )
    return made.model_proto


def forget_traces(model: onnx.ModelProto) -> None:
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
    has few kernels for it, and lose digits. Biases and norms are small, and rounding them costs as much as rounding all
    matrices does.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            name = tensor.name
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
            casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of matrix products in int8, a scale for each column; what they are multiplied by is brought to 8 bits
    while it runs. Convolutions stay as they are: ONNX Runtime has no fast kernel for them in this form."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends a step that torch's exporter has done
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        # Only constant weights: the resize's products, whose weights are computed, are not among them.
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        logging.disable(logging.NOTSET)
        return onnx.load(path)
