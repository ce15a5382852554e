"""Run a transformer on a device that is too small for it: blocks with fp8 weights, or offloaded to main memory.

An offloaded model gives the same bits, an fp8 model the same function of rounded weights. Both are written here because
torchao and diffusers' group offloading, which do the same, would become requirements of the library, and because blocks
that are mapped to their file have to stay so until they are copied to the device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from omniforcing_lib import backends, fused
from omniforcing_lib.transformer import Transformer

_log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
PRODUCTS = {True: "products of e4m3 numbers, scaled by rows", False: "kept in e4m3, multiplied in the input's dtype"}
# fp32 numbers of the buffer for conversions, 36 MB: malloc takes buffers below 32 MB from the heap, where they leave
# holes between the weights (a load then took 2.7 times the model's size, measured).
_PIECE = 9_000_000


class Fp8Linear(nn.Module):
    """A linear layer whose weight is kept in e4m3 with one scale per output.

    Where the GPU multiplies e4m3 numbers (see `multiplies`), the input is rounded too, with one scale per row, and
    nothing is copied. Elsewhere the weight is used in the input's dtype: every e4m3 number is exact in bf16 and in
    fp32, so the product is exactly that of the rounded weight.

    Shapes: weight e4m3 [out, in], weight_scale fp32 [out, 1], bias [out] or none.
    """

    def __init__(self, out: int, width: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()

        def frozen(dtype: torch.dtype, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.weight, self.weight_scale = frozen(FP8, out, width), frozen(torch.float32, out, 1)
        self.bias = frozen(dtype, out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if multiplies(x.device, x.dtype, *self.weight.shape):
            rounded = fused.compiled(rounded_rows) if fused.fuses(x.device) else rounded_rows
            rows, scales = rounded(x.flatten(0, -2))
            how = {"scale_a": scales, "scale_b": self.weight_scale.t(), "bias": self.bias, "out_dtype": x.dtype}
            return torch._scaled_mm(rows, self.weight.t(), **how).unflatten(0, x.shape[:-1])
        y = linear(x, self.weight.to(x.dtype)) * self.weight_scale.flatten().to(x.dtype)
        return y if self.bias is None else y + self.bias


@lru_cache
def multiplies(device: torch.device, dtype: torch.dtype, out: int, width: int) -> bool:
    """Tell whether a device multiplies e4m3 numbers, scaled by rows, to bfloat16: from compute capability 8.9 on.

    Both sizes of the weight have to be multiples of 16. A line of the log says what is used.
    """
    able = backends.on_gpu(device) and torch.cuda.get_device_capability(device) >= (8, 9)
    able = able and dtype == torch.bfloat16 and out % 16 == width % 16 == 0
    _log.info("fp8 weights [%d, %d] on %s in %s: %s", out, width, device, dtype, PRODUCTS[able])
    return able


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to e4m3 with the largest scale that each row allows. Shapes: [T, D] to [T, D] and [T, 1]."""
    largest = x.abs().amax(1, keepdim=True).float()
    scale = torch.where(largest == 0, 1.0, largest / FP8_LARGEST)
    return (x.float() / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to e4m3 with the largest scale that each row allows.

    In a row with largest entry m, the error of an entry w is at most max(|w| / 16, m / 458752): half a step of e4m3's
    3 bits of mantissa, or half its smallest step.

    Shapes: weight [out, in] to e4m3 [out, in] and fp32 [out, 1].
    """
    rounded = torch.empty_like(weight, dtype=FP8)
    scale = torch.empty(len(weight), 1, device=weight.device)
    for rows, piece in _pieces(weight):
        largest = torch.linalg.vector_norm(piece, float("inf"), dim=1, keepdim=True)
        scale[rows] = torch.where(largest == 0, 1.0, largest / FP8_LARGEST)
        rounded[rows] = piece.div_(scale[rows]).clamp_(-FP8_LARGEST, FP8_LARGEST)
    return rounded, scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Give back the rounded weight. Shapes: [out, in] and [out, 1] to [out, in]."""
    wide = torch.empty_like(weight, dtype=dtype)
    for rows, piece in _pieces(weight):
        wide[rows] = piece.mul_(scale[rows])
    return wide


def _pieces(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a weight and an fp32 copy of them, in one buffer that is reused."""
    width = weight.shape[1]
    buffer = torch.empty(max(_PIECE, width), device=weight.device)
    step = len(buffer) // width
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, buffer[: weight[rows].numel()].view(-1, width).copy_(weight[rows])


def fp8_names(model: nn.Module) -> set[str]:
    """Name the layers that `with_fp8_layers` changes: the linear layers of blocks but for their per-head gates."""
    return {
        name
        for name, layer in model.named_modules()
        if name.startswith("transformer_blocks.")
        and isinstance(layer, nn.Linear | Fp8Linear)
        and not name.endswith("to_gate_logits")
    }


def with_fp8_layers(model: Transformer) -> Transformer:
    """Replace the blocks' linear layers by empty `Fp8Linear` layers; their weights are loaded afterwards."""
    for name in fp8_names(model):
        linear_layer = model.get_submodule(name)
        shape, dtype = linear_layer.weight.shape, linear_layer.weight.dtype
        model.set_submodule(name, Fp8Linear(*shape, linear_layer.bias is not None, dtype))
    return model


class OffloadedBlocks(nn.ModuleList):
    """Blocks that stay in main memory: each is copied to one of two buffers on the device when its turn comes.

    While a block runs in one buffer the next is copied to the other; on CUDA in a stream of its own.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        super().__init__(blocks)
        self.device = device
        # A list keeps them out of the model's state.
        self._buffer_blocks = [deepcopy(blocks[0]).to(device) for _ in range(min(2, len(blocks)))]

    def __iter__(self) -> Iterator[nn.Module]:
        """Yield each block on the device, valid until the block after it is asked for.

        Raises:
            ValueError: gradients are on; the buffers would be overwritten before the backward pass.
        """
        if torch.is_grad_enabled():
            raise ValueError("offloaded blocks are for inference; run the model under torch.no_grad()")
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        blocks = list(self._modules.values())
        self._copy(0, blocks[0], copies)
        for index in range(len(blocks)):
            if copies:
                torch.cuda.current_stream(self.device).wait_stream(copies)
            if index + 1 < len(blocks):
                self._copy(index + 1, blocks[index + 1], copies)
            yield self._buffer_blocks[index % 2]

    def _copy(self, index: int, block: nn.Module, copies: torch.cuda.Stream | None) -> None:
        """Copy a block into its buffer once the block before the last, which used it, has run."""
        if copies:
            copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(copies):
            for buffer, weight in zip(self._buffer_blocks[index % 2].parameters(), block.parameters(), strict=True):
                buffer.copy_(weight, non_blocking=True)


def offload(model: Transformer, device: str | torch.device, *, pinned: bool = True) -> Transformer:
    """Keep a model's blocks in main memory and the rest of it on `device`, where it runs; the same bits come out.

    Args:
        model: any transformer, also with fp8 layers; it is changed in place.
        device: where it runs.
        pinned: on CUDA, keep the blocks in pinned memory, which is copied faster and while the model computes. Without,
            blocks that `checkpoints.load` mapped stay on the disk until their turn.
    """
    device = torch.device(device)
    blocks = model.transformer_blocks
    model.transformer_blocks = nn.ModuleList()
    model.to(device)
    for parameter in blocks.parameters():
        parameter.data = parameter.data.cpu()
        if pinned and device.type == "cuda":
            parameter.data = parameter.data.pin_memory()
    model.transformer_blocks = OffloadedBlocks(blocks, device)
    return model
