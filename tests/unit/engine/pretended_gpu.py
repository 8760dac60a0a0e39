"""A GPU that isn't there: tensors of the CPU that say they lie on cuda:1, under the rules a real one has.

    waiting     what would make the host wait for the device is refused while `strict` is on; so is a copy between the
                two from memory that isn't pinned
    reading     a copy to the host may be read only after an event recorded behind it was synchronised
    current     streams, events and graphs belong to the thread's current device, which is cuda:0 until it is chosen
    graphs      a capture notes the operations, a replay runs them again on the same memory and on nothing else

Values are computed for real, so tokens can be compared.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.engine.attention.packed import PackedAttention, Packing
from pipeline.engine.kv_cache import KVCache

GPU = torch.device("cuda", 1)

WAITING = {
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "bincount", "equal", "allclose"),
        *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "__repr__", "is_nonzero"),
        *("argwhere",),
    )
} | {torch.nonzero, torch.masked_select, torch.unique, torch.bincount, torch.equal, torch.allclose, torch.argwhere}
"""What reads values of a tensor on the device, by the name the caller used."""

WAITING_INSIDE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero"}
"""The same, as operations deep inside of others call them."""


class HostWaits(AssertionError):
    """The host would wait for the device here, or read what hasn't arrived."""


class OnGpu(torch.Tensor):
    """Lies on the pretended device."""


class Pinned(torch.Tensor):
    """Host memory that the device copies from and to by itself."""


