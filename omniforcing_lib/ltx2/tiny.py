"""TAEHV's tiny decoders of LTX-2's latents (`taeltx_2`, `taeltx2_3`): frames that wait for no later latent.

Its convolutions are two-dimensional. Time exists in two kinds of layers: a `MemBlock` reads its own input of one step
before, and a `TGrow` makes two steps of one. It takes the transformer's latents as they are. Source: specification 2.

Letters: B batch, F latents, T steps, h w token grid, c channels, f frames.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from omniforcing_lib import safetensors_io
from omniforcing_lib.files import given
from omniforcing_lib.ltx2.overlap import Tail

PATCH, TRIMMED = 4, 7  # pixels of a patch; frames that the first latent of a stream lacks of its 8


def _convolution(narrow: int, wide: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(narrow, wide, 3, padding=1, bias=bias)


class Clamp(nn.Module):
    """Bound latents smoothly to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: any."""
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """Add to each step what three convolutions make of it and of the step before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, *more = (_convolution(n * width, width) for n in (2, 1, 1))
        self.conv = nn.Sequential(first, nn.ReLU(), more[0], nn.ReLU(), more[1])

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Shapes: x [B, T, c, h, w], past [B, c, h, w] -> [B, T, c, h, w]."""
        both = torch.cat([x, torch.cat([past[:, None], x[:, :-1]], 1)], 2)
        return torch.relu(self.conv(both.flatten(0, 1)).unflatten(0, x.shape[:2]) + x)


class TGrow(nn.Module):
    """Make two steps of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [T, c, h, w] -> [2 T, c, h, w]."""
        return rearrange(self.conv(x), "t (two c) h w -> (t two) c h w", two=2)


class TinyDecoder(nn.Module):
    """Decode latents one by one, with the last input of each `MemBlock` carried: whole and streamed are the same bits.

    Args:
        size: height and width of the frames, multiples of 32.
        channels: of a latent.
        widths: channels before each doubling of time and space, and after the last one.
    """

    delay = 0

    def __init__(
        self, size: tuple[int, int], channels: int = 128, widths: tuple[int, ...] = (256, 128, 64, 64)
    ) -> None:
        super().__init__()
        self.size, self.channels = tuple(size), channels
        layers = [Clamp(), _convolution(channels, widths[0]), nn.ReLU()]
        for wide, narrow in pairwise(widths):
            layers += [MemBlock(wide), MemBlock(wide), MemBlock(wide), nn.Upsample(scale_factor=2), TGrow(wide)]
            layers.append(_convolution(wide, narrow, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _convolution(widths[-1], 3 * PATCH**2))

    @torch.no_grad()
    def step(self, state: Tail, new: Tensor, *, last: bool = False) -> Tensor:
        """Decode the next latents of a stream at once; `last` changes nothing. As `Overlap.step`.

        Shapes: [B, F, h, w, c] -> [B, f, H, W, 3] in [-1, 1], float32; 8 F frames, 7 fewer at the start.
        """
        empty = new.new_zeros(len(new), 0, *self.size, 3, dtype=torch.float32)
        return torch.cat([empty, *(self._frames(state, latent) for latent in new.unbind(1))], 1)

    def _frames(self, state: Tail, latent: Tensor) -> Tensor:
        x = rearrange(latent, "b h w c -> b 1 c h w").to(self.decoder[1].weight)
        inputs, at = [], 0
        for layer in self.decoder:
            if isinstance(layer, MemBlock):
                now, size = x[:, -1], x[0, 0].numel()
                past = torch.zeros_like(now) if state.kept is None else state.kept[:, at : at + size].view_as(now)
                inputs.append(now.flatten(1))
                x, at = layer(x, past), at + size
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        pixels = rearrange(x, "b f (c p q) h w -> b f (h p) (w q) c", p=PATCH, q=PATCH).float().clamp(0, 1)
        first = state.kept is None
        state.kept = torch.cat(inputs, 1)
        return 2 * pixels[:, TRIMMED if first else 0 :] - 1


def load_tiny_decoder(
    path: str | os.PathLike[str], size: tuple[int, int], **place: torch.device | torch.dtype
) -> TinyDecoder:
    """Load the decoder of a TAEHV file (.safetensors) strictly, frozen; its `encoder.` tensors are left out.

    Raises:
        ValueError: the file is a pickle or damaged, or names, shapes or values are not those of a tiny decoder.
    """
    path = given(path)
    if not path.is_file():
        raise ValueError(f"no tiny decoder at {path}: give taeltx_2.safetensors, taeltx2_3.safetensors or one like it")
    entries = {n: e for n, e in safetensors_io.one_file(path).entries.items() if not n.startswith("encoder.")}
    shapes = {name: entry.shape for name, entry in entries.items()}
    if "decoder.3.conv.6.weight" in shapes:
        raise ValueError(f"{path} is TAEHV's wide variant, which is not supported; give taeltx_2 or taeltx2_3")
    try:
        widths = tuple(shapes[f"decoder.{i}.weight"][0] for i in (1, 8, 14, 20))
        with torch.device("meta"):
            decoder = TinyDecoder(size, shapes["decoder.1.weight"][1], widths)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} holds no tiny decoder of LTX-2's latents: {error} is missing or misshapen") from error
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if wrong := sorted(name for name, _ in shapes.items() ^ expected.items()):
        found, wanted = (list(table[wrong[0]]) if wrong[0] in table else "nothing" for table in (shapes, expected))
        raise ValueError(f"{path} holds no tiny decoder of LTX-2's latents: {wrong[0]} is {found}, expected {wanted}")
    reader = safetensors_io.Reader(entries)
    state = {name: reader.get(name, place.get("dtype", torch.float32), place.get("device", "cpu")) for name in entries}
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{path}: {broken[0]} holds values that are not finite; get the file again")
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.requires_grad_(False).eval()
