"""LTX-2's video decoder over a stream: its convolutions carry what lies before, so the past is not decoded again.

Each convolution keeps the last inputs that belong to latents whose frames have all left. A step computes what comes
after: the new latents, and those that the horizon holds back, which now see further ahead. Layer by layer it leaves out
what no frame of this step depends on. With the horizon of the whole receptive field all of that is exact. With a
shorter one a frame sees as far ahead as in `Overlap`, and further back.

Shapes: B batch, c channels, f steps of a layer, h w its grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from omniforcing_lib.ltx2.overlap import Chain, Overlap, Tail, needs


@dataclass(frozen=True, kw_only=True)
class Carried(Overlap):
    """Run diffusers' `LTX2VideoDecoder3d` over a stream; `decode` takes what stands in for it at a step."""

    decoder: nn.Module = field(repr=False)

    def _decoded(self, state: Tail, kept: Tensor, ready: int) -> tuple[Tensor, int]:
        if state.start and not state.layers:
            raise ValueError("a stored decoding lacks what the convolutions carry; begin the stream anew")
        settled = (ready + self.dropped) // self.up
        spans = state.start, settled, state.start + kept.shape[1]
        step = Step(self.decoder, self.chain, state.layers, *spans, ready)
        outputs = self.decode(kept, step)
        before = max(0, self.up * state.start - self.dropped)
        state.layers = step.carried
        return outputs[:, state.given - before : ready - before], settled


class Step:
    """Decode a stretch of latents.

    Args:
        decoder: diffusers' `LTX2VideoDecoder3d`.
        chain: its layers along time.
        layers: what each convolution carries; empty at the start of a stream.
        start: number of the first latent that is given.
        settled: number of the first latent that the next step will be given.
        seen: number of latents so far.
        ready: number of frames that are to be right.

    Attributes:
        carried: `layers` for the next step.
    """

    def __init__(
        self, decoder: nn.Module, chain: Chain, layers: list[Tensor], start: int, settled: int, seen: int, ready: int
    ) -> None:
        self._decoder, self._layers, self.carried = decoder, iter(layers), []
        self._spans = start, settled, seen  # in steps of the layer that comes next
        # each layer, and how many of its inputs the frames depend on
        needed = [needs(chain[i:], range(ready - 1, ready)).stop for i in range(len(chain) + 1)]
        self._pending = list(zip([*chain, None], needed, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """Decode. Shapes: [B, c, f, h, w] to [B, 3, f, H, W]."""
        decoder = self._decoder
        x = self._convolve(decoder.conv_in, x)
        for stage in (decoder.mid_block, *decoder.up_blocks):
            if getattr(stage, "conv_in", None) is not None:
                x = self._resnet(stage.conv_in, x)
            for upsampler in getattr(stage, "upsamplers", None) or ():
                x = self._upsample(upsampler, x)
            for block in stage.resnets:
                x = self._resnet(block, x)
        x = self._convolve(decoder.conv_out, x, decoder.norm_out, decoder.conv_act)
        return rearrange(x, "b (c q p) f h w -> b c f (h p) (w q)", p=decoder.patch_size, q=decoder.patch_size)

    def _convolve(self, module: nn.Module, x: Tensor, *first: nn.Module) -> Tensor:
        for pointwise in first:
            x = pointwise(x)
        (layer, _), (_, stop) = self._pending.pop(0), self._pending[0]
        start, settled, seen = self._spans
        count, before, after = min(stop, seen) - start, -layer.first, layer.last
        # what was carried in front, and the edge of the stream repeated, as the whole decode repeats it
        front = next(self._layers) if start else x[:, :, :1].expand(-1, -1, before, -1, -1)
        short = max(0, count + after - x.shape[2])
        x = torch.cat([front, x[:, :, : count + after], x[:, :, -1:].expand(-1, -1, short, -1, -1)], 2)
        if settled:
            self.carried.append(x[:, :, settled - start :][:, :, :before].clone())
        return module.conv(x)

    def _resnet(self, block: nn.Module, x: Tensor) -> Tensor:
        new = self._convolve(block.conv1, x, block.norm1, block.nonlinearity)
        new = self._convolve(block.conv2, new, block.norm2, block.nonlinearity)
        x = x[:, :, : new.shape[2]]
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(block.norm3(x.movedim(1, -1)).movedim(-1, 1))
        return new + x

    def _upsample(self, module: nn.Module, x: Tensor) -> Tensor:
        times, p, q = module.stride
        new, old = (
            rearrange(part, "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=times, p=p, q=q)
            for part in (self._convolve(module.conv, x), x)
        )
        if module.residual:
            new = new + old[:, :, : new.shape[2]].repeat(1, new.shape[1] // old.shape[1], 1, 1, 1)
        self._pending.pop(0)
        # the first latent of a stream gives one step, not `times`
        dropped = 0 if self._spans[0] else times - 1
        self._spans = tuple(max(0, n * times - times + 1) for n in self._spans)
        return new[:, :, dropped:]