class PretendedGpu(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.strict = False
        self.capturing = False
        self.chosen = threading.local()
        self.on_their_way: list[int] = []
        """Addresses of host copies that no event stands behind yet."""
        self.unread: set[int] = set()
        """Addresses of host copies that haven't arrived, as far as the host knows."""

    def check_current(self) -> None:
        index = getattr(self.chosen, "index", 0)
        assert index == GPU.index, f"work for {GPU} goes to cuda:{index}, the thread's current device"

    def refuse(self, func: Any, why: str) -> None:
        if self.strict or self.capturing:
            raise HostWaits(f"{getattr(func, '__name__', func)}: {why}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return GPU if isinstance(args[0], OnGpu) else torch.device("cpu")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        there = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
        if func is torch.Tensor.pin_memory:
            self.check_current()
            return _plain(torch.Tensor.clone, args[0]).as_subclass(Pinned)
        if func is torch.Tensor.copy_:
            return self._copy(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if func in WAITING:
            if here:
                self.refuse(func, "reads a tensor of the device")
            if any(tensor.data_ptr() in self.unread for tensor in there):
                self.refuse(func, "reads a copy that may not have arrived")
        if here and there:
            raise HostWaits(f"{func.__name__} mixes host and device")
        if here and func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            self._check_index(func, *args)
        repeats = func in (torch.repeat_interleave, torch.Tensor.repeat_interleave) and len(here) > 1
        if repeats and kwargs.get("output_size") is None:
            self.refuse(func, "the size of the result lies on the device")
        made_here = _is_gpu(kwargs.get("device"))
        if made_here:
            if func in (torch.tensor, torch.as_tensor):
                self.refuse(func, "copies from memory that isn't pinned")
            del kwargs["device"]
        pinned = kwargs.pop("pin_memory", False) if "pin_memory" in kwargs else False
        out = _plain(func, *args, **kwargs)
        if pinned:
            return out.as_subclass(Pinned)
        return _put(out) if here or made_here else out

    def _to(self, args: Any, kwargs: Any) -> Any:
        source = args[0]
        target = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
        args = tuple(arg for arg in args if not isinstance(arg, torch.device))
        non_blocking = kwargs.pop("non_blocking", False)
        kwargs.pop("device", None)
        moved = _plain(torch.Tensor.to, *args, **kwargs) if len(args) > 1 or kwargs else source
        if _is_gpu(target) and not isinstance(source, OnGpu):
            if self.capturing or not (isinstance(source, Pinned) and non_blocking):
                self.refuse(torch.Tensor.to, "copies from memory that isn't pinned, or waits for the copy")
            return _put(_plain(torch.Tensor.clone, moved))
        if target is not None and target.type == "cpu" and isinstance(source, OnGpu):
            self.refuse(torch.Tensor.to, "copies to the host")
            return _plain(torch.Tensor.clone, moved).as_subclass(torch.Tensor)
        return _put(moved) if isinstance(source, OnGpu) else moved

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(target, OnGpu) != isinstance(source, OnGpu):
            host = source if isinstance(target, OnGpu) else target
            if self.capturing or not (isinstance(host, Pinned) and non_blocking):
                self.refuse(torch.Tensor.copy_, "copies from memory that isn't pinned, or waits for the copy")
            elif host is target:
                self.on_their_way.append(target.data_ptr())
                self.unread.add(target.data_ptr())
        _plain(torch.Tensor.copy_, target, source)
        return target

    def _check_index(self, func: Any, tensor: torch.Tensor, index: Any, value: Any = None) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        indices = [part for part in parts if isinstance(part, torch.Tensor)]
        if any(part.dtype == torch.bool or part.dim() == 0 for part in indices):
            self.refuse(func, "a mask or a single number on the device as index")
        if any(isinstance(part, list) for part in parts):
            self.refuse(func, "a list as index is copied from the host")
        if isinstance(value, (int, float)):
            ints = sum(isinstance(part, int) for part in parts)
            if indices or ints == tensor.dim():
                self.refuse(func, "a plain number as value is copied from the host")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """From here on nothing may wait."""
        with _NoWaitingInside():
            self.strict = True
            try:
                yield
            finally:
                self.strict = False


class _NoWaitingInside(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING_INSIDE:
            raise HostWaits(f"{func} reads values of a tensor")
        return func(*args, **(kwargs or {}))


def _plain(func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _put(out: Any) -> Any:
    """The same on the device."""
    if isinstance(out, torch.Tensor):
        return out if isinstance(out, OnGpu) else out.as_subclass(OnGpu)
    if isinstance(out, (tuple, list)):
        parts = [_put(part) for part in out]
        return type(out)(parts) if type(out) in (tuple, list) else type(out)(tuple(parts))  # the latter: a named tuple
    return out


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class _Graph:
    def __init__(self) -> None:
        self.record = _Record()

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            for func, args, kwargs, before in self.record.operations:
                after = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    gpu = PretendedGpu()

    class Device(contextlib.ContextDecorator):
        def __init__(self, device: torch.device) -> None:
            self.index = torch.device(device).index

        def __enter__(self) -> None:
            self.before = getattr(gpu.chosen, "index", 0)
            gpu.chosen.index = self.index

        def __exit__(self, *_: object) -> None:
            gpu.chosen.index = self.before

    class Stream:
        device_index = GPU.index

        def __init__(self, device: torch.device | None = None) -> None:
            if device is None:
                gpu.check_current()
            else:
                assert device == GPU

        def wait_stream(self, other: Stream) -> None:
            pass

    class Event:
        def record(self) -> None:
            gpu.check_current()
            self.behind, gpu.on_their_way = gpu.on_their_way, []

        def synchronize(self) -> None:
            gpu.unread.difference_update(self.behind)

    @contextmanager
    def graph(one: _Graph, pool: object = None, stream: Stream | None = None) -> Iterator[None]:
        gpu.check_current()
        assert stream is not None, "torch's own capture stream may belong to another device"
        gpu.capturing = True
        try:
            with one.record:
                yield
        finally:
            gpu.capturing = False

    def current_stream(device: torch.device | None = None) -> Stream:
        return Stream(device)

    pretended = {
        "device": Device,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": current_stream,
        "Event": Event,
        "CUDAGraph": _Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "set_stream": lambda stream: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (20_000_000, 40_000_000),
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: 10_000_000,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "get_device_capability": lambda device: (8, 0),
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with gpu:
        yield gpu


def put_model(model: Any) -> Any:
    """The model, with its weights on the pretended device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameter.detach().as_subclass(OnGpu)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(OnGpu)
    return model


class PretendedFlash(PackedAttention):
    """The flash backends' own code, with kernels of plain torch operations in place of theirs."""

    name = "pretended"
    block_size = 16

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, causal: bool
    ) -> torch.Tensor:
        with torch._C.DisableTorchFunction():  # a kernel reads where it likes
            bounds_q, bounds_k = queries.ends.tolist(), keys.ends.tolist()
            lengths = [(b - a, d - c) for (a, b), (c, d) in zip(_pairs(bounds_q), _pairs(bounds_k), strict=True)]
            assert (queries.longest, keys.longest) == tuple(max(each) for each in zip(*lengths, strict=True))
            out = torch.empty_like(q)
            group = q.shape[1] // k.shape[1]
            for (a, b), (c, d) in zip(_pairs(bounds_q), _pairs(bounds_k), strict=True):
                k_part, v_part = (part[c:d].repeat_interleave(group, dim=1).transpose(0, 1) for part in (k, v))
                mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)) if causal else None
                out[a:b] = F.scaled_dot_product_attention(q[a:b].transpose(0, 1), k_part, v_part, mask).transpose(0, 1)
        return out.as_subclass(OnGpu)

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        tables, lengths = self._decode.tables, self._decode.lengths
        num_rows, width = tables.shape
        num_kv_heads, head_dim = cache.keys[layer].shape[-2:]
        keys, values = (
            part[layer].index_select(0, tables.flatten()).view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
            for part in (cache.keys, cache.values)
        )
        seen = torch.arange(width * cache.block_size, device=q.device)[None] < lengths[:, None]
        queries = q.view(num_rows, num_kv_heads, -1, head_dim)
        return F.scaled_dot_product_attention(queries, keys, values, seen[:, None, None]).reshape(q.shape)


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(bounds))
