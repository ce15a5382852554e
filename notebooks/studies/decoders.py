"""LTX-2's decoders of the picture beside one another: how long a frame waits, its time, how near it is to the whole.

Where no weights are there, random ones stand in, at a sixteenth of the real widths in both decoders: waits are exact,
times compare, and fidelity shows what a wait is worth, not how a picture looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from einops import rearrange
from torch import Tensor, nn

from omniforcing_lib.bounce import world
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2.codec import LTX2Codec, stream_error
from omniforcing_lib.ltx2.tiny import TinyDecoder, load_tiny_decoder
from omniforcing_lib.model_bundle import ModelBundle
from studies.bench import alternate

SIZE, LOUDNESS = (64, 64), 0.3  # of the frames of random decoders; no output is to be clipped
SECONDS = 2


@torch.inference_mode()
def rows(components: ModelBundle, seed: int, turns: int, horizons: Sequence[int] = (0, 2, 4)) -> list[dict[str, str]]:
    """Give a row for each way to decode a stream; dB are against LTX-2's own whole decode.

    They are told of random latents and of a true clip of the world, encoded by LTX-2's encoder.
    """
    codec = components.codec
    full, tiny = _given(components, codec) if isinstance(codec, LTX2Codec) else _random(seed)
    film = torch.from_numpy(world.render(world.scene(seed), seconds=SECONDS).video).float() / 127.5 - 1
    scaled = nn.functional.interpolate(rearrange(film, "f h w c -> f c h w"), full.size)
    true = full.encode_frames(rearrange(scaled, "f c h w -> 1 f h w c"))
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(seed)).to(true)
    ways = {f"LTX-2's, --horizon {n}": _like(full, horizon=n) for n in horizons} | {"tiny": _like(full, tiny=tiny)}
    calls = {name: partial(_stream, way, true) for name, way in ways.items()}
    took = alternate({"LTX-2's, whole": partial(full.overlaps.video.decode, true), **calls}, turns, 0)
    waits = {"LTX-2's, whole": "for the clip"} | {name: f"{float(w.delays.video):.2f}" for name, w in ways.items()}
    sources = {"random latents": noise, "a true clip": true}
    wholes = {kind: full.overlaps.video.decode(x) for kind, x in sources.items()}

    def fidelity(way: LTX2Codec, kind: str) -> str:
        latents = AV(sources[kind], sources[kind][:, :0, 0, 0])
        return f"{stream_error(way, latents, wholes[kind]):.1f}"

    told = {name: {f"dB, {kind}": fidelity(way, kind) for kind in sources} for name, way in ways.items()}
    return [
        {
            "decoder": name,
            "a frame waits, s": waits[name],
            "ms a second": f"{1000 * median(times) / SECONDS:.0f}",
            **told.get(name, {f"dB, {kind}": "whole" for kind in sources}),
        }
        for name, times in took.items()
    ]


def _stream(codec: LTX2Codec, latents: Tensor) -> None:
    """Decode latents as a stream of the paper's blocks."""
    state, steps = codec.start(), (latents.shape[1] - 1) // SECONDS
    for part in latents.split([1, *[steps] * SECONDS], 1):
        codec.overlaps.video.step(state.video, part)


def _like(codec: LTX2Codec, **rest: int | TinyDecoder) -> LTX2Codec:
    return LTX2Codec(codec.video, codec.audio, codec.vocoder, codec.size, **rest)


def _given(components: ModelBundle, codec: LTX2Codec) -> tuple[LTX2Codec, TinyDecoder]:
    """Take LTX-2's own decoder, and the tiny one beside the checkpoint (`taeltx*`); without one, a random one."""
    found = sorted(Path(components.source).absolute().parent.glob("taeltx*.safetensors"))
    place = {"device": components.device, "dtype": components.dtype}
    if found:
        return _like(codec), load_tiny_decoder(found[0], codec.size, **place)
    return _like(codec), _drawn(TinyDecoder(codec.size, codec.channels.video), 0).to(**place)


def _random(seed: int) -> tuple[LTX2Codec, TinyDecoder]:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    widths = {"block_out_channels": (16, 32, 64, 128), "decoder_block_out_channels": (16, 32, 64)}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    video = _drawn(AutoencoderKLLTX2Video(**widths, **ratios, decoder_causal=False), seed)
    with torch.device("meta"):  # no sound is made
        sound = AutoencoderKLLTX2Audio(), LTX2Vocoder()
    return LTX2Codec(video, *sound, SIZE), _drawn(TinyDecoder(SIZE, widths=(16, 8, 4, 4)), seed)


def _drawn(module: nn.Module, seed: int) -> nn.Module:
    """Draw weights so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            loud = LOUDNESS if name.startswith(("decoder.conv_out", "decoder.22")) else 1
            nn.init.normal_(weight, std=loud / weight[0].numel() ** 0.5, generator=generator)
    return module.requires_grad_(False).eval()
