"""Stream a student: each block is decoded to frames and samples as soon as it is made, without end (paper Sec. 3.4).

The `Streamer` is the only stateful object a user meets. Its noise comes from (seed, block), so the same seed gives the
same stream, whole or cut.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import backends, graphs, masks, safetensors_io
from omniforcing_lib.cache import KVCache
from omniforcing_lib.files import write_tensors
from omniforcing_lib.flow import (
    MINIATURE_GUIDANCE,
    Guidance,
    ancestral_noise,
    block_noise,
    euler,
    guided_denoiser,
    ltx2_sigmas,
)
from omniforcing_lib.interfaces import Codec, TextEncoder
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig, new_cache, next_block, recache_window, seeded_noise
from omniforcing_lib.transformer import Transformer

GRAIN = 32_768
"""Elements up to which PyTorch leaves a loop to one thread; below, waking a second one costs more than it saves."""


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run on `count` threads, None for all there are, and go back to as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LatentChunk(NamedTuple):
    """Latents of a block that is not decoded yet, and its prompt."""

    latents: AV[Tensor]
    prompt: str


class Chunk(NamedTuple):
    """One block as a viewer gets it.

    Shapes: frames uint8 [F, H, W, 3], samples float32 [N] mono or [N, 2] stereo.
    """

    frames: np.ndarray
    samples: np.ndarray
    start_s: float
    prompt: str


def captured(model: Transformer) -> Transformer:
    """Give a model whose steady passes are recorded, where all of its weights are on a GPU; any other as it is."""
    on_gpu = all(backends.on_gpu(parameter.device) for parameter in model.parameters())
    return graphs.Captured(model) if on_gpu and not isinstance(model, graphs.Captured) else model


@dataclass
class Streamer:
    """Yield one chunk per block, without end; `with` frees its cache at the end.

    A block whose activations have fewer elements than `GRAIN` is made on one thread, a larger one on all. On a GPU its
    steady passes are CUDA graphs (see `captured`).

    Args:
        model: a causal student.
        causal: its blocks, steps and window.
        codec: decodes both streams with carried state.
        text: encodes prompts.
        prompt: what to show; change it with `set_prompt`.
        seed: of all noise.
        ahead: make the next block in a thread while this one is decoded, on a GPU by a CUDA stream of its own, and
            shown; a new prompt then shows one block later. No further block is made, however slow the consumer is.
        capture: replay steady passes as CUDA graphs (see `graphs.Captured`), on a GPU that holds all weights.

    Attributes:
        block: number of the next chunk.
    """

    model: Transformer
    causal: RolloutConfig
    codec: Codec
    text: TextEncoder
    prompt: str
    seed: int = 0
    ahead: bool = False
    capture: bool = True
    block: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.capture:
            self.model = captured(self.model)
        self._noise = seeded_noise([self.seed], self.model.proj_out.weight)
        self._cache = new_cache(self.model, self.causal, self.codec.grid, batch=1)
        self._decoder = self.codec.start()
        self._maker = ThreadPoolExecutor(1, "blocks") if self.ahead else None
        self._coming: Future[LatentChunk] | None = None
        # on a GPU decoding has a CUDA stream of its own, beside the one that makes blocks
        self._beside = backends.side_stream(self.model.proj_out.weight.device)
        self._latents: dict[int, AV[Tensor]] = {}  # of the blocks that the next block sees
        self._made, self._last = 0, math.inf  # blocks made so far, and the most that may be
        tokens = len(self.causal.layout.block(1).video) * math.prod(self.codec.grid)
        self._threads = 1 if tokens * self.model.config.video_dim < GRAIN else None
        self.set_prompt(self.prompt)

    def __enter__(self) -> Streamer:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        if self._maker:
            self._maker.shutdown()
        self._cache = self._coming = None

    def __iter__(self) -> Iterator[Chunk]:
        while self._cache is not None:
            yield self.step()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values held."""
        return self._cache.nbytes if self._cache else 0

    def set_prompt(self, prompt: str, *, recache: bool = False) -> None:
        """Follow another prompt from the next block that is not begun; unknown words raise ValueError.

        With `recache` the window is stored again under the new prompt, which costs a pass for each of its blocks.
        """
        cache, weight = self._check_open(), self.model.proj_out.weight
        context = self.text.encode([prompt], weight.device, weight.dtype)
        # a block in the making keeps its prompt
        self._settle()
        if recache and self._made:
            with torch.inference_mode(), threads(self._threads):
                past = cache, context, self._noise, self._made, self._latents
                recache_window(self.model, self.causal, *past)
        cache.forget_text()
        self._context, self.prompt = context, prompt

    @torch.inference_mode()
    def step(self) -> Chunk:
        """Decode the next block, generated now or ahead; RuntimeError once the stream is closed."""
        self._check_open()
        # 1. Take the block that was made ahead, or make one; ahead, the next one is begun before this one is decoded.
        chunk = self._coming.result() if self._coming else self._make()
        if self._beside:
            self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        self._coming = self._maker.submit(self._make) if self._maker and self._made < self._last else None
        # 2. Decode it where the decoder stands.
        start_s = self._decoder.shown(self.codec.clock) / self.codec.clock.fps
        with threads(self._threads), torch.cuda.stream(self._beside):
            clip = to_arrays(self.codec.decode(chunk.latents, self._decoder))
        self.block += 1
        return Chunk(clip.video, clip.audio, start_s, chunk.prompt)

    @torch.inference_mode()
    def finish(self) -> Chunk | None:
        """Give what a codec that looks ahead still owes of the blocks so far; None where it owes nothing."""
        start_s = self._decoder.shown(self.codec.clock) / self.codec.clock.fps
        with torch.cuda.stream(self._beside):
            rest = self.codec.finish(self._decoder)
            if rest is None:
                return None
            clip = to_arrays(rest)
        return Chunk(clip.video, clip.audio, start_s, self.prompt)

    def clip(self, seconds: int) -> Iterator[AV[np.ndarray]]:
        """Yield the first whole `seconds` of a new stream as they come; no block is made that is not among them.

        Shapes: AV(uint8 [F, H, W, 3], float32 [N] or [N, 2]), together those of `make_clip`.
        """
        wanted, clock = self.codec.clock.latents(seconds), self.codec.clock
        left = AV(clock.frames(range(wanted.video)).stop, clock.samples(range(wanted.audio)).stop)
        self._last = self.causal.layout.count(wanted.video)
        for k in range(self._last + 1):
            if chunk := self.step() if k < self._last else self.finish():
                piece = AV(chunk.frames, chunk.samples).map(lambda x, n: x[:n], left)
                left = left.map(lambda n, x: n - len(x), piece)
                yield piece

    @torch.inference_mode()
    def _make(self) -> LatentChunk:
        k, prompt = self._made, self.prompt
        before = self._latents.get(k - 1)
        with threads(self._threads):
            latents = next_block(self.model, self.causal, self._check_open(), self._context, self._noise, k, before)
        latents = latents.map(Tensor.contiguous)
        self._latents = {i: self._latents[i] for i in self._past(k + 1) if i < k} | {k: latents}
        self._made += 1
        return LatentChunk(latents, prompt)

    def _past(self, k: int) -> tuple[int, ...]:
        """List the blocks whose latents are kept for block `k`: those that it sees, and the one before it."""
        return masks.seen(k, max(1, self.causal.window))[:-1]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Store where the stream stands, atomically: `resume` goes on with the same bits."""
        cache = self._check_open()
        self._settle()
        if not self._made:
            raise ValueError("nothing to save before the first block; step once")
        video, audio = (torch.cat(parts, dim=1) for parts in zip(*self._latents.values(), strict=True))
        tensors = {**cache.tensors(), **self._decoder.tensors(), "video": video, "audio": audio}
        coming = self._coming.result().prompt if self._coming else None
        position = {"block": self.block, "coming": coming, "restarted": cache.restarted}
        state = {"prompt": self.prompt, "seed": self.seed, **position}
        return write_tensors(path, tensors, {"stream": json.dumps(state)})

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Go on where `save` left a stream of the same model, blocks and window; seed and prompt come with it.

        Raises:
            ValueError: the file is damaged or of another stream; this one then stays as it was.
        """
        cache = self._check_open()
        self._settle()
        # 1. Read and check all of it; nothing of this stream changes before.
        state, tensors = _stored(Path(path))
        blocks_made, device = state["block"] + (state["coming"] is not None), self.model.proj_out.weight.device
        latents = self._unpacked(self._past(blocks_made), tensors)
        try:
            decoder = type(self._decoder).from_tensors(tensors, device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no decoder's state: {error}") from error
        self.text.encode([state["prompt"]])
        cache.fill(tensors)
        # 2. Take it over; a block that was made ahead is handed out next.
        cache.restarted, self.seed, self.block = state["restarted"], state["seed"], state["block"]
        self._made, self._latents, self._decoder, self._coming = blocks_made, latents, decoder, None
        self._noise = seeded_noise([self.seed], self.model.proj_out.weight)
        if state["coming"] is not None:
            self._coming = Future()
            self._coming.set_result(LatentChunk(latents[blocks_made - 1], state["coming"]))
        self.set_prompt(state["prompt"])

    def _unpacked(self, blocks: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[int, AV[Tensor]]:
        """Cut stored latents into blocks; ValueError where they are not those of these blocks."""
        config, device = self.model.config, self.model.proj_out.weight.device
        sizes = AV(*zip(*(self.causal.layout.block(i).map(len) for i in blocks), strict=True))
        shapes = config.latent_shapes(sizes.map(sum), self.codec.grid)
        for name, shape in zip(AV._fields, shapes, strict=True):
            stored = list(tensors[name].shape) if name in tensors else None
            if stored != [1, *shape]:
                raise ValueError(
                    f"{name} latents are {[1, *shape]} here, {stored} there; use the same model and window"
                )
        parts = sizes.map(lambda n, x: x.to(device).split(n, dim=1), AV(tensors["video"], tensors["audio"]))
        # copies: where a tensor lies in memory, and its strides, change the last bits of a product
        return {i: AV(*block).map(Tensor.clone) for i, *block in zip(blocks, parts.video, parts.audio, strict=True)}

    def _settle(self) -> None:
        """Wait for the block in the making."""
        if self._coming:
            wait([self._coming])

    def _check_open(self) -> KVCache:
        """Give the cache; RuntimeError where the stream was closed."""
        if self._cache is None:
            raise RuntimeError("this Streamer was closed; make a new one")
        return self._cache


def _stored(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read what `Streamer.save` wrote; ValueError where it cannot be that."""
    text = safetensors_io.one_file(path).metadata.get("stream", "null")
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        state = None
    match state:
        case {"prompt": str(), "seed": int(seed), "block": int(block), "restarted": int(back), "coming": str() | None}:
            if 0 <= seed < 2**63 and 0 <= back <= block < 2**40 and block:
                tensors = load_file(path)
                if broken := [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
                    raise ValueError(f"{path}: {broken[0]} holds values that are not finite")
                return state, tensors
    raise ValueError(f"{path} holds no stream that `save` stored, but says {text[:80]!r}; name another file")


def to_arrays(clip: AV[Tensor]) -> AV[np.ndarray]:
    """Turn the first decoded clip of a batch into frames and samples.

    Shapes: AV([B, F, H, W, 3], [B, N] or [B, N, 2]) in [-1, 1] to AV(uint8 [F, H, W, 3], float32 [N] or [N, 2]).
    """
    # one half more, and the cast to whole numbers rounds; a decoder has clamped already
    frames = (clip.video[0] * 127.5).add_(128).to(torch.uint8)
    return AV(frames.cpu().numpy(), clip.audio[0].float().cpu().numpy())


def to_clips(clip: AV[Tensor]) -> list[AV[np.ndarray]]:
    """Turn a decoded batch into clips."""
    return [to_arrays(clip.map(lambda x, i=i: x[i : i + 1])) for i in range(len(clip.video))]


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled.

    Attributes:
        steps: number of those of LTX-2's schedule, or the noise levels themselves.
        guidance: weights of its passes.
        ancestral: draw noise anew at each level.
    """

    steps: int | Sequence[float] = 40
    guidance: Guidance = MINIATURE_GUIDANCE
    ancestral: bool = False


@torch.inference_mode()
def teacher_clips(
    model: Transformer,
    codec: Codec,
    text: TextEncoder,
    prompts: list[str],
    seeds: list[int],
    seconds: int,
    *,
    steps: int | Sequence[float] = 40,
    guidance: Guidance = MINIATURE_GUIDANCE,
    ancestral: bool = False,
) -> list[AV[np.ndarray]]:
    """Sample clips with the guided teacher, one for each prompt and seed, as one batch; `Sampling` explains how."""
    weight, shapes = model.proj_out.weight, model.config.latent_shapes(codec.clock.latents(seconds), codec.grid)
    context = text.encode([*prompts, ""], weight.device, weight.dtype)
    negative = context.map(lambda t: t[-1:])
    noise = block_noise(seeds, 0, shapes).map(lambda x: x.to(weight.device))
    denoise = guided_denoiser(model, context.map(lambda t: t[:-1]), negative, guidance)
    sigmas = ltx2_sigmas(steps) if isinstance(steps, int) else torch.tensor(steps, dtype=torch.float64)
    fresh = ancestral_noise(seeds, noise) if ancestral else None
    with tqdm(total=len(sigmas) - 1, desc=f"sampling {len(prompts)} clips", unit="step", delay=2, leave=False) as bar:
        ends = euler(denoise, noise, sigmas, lambda i, _: bar.update(i - bar.n), fresh=fresh)
    return to_clips(codec.decode(ends))


def clip_pieces(
    model: Transformer,
    causal: RolloutConfig | None,
    codec: Codec,
    text: TextEncoder,
    prompt: str,
    seconds: int,
    seed: int,
    sampling: Sampling = Sampling(),
    *,
    capture: bool = True,
) -> Iterator[AV[np.ndarray]]:
    """Make one clip piece by piece, a block ahead, where the model is `causal`; in one piece where that is None.

    Shapes: as those of `make_clip`, together.
    """
    if seconds < 1:
        raise ValueError(f"a clip lasts 1 second or more, found {seconds}")
    if causal is None:
        yield from teacher_clips(model, codec, text, [prompt], [seed], seconds, **vars(sampling))
        return
    with Streamer(model, causal, codec, text, prompt, seed, ahead=True, capture=capture) as stream:
        yield from stream.clip(seconds)


def make_clip(
    model: Transformer,
    causal: RolloutConfig | None,
    codec: Codec,
    text: TextEncoder,
    prompt: str,
    seconds: int,
    seed: int,
    sampling: Sampling = Sampling(),
) -> AV[np.ndarray]:
    """Make one clip whole: streamed by a causal student, or sampled by a teacher.

    Shapes: AV(uint8 [24K + 1, H, W, 3], float32 [R K + hop] or [R K + hop, 2]), R samples per second.
    """
    pieces = clip_pieces(model, causal, codec, text, prompt, seconds, seed, sampling)
    return AV(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))
