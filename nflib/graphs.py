"""Work that a GPU replays: CUDA graphs, recorded once from an ordinary function.

A small model leaves a GPU idle: starting a kernel costs the CPU some ten microseconds, running it
often less. A CUDA graph is a list of kernels with all of their addresses, which the GPU goes
through by itself after one start:

    step = Replayed(function, device)        step(batch) runs, records, and from then on replays

What a graph asks of the function: every call does the same operations on the same memory. What
changes from call to call is written into tensors, never a number of Python's; nothing is read
back, for the recording has no values to read; random numbers come from the device's generator,
which goes on from replay to replay as it does from call to call.

On a CPU, and with a function that cannot be recorded, the function itself is called each time.
CUDA graphs in torch: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nflib.arguments import Size, checked
from nflib.cache import fresh, is_traced

# Takes a function without arguments; returns what runs it again, and what it returned.
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]

# Calls before the recording: what is made at the first use of a kernel must be there by then.
WARM_UP = 3

READS = set(
    "_local_scalar_dense is_nonzero equal nonzero nonzero_numpy masked_select bincount histc "
    "unique _unique2 unique_dim unique_consecutive".split()
)
# With an operand on the device they need a value of it to know how much memory to ask for.
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")


class Replayed:
    """A function of tensors that is recorded as a CUDA graph and replayed.

    The first calls run the function as it is; they are ordinary calls, nothing is done
    twice. The next one records it, and that call and all later ones replay the recording: their
    arguments are copied to where the recording reads, and what it returns stands in the same
    tensors each time, valid until the next call. A call with other shapes runs the function as it
    is. The function may change tensors that it holds; memory that it allocates for good must be
    allocated within the first calls.

    Args:
        function: of tensors, with any result; it returns the same structure each time.
        device: what it runs on; only CUDA devices have graphs.
        enabled: False never records.
        warm_up: calls before the recording.

    Attributes:
        obstacle: why the function is not recorded, in words, or None.
    """

    @checked
    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        enabled: bool = True,
        warm_up: Size = WARM_UP,
    ) -> None:
        self.function, self.warm_up = function, warm_up
        self.record = recorder_for(device) if enabled else None
        self.obstacle: str | None = None
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.inputs: list[Tensor] = []
        self.result: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.record is None:
            return self.function(*inputs)
        if self.replay is not None:
            if not self._fit(inputs):
                return self.function(*inputs)
        elif self.calls < self.warm_up:
            return self._warm_up(inputs)
        else:
            self._record(inputs)
            if self.replay is None:
                return self.function(*inputs)
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        self.replay()
        return self.result

    def _fit(self, inputs: tuple[Tensor, ...]) -> bool:
        return len(inputs) == len(self.inputs) and all(
            held.shape == new.shape and held.dtype == new.dtype
            for held, new in zip(self.inputs, inputs, strict=True)
        )

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Any:
        self.calls += 1
        if self.calls < self.warm_up:
            with beside():
                return self.function(*inputs)
        # A recording that fails leaves the device in disorder: what would stop it is found before.
        with HostReads() as reads, beside():
            result = self.function(*inputs)
        if reads.found:
            self.record, self.obstacle = None, f"it reads a value back ({reads.found[0]})"
        return result

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        assert self.record is not None
        self.inputs = [new.clone() for new in inputs]
        try:
            self.replay, self.result = self.record(lambda: self.function(*self.inputs))
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.record, self.obstacle = None, f"it cannot be recorded ({reason})"


# The loops that are recorded within `captured`, by what they belong to; None outside of it.
_loops: ContextVar[dict[Hashable, Replayed | None] | None] = ContextVar("loops", default=None)


@checked
@contextmanager
def captured(model: nn.Module) -> Iterator[None]:
    """Inside of the block the model's inverses that go number by number are replayed on a GPU.

        with captured(maf), torch.no_grad():
            samples = torch.cat([maf.sample(256) for _ in range(40)])

    Such an inverse (of a `nflib.autoregressive.MaskedAutoregressive`) starts D times as many
    kernels as a forward pass. The first call for a batch size runs as it is, the second records
    it, all later ones replay. Parameters may change in place within the block; with gradients, and
    on a CPU, nothing is recorded. The samplers of PixelCNN and WaveNet need no such block: they
    replay their steps within one call.
    """
    token = _loops.set(dict.fromkeys(model.modules()) | (_loops.get() or {}))
    try:
        yield
    finally:
        _loops.reset(token)


def replayed(owner: nn.Module, function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``, without gradients replayed if the owner is in a `captured` model."""
    loops = None if is_traced() or torch.is_grad_enabled() else _loops.get()
    if loops is None or owner not in loops:
        return function(*inputs)
    device = inputs[0].device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    mode = (owner.training, narrow)  # what else decides which operations there are
    key = (owner, function.__name__, mode, *((i.shape, i.dtype, i.device) for i in inputs))
    loop = loops.get(key)
    if loop is None:
        loop = loops[key] = Replayed(_apart(function), inputs[0].device, warm_up=1)
    result = loop(*inputs)
    # What a replay returns is overwritten by the next.
    return tuple(part.clone() for part in result)


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with matrices of its own, for those that are kept may go before it does."""

    def run(*inputs: Tensor) -> Any:
        with fresh():
            return function(*inputs)

    return run


def recorder_for(device: torch.device) -> Recorder | None:
    """How to record on a device, or None where there are no graphs."""
    return record_on_gpu if device.type == "cuda" else None


def record_on_gpu(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The kernels that a function starts, as a graph; it is run once without computing anything."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, which load data or watch the device, may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


@contextmanager
def beside() -> Iterator[None]:
    """On a stream of its own, as calls before a recording should be; nothing on a CPU."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class HostReads(TorchDispatchMode):
    """Notes what makes the host wait for a device: values read back, sizes that depend on values.

    It sees what torch computes on a CPU as well, where reading costs nothing: what it finds there
    would wait on a GPU.

    Attributes:
        found: each as words, ``"item in loss, train.py line 12"``, with the line of the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS or self._by_mask(name, args) or self._leaves(name, args, kwargs):
            self.found.append(f"{_WORDS.get(name, name)} in {_caller()}")
        return func(*args, **kwargs)

    def _by_mask(self, name: str, args: tuple[Any, ...]) -> bool:
        if name not in INDEXING:
            return name == "repeat_interleave" and len(args) == 1
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)

    def _leaves(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a tensor is copied from an accelerator to the CPU."""
        if name == "copy_":
            target, source = args[0].device, args[1]
        else:
            target, source = kwargs.get("device"), args[0] if args else None
        if name not in ("copy_", "_to_copy") or target is None:
            return False
        return torch.device(target).type == "cpu" and source.device.type != "cpu"


_WORDS = {
    "_local_scalar_dense": "a number read from a tensor",
    "_to_copy": "a copy to the CPU",
    "copy_": "a copy to the CPU",
    "index": "indexing by a mask",
    "index_put_": "writing by a mask",
}


def _caller() -> str:
    """The innermost line that is not torch's own or this file's."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename.replace("\\", "/")
        if "/torch/" not in path and path != __file__.replace("\\", "/"):
            return f"{frame.name}, {path.rsplit('/', 1)[-1]} line {frame.lineno}"
    return "torch"
