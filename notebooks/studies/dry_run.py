"""Run a model of any size on tensors that have shapes and no data, and count what a GPU would have to do.

The tensors are of PyTorch's meta device, which stands for the GPU: what the library fuses, records or chooses on a GPU,
it does here too. An operation that gives new memory or writes into memory is a kernel; it reads its inputs and writes
its outputs once. Attention and norms are the kernels that a GPU has for them. A function of `omniforcing_lib.fused` is
one kernel: the scheduler of torch's compiler says so (tests/test_dry_run.py asks it).

Whatever a GPU would have to wait for raises `HostWork`: a tensor of the host, a value or a shape that the host asks
for, a copy between the two.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry

from omniforcing_lib import backends, fused, rope
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import Guidance, guided_denoiser
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import low_memory
from omniforcing_lib.ltx2.codec import LTX2Codec
from omniforcing_lib.masks import build
from omniforcing_lib.rollout import RolloutConfig, new_cache, predict
from omniforcing_lib.transformer import Transformer

META, GRID, TEXT = torch.device("meta"), (16, 24), 1024
SIGMA = 0.7
_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_PRODUCTS = ("mm", "attention", "convolution")


class HostWork(RuntimeError):
    """A GPU would have to wait for the host, or to multiply in another dtype than the weights'."""


@dataclass(eq=False)
class Ledger(TorchDispatchMode):
    """Count kernels, bytes, FLOPs and memory of all that runs within it.

    Args:
        products: dtype that all products must be in; None allows any.
        host: let the host work too, uncounted: what is made once may be made there.

    Attributes:
        kernels: launches by name.
        bytes: read and written, by name.
        flops: of products, by name.
        peak: most bytes of tensors made here that were alive at a time.
    """

    products: torch.dtype | None = None
    host: bool = False
    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._alive, self._inside = 0, None
        self._known: dict[object, list[tuple]] = {}

    @property
    def fuses_now(self) -> bool:
        """Tell whether a function runs that is one kernel."""
        return self._inside is not None

    def elementwise(self) -> tuple[int, int]:
        """Count kernels and bytes of all that is no product."""
        others = [name for name in self.kernels if not any(p in name for p in _PRODUCTS)]
        return sum(self.kernels[name] for name in others), sum(self.bytes[name] for name in others)

    def __torch_dispatch__(self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None):
        """Run one operation and count it."""
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        inputs, name = [x for x in leaves if isinstance(x, Tensor)], str(func._overloadpacket).partition(".")[2]
        # 1. What would stop the GPU.
        device = kwargs.get("device")
        if any(not x.is_meta for x in inputs) or (device is not None and torch.device(device).type != "meta"):
            if self.host:
                return func(*args, **kwargs)
            raise HostWork(f"{name} touches a tensor of the host")
        if any(tag in func.tags for tag in _VALUES):
            raise HostWork(f"{name} asks the GPU for a value")
        is_product = any(word in name for word in _PRODUCTS)
        wrong = {x.dtype for x in inputs} - {self.products} if self.products and name != "_scaled_mm" else ()
        if is_product and wrong:
            raise HostWork(f"{name} multiplies in {wrong.pop()}, not in {self.products}")
        # 2. The shapes of what it gives, remembered: the layers of a model are alike.
        mutable = func._schema.is_mutable
        key = func, spec, tuple((*_meta(x), x.storage_offset()) if isinstance(x, Tensor) else x for x in leaves)
        made = None if mutable else self._known.get(key)
        if made is not None:
            outputs = [torch.empty_strided(*shape, dtype=dtype, device=META) for *shape, dtype in made]
            out = outputs[0] if len(outputs) == 1 else tuple(outputs)
        else:
            out = func(*args, **kwargs)
            outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            own = {x.untyped_storage()._cdata for x in inputs}
            if not mutable and any(x.untyped_storage()._cdata in own for x in outputs):
                return out  # a view
            if not outputs and not mutable:
                return out  # a question that the host answers
            if not mutable and all(isinstance(x, Tensor) for x in tree_leaves(out)):
                self._known[key] = [_meta(x) for x in outputs]
        # 3. Its place in the books.
        written = [args[0]] if mutable else outputs
        if name.startswith(("index_put", "index_copy")):  # writes what it is given, not all of its target
            inputs, written = inputs[1:], inputs[-1:]
        elif name in ("copy_", "fill_", "zero_"):
            inputs = inputs[1:]
        if self._inside is not None:
            if mutable:
                self._inside.append((args[0], sum(map(_size, written))))
            return out
        if not name.startswith(("empty", "new_empty")):
            self._note(name, inputs, sum(map(_size, written)))
        if func._overloadpacket in flop_registry:
            self.flops[name] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not mutable:
            self._hold(outputs)
        return out

    def fused(self, plain: Callable) -> Callable:
        """Stand for `fused.compiled`: run a function as one kernel."""

        def run(*args: object, **more: object) -> object:
            self._inside, before, rope.is_compiling = [], rope.is_compiling, lambda: True
            try:
                out, written = plain(*args, **more), self._inside
            finally:
                self._inside, rope.is_compiling = None, before
            inputs = [x for x in tree_leaves((args, more)) if isinstance(x, Tensor)]
            kept = {x.untyped_storage()._cdata for x in inputs}
            written = [(x, size) for x, size in written if x.untyped_storage()._cdata in kept]
            targets = {x.untyped_storage()._cdata for x, _ in written}
            outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            outputs = [x for x in outputs if x.untyped_storage()._cdata not in kept]
            inputs = [x for x in inputs if x.untyped_storage()._cdata not in targets]
            if outputs or written:
                total = sum(map(_size, outputs)) + sum(size for _, size in written)
                self._note(plain.__name__, inputs, total)
                self._hold(outputs)
            return out

        return run

    def _note(self, name: str, inputs: Sequence[Tensor], written: int) -> None:
        self.kernels[name] += 1
        self.bytes[name] += sum(map(_size, {id(x): x for x in inputs}.values())) + written

    def _hold(self, outputs: Sequence[Tensor]) -> None:
        for x in outputs:
            storage = x.untyped_storage()
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._alive)

    def _free(self, nbytes: int) -> None:
        self._alive -= nbytes


