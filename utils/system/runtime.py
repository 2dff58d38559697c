"""The processes (ranks) of a run under torchrun: which one this is, what they decide and what they exchange.

No other module imports `torch.distributed`. Without torchrun there is one rank, and all functions return at once.
"""

from __future__ import annotations

import math
import os
import pickle
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from utils.system.errors import InputError
from utils.system.rank_watch import RankWatch

if TYPE_CHECKING:
    from torch import Tensor, nn

Result = TypeVar("Result")

JOIN_WITHIN = 300
"""Seconds in which all ranks must have started."""
ANSWER_WITHIN = timedelta(days=1)
"""Limit of a collective: rank 0 may write a checkpoint for long. `RankWatch` finds ranks that don't answer."""
BROKEN = ("onnection", "peer", "imeout", "timed out", "roken pipe", "remote process", "NCCL")
"""What errors of collectives say when another rank can't be reached."""


def has_other_ranks() -> bool:
    """Whether torchrun has started this process and others. Clusters set WORLD_SIZE in all shells, but only torchrun
    gives each process a number on its machine."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


class RankLost(InputError):
    """Another rank has ended or can't be reached."""


class Runtime:
    """The ranks of this run.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_rank: number of this process on its machine, which is that of its GPU.
        local_world_size: number of processes on this machine.
    """

    def __init__(self) -> None:
        self.rank = self.local_rank = 0
        self.world_size = self.local_world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints, logs and writes."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the other ranks within this context, if torchrun started this process.

        On other ranks than 0 nothing is printed but errors, which begin with their rank.

        Raises:
            RankLost: a rank doesn't start.
        """
        if self.world_size > 1 or not has_other_ranks():
            yield
            return
        import torch
        import torch.distributed as dist

        # Its functions have as a default the group that exists when it is imported. Imported later, as optimizers do,
        # it would keep the group, whose threads then abort the process if they still free memory at its end.
        import torch.distributed.nn.functional

        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank, self.local_world_size = (int(os.environ[f"LOCAL_{key}"]) for key in ("RANK", "WORLD_SIZE"))
        streams = sys.stdout, sys.stderr
        if not self.is_main:
            sys.stdout, sys.stderr = Path(os.devnull).open("w"), RankStream(sys.stderr, self.rank)  # noqa: SIM115
        try:
            backend = "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local_rank)
                backend = "cpu:gloo,cuda:nccl"
            store = self._meet()
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world_size, timeout=ANSWER_WITHIN
            )
            with RankWatch(store, self.rank, self.world_size):
                yield
            dist.destroy_process_group()
        finally:
            sys.stdout, sys.stderr = streams
            self.__init__()

    def _meet(self) -> Any:
        """The store of the ranks that are alive now.

        After a restart, torchrun's store still has what earlier processes wrote. So rank 0 answers each rank under a
        number that only this process knows, until all have confirmed the new name of their part of the store.
        """
        from torch.distributed import DistStoreError, PrefixStore, TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosted = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=JOIN_WITHIN)
        try:
            store = TCPStore(address, port, is_master=hosted, timeout=limit, wait_for_workers=False, multi_tenant=True)
            if self.is_main:
                return PrefixStore(self._welcome(store), store)
            number = secrets.token_hex(8)
            store.set(f"thaw/hello/{self.rank}", number)
            name = store.get(f"thaw/welcome/{number}").decode()
            store.set(f"{name}/confirmed/{self.rank}", "1")
            store.get(f"{name}/complete")
            return PrefixStore(name, store)
        except DistStoreError as error:
            raise RankLost(f"rank 0 at {address}:{port} doesn't answer within {JOIN_WITHIN} s ({error})") from error

    def _welcome(self, store: Any) -> str:
        """Answer the other ranks, and return the name of the part of the store that they all know."""
        name = f"thaw/{secrets.token_hex(8)}"
        missing, answered = set(range(1, self.world_size)), set()
        deadline = time.monotonic() + JOIN_WITHIN
        while missing:
            for rank in sorted(missing):
                if store.check([f"{name}/confirmed/{rank}"]):
                    missing.remove(rank)
                elif store.check([hello := f"thaw/hello/{rank}"]) and (number := store.get(hello)) not in answered:
                    answered.add(number)
                    store.set(f"thaw/welcome/{number.decode()}", name)
            if time.monotonic() > deadline:
                raise RankLost(f"ranks {sorted(missing)} of {self.world_size} didn't start within {JOIN_WITHIN} s")
            time.sleep(0.02)
        store.set(f"{name}/complete", "1")
        return name

    def first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0; its result, or its exception, is that of all ranks. Both are pickled."""
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as error:
                failed = [None, _picklable(error)]
                self._share(lambda dist: dist.broadcast_object_list(failed, src=0))
                raise
        self._share(lambda dist: dist.broadcast_object_list(answer, src=0))
        if answer[1] is not None:
            answer[1].printed_by_rank_0 = True
            raise answer[1]
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of each rank, in their order, on all ranks. They are pickled."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        self._share(lambda dist: dist.all_gather_object(values, value))
        return values

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise a ValueError unless all ranks have the same `facts`, by name."""
        ranks = self.gather((socket.gethostname(), facts))
        for rank, (host, others) in enumerate(ranks):
            for name, value in ranks[0][1].items():
                if others[name] != value:
                    raise ValueError(
                        f"{name}: differs between rank 0 ({value!r:.80}, on {ranks[0][0]}) and rank {rank} "
                        f"({others[name]!r:.80}, on {host}); all machines need the same files, settings and versions"
                    )

    def collect_batches(self, tensors: Sequence[Tensor], batch_size: int) -> list[Tensor]:
        """Collect on rank 0 the rows of batches that were dealt out, batch b to rank b mod `world_size`.

        Args:
            tensors: (rows of this rank, ...) each, on the CPU.
            batch_size: rows per batch; the last one may have fewer.

        Returns:
            (rows of all ranks, ...) each, in the order of the batches; on other ranks no rows.
        """
        if self.world_size == 1:
            return list(tensors)
        rows = self.gather(len(tensors[0]))
        return [self._collect(tensor, rows, batch_size) for tensor in tensors]

    def _collect(self, tensor: Tensor, rows: Sequence[int], batch_size: int) -> Tensor:
        import torch

        if not self.is_main:
            if len(tensor):
                self._share(lambda dist: dist.send(tensor.contiguous(), 0))
            return tensor[:0]
        received = [tensor]
        for rank in range(1, self.world_size):
            received.append(tensor.new_empty(rows[rank], *tensor.shape[1:]))
            if rows[rank]:
                self._share(lambda dist, rank=rank: dist.recv(received[rank], rank))
        dealt = [part.split(batch_size) for part in received]
        count = sum(len(batches) for batches in dealt if len(batches[0]))
        return torch.cat([dealt[i % self.world_size][i // self.world_size] for i in range(count)])

    def unite(self, flags: Tensor) -> None:
        """Set bool `flags` on each rank wherever one has set them."""
        if self.world_size > 1:
            united = flags.byte()
            self._share(lambda dist: dist.all_reduce(united, dist.ReduceOp.MAX))
            flags.copy_(united.bool())

    def exchange(self, slices: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send `slices[r]` to each rank r, and return what each rank r sent here, of shape `shapes[r]`."""
        if self.world_size == 1:
            return [slices[0].reshape(shapes[0])]
        import torch

        sizes = [math.prod(shape) for shape in shapes]
        received, sent = slices[0].new_empty(sum(sizes)), torch.cat([part.reshape(-1) for part in slices])
        self._share(lambda dist: dist.all_to_all_single(received, sent, sizes, [part.numel() for part in slices]))
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]

    def join_slices(self, slice_: Tensor) -> Tensor:
        """The slices (n,) of all ranks, in their order, on all ranks: (world_size * n,)."""
        joined = slice_.new_empty(self.world_size, len(slice_))
        self._share(lambda dist: dist.all_gather(list(joined), slice_.contiguous()))
        return joined.view(-1)

    def add(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the sum of those of all ranks."""
        if self.world_size > 1:
            self._share(lambda dist: dist.all_reduce(tensor))

    def shard(self, modules: Sequence[nn.Module], scatter: Callable[[], Any] | None, dtype: Any) -> None:
        """Divide the weights of each of `modules`, inner ones first, between the ranks by FSDP2.

        Args:
            scatter: makes the `torch.distributed.fsdp.ReduceScatter` that adds the gradients of one; None: torch's.
            dtype: of weights and inputs in the modules; None: their own.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(next(modules[-1].parameters()).device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        for module in modules:
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # parts are already divided by the size of the global batch
            module.set_force_sum_reduction_for_comms(True)  # gloo and a scatter of our own have no other
            if scatter:
                module.set_custom_reduce_scatter(scatter())

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor of rank 0 divided as `like` is; itself if `like` isn't divided, or has another shape."""
        if not is_shard(like) or tensor.shape != like.shape:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

    def own_rows(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The rows of a tensor that this rank has, and the number of the first."""
        if not is_shard(tensor):
            return tensor, 0
        size = -(-tensor.shape[0] // self.world_size)  # as torch.chunk
        return tensor.to_local(), min(self.rank * size, tensor.shape[0])

    def write_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
        """Write tensors to safetensors files in `folder`, each rank its rows of those that are divided and a share of
        the others; return the files of this rank.

        Raises:
            OSError: on all ranks, if one can't write.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
        from torch.distributed.checkpoint.api import CheckpointException

        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process
                self._share(lambda _: save(dict(tensors), storage_writer=writer, no_dist=self.world_size == 1))
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if not isinstance(cause, OSError):
                raise cause from error
            raise OSError(cause.errno, f"rank {rank}: {cause.strerror}", cause.filename) from error
        return sorted(folder.glob(f"shard-{self.rank + 1:05}-*"))

    def _share(self, communicate: Callable[[Any], Any]) -> None:
        import torch.distributed as dist

        try:
            communicate(dist)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in BROKEN):
                raise
            raise RankLost(f"another rank has ended ({str(error).splitlines()[0]:.200})") from error


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is divided between the ranks (a DTensor)."""
    return hasattr(tensor, "full_tensor")


class RankStream:
    """A text stream for errors whose lines begin with the rank; no terminal, so that no progress bars are drawn."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream = stream
        self._prefix = f"rank {rank}: "
        self._at_start = True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        starts = [self._at_start, *(line.endswith("\n") for line in lines)]
        self._stream.write("".join(self._prefix * start + line for start, line in zip(starts, lines, strict=False)))
        self._at_start = starts[-1]
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._stream.fileno()


def _picklable(error: Exception) -> Exception:
    """The error itself, or one with its text if it can't be pickled."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


runtime = Runtime()
"""The ranks of this process."""
