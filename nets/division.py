"""Division of a network into parts: trace its forward pass, and cut it where only one tensor passes on.

`torch.fx` records which modules a network calls and what it computes between them. Between two blocks of a network,
usually only the output of the first one goes on to the second. What blocks get in addition, such as rotary position
embeddings, depends on parameters and the input shape, but not on the pixels, and each part computes it again.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

NUM_TRACED = 997
"""Images in a traced batch: a prime, so that no other dimension is taken for the number of images."""
GENERAL_PACKAGES = ("torch.", "timm.layers.")
"""Packages whose modules are layers, rather than blocks of a certain network."""
LISTS_OF_BLOCKS = ("blocks", "layers", "stages")
"""Names by which networks, and their stages, call a list of blocks or stages."""

CONSTRUCTORS = (torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)


class Segment(NamedTuple):
    """A piece of a forward pass.

    Attributes:
        forward: takes the output of the previous segment, (B, ...); the first one takes images.
        owned: names of the modules and parameters that no earlier segment uses.
    """

    forward: Callable[[Tensor], Tensor]
    owned: tuple[str, ...]


def divide(network: nn.Module, twin: nn.Module, input_shape: Sequence[int]) -> list[Segment]:
    """Return segments that give the same as `network`: up to the first block, one for each block, and the rest.

    What is between two blocks, such as downsampling, belongs to the second. Blocks between which more than one tensor
    passes on are one segment. A network without blocks is divided after each module. If the forward pass can't be
    traced, or differs in training beyond what modules do, the list has one segment or none.

    Args:
        network: the segments compute with its modules and parameters.
        twin: the same network on the meta device, for the trace.
        input_shape: image height and width; the segments are for images of this shape.
    """
    graphs = []
    for training in (True, False):
        try:
            with torch.device("meta"), torch.no_grad():
                tracer = _Tracer(twin.train(training), input_shape)
                with _Constructions(tracer):
                    graphs.append(tracer.trace(twin))
        except Exception:  # of any kind: networks weren't written to be traced
            return []
    in_training, graph = graphs
    if str(in_training) != str(graph):
        return []
    cuts = _find_cuts(graph, dict(twin.named_modules()))
    nodes = list(graph.nodes)
    called = {node.target for node in nodes if node.op == "call_module"}
    segments: list[Segment] = []
    used: set[str] = set()
    for start, end in zip([0, *cuts], [*cuts, len(nodes) - 1], strict=True):
        names = {_owner(node, called) for node in nodes[start:end] if node.op in ("call_module", "get_attr")}
        segments.append(Segment(_bind(graph, start, end, network, twin), tuple(sorted(names - used))))
        used |= names
    return segments


def _batch_size(x: Tensor) -> int:
    return x.shape[0]


def _device(x: Tensor) -> torch.device:
    return x.device


OF_ANY_INPUT = (_batch_size, _device)
"""Functions whose result each segment can get from its input, in place of an earlier tensor."""


class _Traced(fx.Proxy):
    """A tensor in a trace. Its dimensions are numbers, apart from that of the batch."""

    @property
    def shape(self) -> tuple[Any, ...]:
        shape = tuple(self.node.meta["value"].shape)
        if shape[:1] != (NUM_TRACED,):
            return shape
        return (self.tracer.create_proxy("call_function", _batch_size, (self,), {}), *shape[1:])

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return self.node.meta["value"].ndim

    def dim(self) -> int:
        return self.ndim

    @property
    def device(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _device, (self,), {})


class _Constructions(TorchFunctionMode):
    """Records tensors that are made of sizes alone, such as the coordinates of patches, as a part of the trace."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in CONSTRUCTORS and not self._tracer.computing:
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    """Records the calls of modules and functions. Each node has its result, on the meta device, as `meta["value"]`.

    Sequential modules and those with a list of blocks are entered, all others are one call.
    """

    proxy_buffer_attributes = True

    def __init__(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self._image = torch.zeros(NUM_TRACED, 3, *input_shape)
        self._entered = {name for name, module in network.named_modules() if _has_blocks(name, module)}
        self.computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._entered and not isinstance(m, nn.Sequential)

    def proxy(self, node: fx.Node) -> _Traced:
        return _Traced(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise fx.proxy.TraceError("a tensor that is neither traced nor a parameter or buffer")
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **options: Any) -> Any:
        """Return a traced tensor, a tuple of what is in a tuple, and a number as it is, unless it is of the batch."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        node.meta["value"] = value = self._image if kind == "placeholder" else self._compute(node)
        if isinstance(value, tuple | list):
            indices = range(len(value))
            return tuple(self.create_proxy("call_function", operator.getitem, (proxy, i), {}) for i in indices)
        of_batch = target is _batch_size or any(type(n.meta["value"]) is int for n in node.all_input_nodes)
        return proxy if of_batch or isinstance(value, Tensor | torch.device | torch.dtype) else value

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["value"])
        self.computing = True
        try:
            if node.op == "call_function":
                return node.target(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            found = operator.attrgetter(node.target)(self.root)
            return found(*args, **kwargs) if node.op == "call_module" else found
        finally:
            self.computing = False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self.computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)


def _has_blocks(name: str, module: nn.Module) -> bool:
    """Whether a module is a network or a stage, and not itself an item of `blocks`."""
    is_block = re.search(r"\bblocks(\.\d+)+$", name)
    return not is_block and any(child in LISTS_OF_BLOCKS for child, _ in module.named_children())


def _is_block(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node calls a numbered module of a class that belongs to a certain network."""
    if node.op != "call_module" or not re.search(r"\d$", node.target):
        return False
    of_stem = re.search(r"\b(stem|patch_embed|downsample)", node.target)
    return not of_stem and not type(modules[node.target]).__module__.startswith(GENERAL_PACKAGES)


def _find_cuts(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[int]:
    """Return the indices of the nodes with which new segments start."""
    nodes = list(graph.nodes)
    of_image = _depending_on_image(graph)
    calls = [i for i, node in enumerate(nodes) if node.op == "call_module" and node in of_image]
    blocks = [i for i in calls if _is_block(nodes[i], modules)] or calls

    def can_cut(index: int) -> bool:
        passing = _passing(nodes, index, of_image)
        return len(passing) == 1 and _is_batch(passing.pop().meta["value"])

    if not blocks:
        return []
    ranges = [range(blocks[0], 0, -1)]  # the last place before the first block, then the first one after each
    following = [*blocks[1:], len(nodes) - 1]
    ranges += [range(block + 1, end + 1) for block, end in zip(blocks, following, strict=True)]
    return [found for places in ranges if (found := next(filter(can_cut, places), None))]


def _depending_on_image(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose result depends on the pixels."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (node.target not in OF_ANY_INPUT and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _passing(nodes: list[fx.Node], index: int, of_image: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes in `of_image` before `index` whose results are used from there on."""
    before = of_image.intersection(nodes[:index])
    later = (node for node in nodes[index:] if node.target not in OF_ANY_INPUT)
    return {argument for node in later for argument in node.all_input_nodes if argument in before}


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (NUM_TRACED,)


def _owner(node: fx.Node, called: set[str]) -> str:
    """Return the module that a node calls or whose parameter or buffer it uses; the parameter itself if only modules
    within that module are `called`, as in the network."""
    module_name = node.target.rpartition(".")[0]
    is_outer = not module_name or any(name.startswith(f"{module_name}.") for name in called)
    return node.target if node.op == "call_module" or is_outer else module_name


def _bind(graph: fx.Graph, start: int, end: int, network: nn.Module, twin: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the nodes from `start` to `end` as a function that computes with `network`; a single module as it is."""
    nodes = list(graph.nodes)
    of_image = _depending_on_image(graph)
    source = _passing(nodes, start, of_image).pop() if start else nodes[0]
    result = nodes[end].args[0] if nodes[end].op == "output" else _passing(nodes, end, of_image).pop()
    part = fx.Graph()
    copies = {source: part.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.target in OF_ANY_INPUT:
                copies[node] = part.call_function(node.target, (copies[source],))
            else:
                for argument in node.all_input_nodes:
                    copy(argument)
                copies[node] = part.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes[start:end]:
        if node in of_image and node is not source:
            copy(node)
    part.output(copy(result))
    _, *steps, _ = part.nodes
    if len(steps) == 1 and steps[0].op == "call_module" and steps[0].args == (copies[source],) and not steps[0].kwargs:
        return network.get_submodule(steps[0].target)
    return MethodType(type(fx.GraphModule(twin, part)).forward, network)