def _meta(x: Tensor) -> tuple:
    return tuple(x.shape), x.stride(), x.dtype


def _size(x: Tensor) -> int:
    """Bytes of a tensor; what is repeated is read once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


class _Kernels(TorchFunctionMode):
    """Attend and norm by the kernels that a GPU has for it; the meta device would take them apart."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None):
        if func is rms_norm and not self._ledger.fuses_now:
            return self._ledger.fused(rms_norm)(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention and not kwargs:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(
    products: torch.dtype | None = torch.bfloat16, *, fuse: bool = True, host: bool = False
) -> Iterator[Ledger]:
    """Count what runs within, without gradients, as on a GPU; without `fuse` every operation is a kernel."""
    ledger, before = Ledger(products, host), (backends.GPU, fused.compiled, low_memory.multiplies)
    backends.GPU = "meta"
    low_memory.multiplies = lambda device, *question: torch.device(device).type == "meta"
    fused.compiled = ledger.fused if fuse else (lambda plain: plain)
    try:
        with torch.no_grad(), _Kernels(ledger), ledger:
            yield ledger
    finally:
        backends.GPU, fused.compiled, low_memory.multiplies = before


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Give a tensor without data."""
    return torch.empty(shape, dtype=dtype, device=META)


class _NoDraws(TorchDispatchMode):
    """Leave new weights as they are: a draw of no data takes seconds for a large model."""

    def __torch_dispatch__(self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None):
        name = func._overloadpacket._qualified_op_name
        return args[0] if name in ("aten::uniform_", "aten::normal_") else func(*args, **(kwargs or {}))


def model_of(config: ModelConfig, weights: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Build a model without data; `weights` as `checkpoints.load` takes it."""
    with META, _NoDraws():
        model = Transformer(config).to(dtype).requires_grad_(False).eval()
        return low_memory.with_fp8_layers(model) if weights else model


def latents(model: Transformer, counts: AV[int], batch: int = 1, grid: tuple[int, int] = GRID) -> AV[Tensor]:
    """Give latents without data. Shapes: AV([B, F, h, w, C], [B, T, C])."""
    dtype = model.proj_out.weight.dtype
    video = empty(batch, counts.video, *grid, model.config.in_channels, dtype=dtype)
    return AV(video, empty(batch, counts.audio, model.config.audio_in_channels, dtype=dtype))


def context(model: Transformer, tokens: int = TEXT) -> AV[Tensor]:
    """Give the context of one prompt without data. Shapes: AV [1, L, C]."""
    return AV(*(empty(1, tokens, model.config.caption_channels, dtype=model.proj_out.weight.dtype) for _ in range(2)))


class StreamRun(NamedTuple):
    """A stream whose window is full: what a pass does, what the first pass over a block does more, bytes that stay."""

    steady: Ledger
    first: Ledger
    weights: int
    rings: int
    text: int
    anchors: int
    tables: int


def stream_pass(
    model: Transformer, causal: RolloutConfig, *, fuse: bool = True, grid: tuple[int, int] = GRID, text: int = TEXT
) -> StreamRun:
    """Count passes over a block whose window is full, where all that follows from sigma and the text is held.

    The first pass over a block makes its tables and rotates the pinned keys; then all passes are alike.
    """
    k, words, dtype = causal.window + 3, context(model, text), model.proj_out.weight.dtype
    with counting(dtype, fuse=fuse, host=True):
        cache = new_cache(model, causal, grid, 1)
        x = latents(model, causal.layout.block(k).map(len), grid=grid)
        predict(model, x, SIGMA, words, cache, cache.open(k))
    rope.tables.cache_clear()
    runs = []
    for _ in range(2):
        with counting(dtype, fuse=fuse) as ledger:
            predict(model, x, SIGMA, words, cache, cache.open(k + 1))
        runs.append(ledger)
    held = [stream.text.held for layer in cache.layers for stream in layer]
    anchors = sum(t.nbytes for name, t in cache.tensors().items() if name.endswith("anchor"))
    tables = model.rotations(causal.layout.block(k + 1), grid, 0)
    each = sum(t.nbytes for pair in tables for rotation in pair for t in rotation)
    weights = sum(p.nbytes for p in model.parameters())
    text_keys = sum(t.nbytes for by_key in held for pair in by_key.values() for t in pair)
    kept = weights, cache.nbytes, text_keys, anchors, each * rope.tables.cache_parameters()["maxsize"]
    return StreamRun(*reversed(runs), *kept)


def masked_pass(model: Transformer, causal: RolloutConfig, seconds: int, *, grid: tuple[int, int] = GRID) -> Ledger:
    """Count a block-causal forward pass over a clip, each latent at its block's level."""
    counts, words = model.clock.latents(seconds), context(model)
    x, masks = latents(model, counts, grid=grid), build(causal.layout, counts.video, grid[0] * grid[1])
    sigma = counts.map(lambda n: empty(1, n, dtype=torch.float32))
    with counting(model.proj_out.weight.dtype) as ledger:
        model(x, sigma, words, masks=masks)
    return ledger


def teacher_step(model: Transformer, guidance: Guidance, seconds: int, *, grid: tuple[int, int] = GRID) -> Ledger:
    """Count a guided step of the teacher on a clip."""
    counts, words, level = model.clock.latents(seconds), context(model), empty(dtype=torch.float32)
    x = latents(model, counts, grid=grid)
    with counting(host=True):
        model.rotations(counts.map(range), grid, 0)  # its frequencies are made once, on the host
    rope.tables.cache_clear()
    with counting(model.proj_out.weight.dtype) as ledger:
        guided_denoiser(model, words, words, guidance)(x, level)
    return ledger


def decoders() -> nn.ModuleList:
    """Build LTX-2's own decoders without data; diffusers' defaults are the 19B's sizes."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    settings = {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    with META, _NoDraws():
        parts = AutoencoderKLLTX2Video(**settings), AutoencoderKLLTX2Audio()
        # diffusers' own `to` warns
        halves = [nn.Module.to(part, torch.bfloat16) for part in parts]
        return nn.ModuleList([*halves, LTX2Vocoder()]).eval()


def decoding(
    parts: nn.ModuleList, causal: RolloutConfig, horizon: int, *, grid: tuple[int, int] = GRID
) -> list[tuple[Ledger, int]]:
    """Count the decoding of each block until mid-stream, and the frames that it gives; the vocoder computes in fp32."""
    codec = LTX2Codec(*parts, (32 * grid[0], 32 * grid[1]), horizon=horizon)
    state, channels, done = codec.start(), codec.channels, []
    for k in range(causal.window + 2):
        video, audio = causal.layout.block(k).map(len)
        block = AV(empty(1, video, *grid, channels.video), empty(1, audio, channels.audio))
        with counting(None) as ledger:
            done.append((ledger, codec.decode(block, state).video.shape[1]))
    return done
