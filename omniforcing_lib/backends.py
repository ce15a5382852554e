"""Which device computes, and which kernel attends: flash-attn, FlexAttention or PyTorch's own (specification 1.6, 8.2).

A kernel is chosen once for each kind of tensor. A cached step and a block of a sliced mask need no mask, so flash-attn
serves both; masked training on a GPU takes FlexAttention, everything else PyTorch's scaled dot product. One log line
tells the choice and the reason; the user may name a backend instead.

Shapes: B batch, H heads, T queries, L keys, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("auto", "sdpa", "flash", "flex")
HALF = (torch.float16, torch.bfloat16)
GPU = "cuda"
"""Type of the devices where work is fused and recorded."""
KINDS = 256
"""Kinds of input (shapes, dtypes, masks) for which one function is compiled."""
_log = logging.getLogger(__name__)
_named = "auto"
_flash: dict[int | None, Callable[..., Tensor]] = {}


class Kind(NamedTuple):
    """What a kernel must be able to take: device type, its compute capability, dtype, head dim."""

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, head dim {self.head_dim}"


class Choice(NamedTuple):
    """Kernel of a call without a mask (`sdpa` or `flash`), and how a mask is rendered (`sliced` or `flex`)."""

    plain: str
    masked: str


def device(name: str) -> torch.device:
    """Give an available device: `cpu`, `cuda`, one GPU of several as `cuda:1`, or `auto`, a GPU if there is one.

    Raises:
        ValueError: another name, or a GPU that torch does not see.
    """
    count = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"a device is cpu, cuda (one of several: cuda:1) or auto, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        sees = f"{count} CUDA devices, from cuda:0" if count else "no CUDA device"
        raise ValueError(f"device {name!r} asked for, but torch {torch.__version__} sees {sees}; use 'cpu'")
    return device


def on_gpu(device: str | torch.device) -> bool:
    """Tell whether a device is a GPU, where work is fused and recorded."""
    return (device if isinstance(device, torch.device) else torch.device(device)).type == GPU


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Give a CUDA stream for work beside the current one; None where there is no GPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def use(name: str) -> None:
    """Name the backend of this process: `auto`, `sdpa`, `flash` or `flex`.

    A backend that cannot serve a tensor is refused when attention first meets one of its kind.

    Raises:
        ValueError: another name.
    """
    global _named
    if name not in NAMES:
        raise ValueError(f"an attention backend is one of {', '.join(NAMES)}; found {name!r}")
    _named = name


def chosen(q: Tensor) -> Choice:
    """Choose for tensors like `q`, under autocast for what it casts to.

    Shapes: q [B, H, T, D].
    """
    return Choice(*_settled(_named, q.device.type, q.device.index, computed_in(q), q.shape[-1]))


def computed_in(q: Tensor) -> torch.dtype:
    """Give the dtype that attention computes in: autocast's where it is on, else the tensor's own."""
    device = q.device.type
    # the meta device knows no autocast
    casts = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else q.dtype


def _settled(*question: object) -> tuple[str, str]:
    return _answer(*question)


# What torch.compiler.assume_constant_result does, without the second that importing torch's compiler takes.
_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _answer(name: str, device: str, index: int | None, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    capability = torch.cuda.get_device_capability(index) if device == "cuda" else None
    kind = Kind(device, capability, dtype, head_dim)
    choice = choose(name, kind)
    if choice.plain == "flash" and capability and (function := flash_function(flash_module(capability) or "")):
        _flash[index] = function
    _log.info("attention on %s: %s without a mask, %s with one (asked for: %s)", kind, *choice, name)
    return choice.plain, choice.masked


def choose(name: str, kind: Kind) -> Choice:
    """Choose by capability, or take what is named.

    Raises:
        ValueError: the named backend can't serve this kind, with the reason.
    """
    refused = {backend: refusal(backend, kind) for backend in ("flash", "flex")}
    if why := refused.get(name):
        raise ValueError(f"attention backend {name!r} can't serve {kind}: {why}; name sdpa or auto")
    plain = "flash" if name in ("auto", "flash") and not refused["flash"] else "sdpa"
    return Choice(plain, "flex" if name in ("auto", "flex") and not refused["flex"] else "sliced")


def refusal(backend: str, kind: Kind) -> str | None:
    """Say why flash-attn or FlexAttention can't serve a kind of tensor; None where it can."""
    if kind.device != "cuda":
        return "it needs a CUDA device"
    size = kind.head_dim
    if backend == "flex":
        # other sizes are padded by some releases of PyTorch only
        fits = 16 <= size <= 256 and size & (size - 1) == 0
        dtype = kind.dtype in (*HALF, torch.float32)
        return None if fits and dtype else "it takes head dims 16, 32, 64, 128 and 256 and no float64"
    if kind.dtype not in HALF:
        return "it takes float16 and bfloat16 only"
    if size % 8 or size > 256:
        return "it takes head dims that are multiples of 8, up to 256"
    if kind.capability is None or kind.capability < (8, 0):
        return "it needs compute capability 8.0"
    return (
        None
        if flash_module(kind.capability)
        else "no flash-attn is installed, or none that works (pip install flash-attn)"
    )


def flash_module(capability: tuple[int, int]) -> str | None:
    """Name the flash-attn that a GPU can use: 3 on Hopper where it is installed, else 2; one that works."""
    wanted = ["flash_attn_interface"] * (capability[0] == 9) + ["flash_attn"]
    return next((name for name in wanted if flash_function(name)), None)


def installed(package: str) -> bool:
    """Tell whether a package can be found; it is not imported."""
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


@lru_cache
def flash_function(name: str) -> Callable[..., Tensor] | None:
    """Import a flash-attn; None where it is not there, is an empty folder, or was built for another PyTorch."""
    if not installed(name):
        return None
    try:
        return import_module(name).flash_attn_func
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        _log.warning("%s is installed and cannot be used: %s: %s", name, type(error).__name__, error)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over all keys by flash-attn 2 or 3, which know [B, T, H, D] and half precision.

    Shapes: q [B, H, T, D], k and v [B, H, L, D] to [B, H, T, D].
    """
    out = _flash[q.device.index](*(x.to(computed_in(q)).transpose(1, 2) for x in (q, k, v)))
    # early releases of flash-attn 3 return the log of the normaliser too
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: object) -> Tensor:
    """Attend under a FlexAttention mask, compiled where there is a GPU.

    Shapes: q [B, H, T, D], k and v [B, H, L, D] to [B, H, T, D].
    """
    return _flex_function(q.device.type)(*(x.to(computed_in(q)) for x in (q, k, v)), block_mask=block_mask)


@lru_cache
def _flex_function(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return many_kinds(torch.compile(flex_attention, dynamic=False)) if device == "cuda" else flex_attention


def many_kinds(function: Callable) -> Callable:
    """Let a compiled function meet `KINDS` kinds of input before torch, which allows eight, runs it uncompiled.

    A clip length has four masks; uncompiled, FlexAttention holds the whole matrix of scores.
    """
    import torch._dynamo

    limits = {"recompile_limit": KINDS, "accumulated_recompile_limit": 8 * KINDS}
    return torch._dynamo.config.patch(limits)(function)
