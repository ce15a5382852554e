"""What `bench` measures on one GPU, phase by phase; a CPU runs the same code at a small size.

Every phase tells figures one by one, so that what was told before a crash is kept. Weights are random and drawn on the
device: times depend on shapes, not on what a model has learned. Only the decoders need diffusers.

Shapes: B batch, H heads, R rows and C columns of a mask, D head dim.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from omniforcing_lib import backends, graphs, masks
from omniforcing_lib.attention import attend
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.masks import AttentionMask, BlockRows
from omniforcing_lib.model_bundle import StandInCodec, StandInText, text_widths
from omniforcing_lib.rollout import RolloutConfig, join, rollout, seeded_noise
from omniforcing_lib.stream import Streamer, to_arrays
from omniforcing_lib.transformer import Transformer
from studies import bench
from studies.bench import CLOCK, alternate, random_model, seconds_of
from studies.roofline import silent
from studies.store import ROOT

Say = Callable[..., None]
"""say(name, value, unit): tell one figure."""
HALF = torch.bfloat16
WAYS = bench.ways(RolloutConfig())
PASSES = {
    "4 passes": WAYS["as shipped"],
    "3 passes": WAYS["never remembered clean"],
    "2 passes": WAYS["both"],
    "4 passes, fused": WAYS["remembered in the next block's first step"],
}
"""Network passes of a block from block 2 on, and how the stream is set for them."""
SINKS = (0, 1, 2, 4, 8, 16, 24)
TILE = 128
"""Rows and columns that FlexAttention's kernels take at a time."""
ROWS = ("exact", "padding sees all", "padding sees nothing")
"""How a mask reaches whole tiles: not at all, with rows that see every true key as the released code's, or masked."""


class Size(NamedTuple):
    """A model's widths, the tokens of a frame and of a prompt, and where it runs; `whole` is the real one."""

    config: ModelConfig
    grid: tuple[int, int]
    text: int
    device: str = "cpu"

    @property
    def whole(self) -> bool:
        """Tell whether this is the 19B, and not a small model that only tests the code."""
        return self.config == ModelConfig()

    @property
    def cuda(self) -> bool:
        """Tell whether it runs on a GPU."""
        return self.device != "cpu"

    def cut(self, size: int) -> int:
        """Give a size of a probe, a sixteenth of it where the model is small."""
        return size if self.whole else max(16, size // 16)

    def model(self, layers: int | None = None, **how: object) -> Transformer:
        """Draw a model with the paper's sinks in bfloat16, of all its layers or of the first few."""
        layers = min(layers or self.config.num_layers, self.config.num_layers)
        return random_model(replace(self.config, num_layers=layers), PAPER.sinks, 0, self.device, HALF, **how)

    def few(self, count: int, less: int) -> int:
        """Give a number of repetitions, a smaller one where the model is small and only the code is tried."""
        return count if self.whole else less

    def took(self, call: Callable[[], object]) -> float:
        """Give the median seconds of a call after warm ones."""
        return statistics.median(alternate({"": call}, self.few(5, 1), self.few(2, 1))[""])

    def draw(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        """Draw a tensor on the device."""
        return torch.randn(shape, device=self.device).to(dtype)


SIZES = {
    "19b": Size(ModelConfig(), bench.REAL_GRID, 1024),
    "bench": Size(bench.BENCH, (2, 3), 64),
    "miniature": Size(MINIATURE, (2, 3), bench.TEXT_TOKENS),
}


@contextmanager
def peak(at: Size, say: Say, name: str) -> Iterator[None]:
    """Tell the most memory that a GPU held within."""
    if at.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if at.cuda:
        say(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count what CUDA graphs really do: recordings and replays."""
    kind, done = torch.cuda.CUDAGraph, {"capture_begin": 0, "replay": 0}
    kept = {name: getattr(kind, name) for name in done}

    def counting(name: str) -> Callable:
        def call(self: object, *args: object, **rest: object) -> object:
            done[name] += 1
            return kept[name](self, *args, **rest)

        return call

    for name in done:
        setattr(kind, name, counting(name))
    try:
        yield done
    finally:
        for name, method in kept.items():
            setattr(kind, name, method)


def environment(at: Size, say: Say) -> None:
    """Tell versions and what is installed."""
    say("torch", torch.__version__)
    say("cores, threads", [os.cpu_count(), torch.get_num_threads()])
    if at.cuda:
        about = torch.cuda.get_device_properties(at.device)
        say("memory", about.total_memory / 1e9, "GB")
        say(
            "capability, CUDA, cuDNN",
            [f"{about.major}.{about.minor}", torch.version.cuda, torch.backends.cudnn.version()],
        )
    packages = ("flash_attn", "flash_attn_interface", "triton", "diffusers", "av")
    say("installed", [name for name in packages if backends.installed(name)])
    for size in (at.config.attention_head_dim, at.config.audio_attention_head_dim):
        say(f"attention of head dim {size}", list(backends.chosen(at.draw(1, 1, 1, size))))


def roofs(at: Size, say: Say) -> None:
    """Measure matrix products in bf16 and fp8 at the rows of one, three and six frames, and a copy."""
    n = at.cut(8192)
    square = at.draw(n, n)
    say(f"GEMM {n} cubed, bf16", 2 * n**3 / at.took(lambda: square @ square) / 1e12, "TFLOP/s")
    source = torch.empty(at.cut(1 << 15), 1 << 15, dtype=HALF, device=at.device)
    target = torch.empty_like(source)
    say("copy, read and written", 2 * source.nbytes / at.took(lambda: target.copy_(source)) / 1e12, "TB/s")
    scaled = at.cuda and torch.cuda.get_device_capability(at.device) >= (8, 9)
    for rows in map(at.cut, (384, 1152, 2304)):
        for wide, out in ((4096, 4096), (4096, 16384), (16384, 4096), (2048, 4096)):
            wide, out = at.cut(wide), at.cut(out)
            x, weights = at.draw(rows, wide), [at.draw(out, wide) for _ in range(4)]  # four: none stays in a cache
            calls = {"bf16": lambda x=x, weights=weights: [linear(x, weight) for weight in weights]}
            if scaled:
                narrow, one = [w.to(torch.float8_e4m3fn).t() for w in weights], torch.ones(1, out, device=at.device)
                calls["fp8"] = lambda x=x, narrow=narrow, one=one: [scaled_product(x, w, one) for w in narrow]
            for kind, times in alternate(calls, at.few(5, 1), at.few(2, 1)).items():
                rate = 8 * rows * wide * out / statistics.median(times) / 1e12
                say(f"linear {rows} x {wide} to {out}, {kind}", rate, "TFLOP/s")
    if not scaled:
        say("linear, fp8", "skipped: needs a GPU of capability 8.9 or more")


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply in e4m3 by the hardware's scaled product, the rounding of the input included, a scale for each row."""
    rows = x.abs().amax(1, keepdim=True).float() / 448
    rounded = (x / rows).to(torch.float8_e4m3fn)
    return torch._scaled_mm(rounded, weight, scale_a=rows, scale_b=scale, out_dtype=x.dtype)


def attention(at: Size, say: Say) -> None:
    """Time the attentions of a steady block by backend; keys and values are slices of a ring, as in a stream."""
    heads, tokens = at.config.num_attention_heads, at.grid[0] * at.grid[1]
    wide, narrow = at.config.attention_head_dim, at.config.audio_attention_head_dim
    video, audio = 3 * tokens, 25
    seen = AV(16 * tokens, PAPER.sinks + 126)
    shapes = {
        "video": (video, seen.video, wide),
        "video to text": (video, at.text, wide),
        "audio to video": (video, seen.audio, narrow),
        "video to audio": (audio, seen.video, narrow),
        "audio": (audio, seen.audio, narrow),
    }
    named = {"default": None}
    if at.cuda:
        named |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        named |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}
    for name, (rows, columns, dim) in shapes.items():
        query, ring = at.draw(1, heads, rows, dim), at.draw(1, heads, columns + rows, dim)
        keys = ring[:, :, :columns]
        for label, backend in named.items():
            try:
                with sdpa_kernel(backend) if backend else nullcontext():
                    seconds = at.took(lambda query=query, keys=keys: scaled_dot_product_attention(query, keys, keys))
            except RuntimeError as error:
                say(f"attention {name}, {label}", f"refused: {str(error)[:80]}")
                continue
            say(f"attention {name}, {label}", 1e6 * seconds, "us")
            say(f"attention {name}, {label}", 4 * heads * rows * columns * dim / seconds / 1e12, "TFLOP/s")


LAW = replace(
    bench.BENCH,
    num_layers=2,
    in_channels=16,
    out_channels=16,
    audio_in_channels=16,
    audio_out_channels=16,
    caption_channels=64,
)
"""A model whose head dims every kernel takes."""


def error(x: Tensor, of: Tensor) -> float:
    """Give the size of a difference by the size of what is right."""
    x, of = x.double().cpu(), of.double().cpu()
    return ((x - of).norm() / of.norm()).item()


def stream_errors(device: str, blocks: int = 9) -> tuple[dict[str, float], dict[str, int]]:
    """Roll a small model out: errors against fp64 on the CPU, of captured against eager, and how often graphs ran."""
    causal, grid = RolloutConfig(), (2, 4)
    plain = random_model(LAW, PAPER.sinks, 0).double()
    text = AV(*(torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2)))

    @torch.inference_mode()
    def roll(model: Transformer) -> AV[Tensor]:
        context, weight = text.map(lambda t: t.to(model.proj_out.weight)), model.proj_out.weight
        stop = causal.layout.block(blocks - 1).video.stop
        return join(list(rollout(model, causal, context, seeded_noise([0], weight), grid, stop)))

    right, errors, done = roll(plain), {}, {}
    for dtype in (torch.float32, HALF):
        name = str(dtype).removeprefix("torch.")
        model = copy.deepcopy(plain).to(device, dtype)
        got = roll(model)
        with counted() as made:
            again = roll(graphs.Captured(model))
        errors[f"{blocks} blocks, {name}, against fp64 on the CPU"] = max(map(error, got, right))
        errors[f"captured against eager, {name}"] = max(map(error, again, got))
        done |= {f"captured, {name}, {what}": count for what, count in made.items()}
    return errors, done


def masked_errors(device: str) -> dict[str, float]:
    """Compare dense masks and, on a GPU, FlexAttention with sliced attention: output and gradients, fp32 and bf16."""
    grid, latents, found = (2, 4), CLOCK.latents(5), {}
    generator = torch.Generator(device).manual_seed(1)
    shapes = AV((1, latents.video, *grid, LAW.in_channels), (1, latents.audio, LAW.audio_in_channels))
    x = shapes.map(lambda shape: torch.randn(shape, generator=generator, device=device))
    sigma = latents.map(lambda n: torch.full((1, n), 0.7, device=device))
    for dtype in (torch.float32, HALF):
        model = random_model(LAW, PAPER.sinks, 0, device, dtype).requires_grad_(True)
        text, results = bench.random_text(model, 12), {}
        for rendering in ("sliced", "dense", "flex")[: 3 if device != "cpu" else 2]:
            built = masks.build(PAPER, latents.video, grid[0] * grid[1], rendering=rendering)
            out = model(x, sigma, text, masks=built)
            (out.video.float().square().mean() + out.audio.float().square().mean()).backward()
            first = model.transformer_blocks[0]
            weights = first.attn1.to_q.weight, first.audio_attn1.to_k.weight, first.video_to_audio_attn.to_k.weight
            results[rendering] = *(part.detach() for part in out), *(weight.grad.clone() for weight in weights)
            model.zero_grad(set_to_none=True)
            if rendering != "sliced":
                name = f"{rendering} against sliced, {str(dtype).removeprefix('torch.')}"
                found[f"{name}: output and gradients"] = max(map(error, results[rendering], results["sliced"]))
    return found


def laws(at: Size, say: Say) -> None:
    """Tell how far this device is from fp64 on a CPU, a recorded stream from the plain one, one mask from another."""
    errors, made = stream_errors(at.device, at.few(9, 7))
    for name, value in (errors | masked_errors(at.device)).items():
        say(name, value, "relative")
    for name, count in made.items():
        say(name, count, "times")


def marked_tests(at: Size, say: Say) -> None:
    """Run the tests that are marked for a GPU, where there is one, and a clone and pytest besides."""
    if not (at.cuda and backends.installed("pytest") and (ROOT / "tests").is_dir()):
        return say("pytest -m gpu", "skipped: needs a GPU, a clone and pytest")
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    say("pytest -m gpu", (run.stdout.strip().splitlines() or [run.stderr[-200:]])[-1], f"exit code {run.returncode}")


def tiles(sinks: int) -> int:
    """Count the tiles of columns that five seconds of sound and their sinks take."""
    return -(-(PAPER.audio_latents(16) + sinks) // TILE)


def sound_mask(sinks: int, rows: str) -> AttentionMask:
    """Give the paper's mask of sound over sound for five seconds, brought to whole tiles in one of three ways."""
    mask = masks.build(replace(PAPER, sinks=sinks), 16, 1).audio_self
    if rows == "exact":
        return mask
    whole, seen = TILE * tiles(sinks), () if rows == "padding sees nothing" else (range(mask.columns),)
    padding = BlockRows(range(mask.rows, whole), seen)
    return replace(mask, by_block=(*mask.by_block, padding), columns=whole)


class Compared(NamedTuple):
    """FlexAttention against SDPA in fp64: largest error of output and gradients of true rows; finite in all rows."""

    error: float
    finite: bool


def compare_flex(at: Size, sinks: int, rows: str, dtype: torch.dtype, heads: int) -> dict[str, Compared]:
    """Compare FlexAttention with SDPA in fp64 on the sound's own attention, head dim 64; gradients need a GPU.

    Padded rows weigh nothing in what is differentiated, as in a training step whose loss leaves padding out.
    """
    mask, true = sound_mask(sinks, rows), 126 + sinks
    generator = torch.Generator().manual_seed(sinks)

    def draw() -> Tensor:
        return torch.randn(1, heads, mask.rows, 64, generator=generator).to(at.device, dtype)

    leaves, weight = [draw() for _ in range(3)], draw()
    weight[:, :, true:] = 0

    def run(parts: list[Tensor], how: Callable[..., Tensor], weight: Tensor) -> list[Tensor]:
        parts = [part.clone().requires_grad_(at.cuda) for part in parts]
        out = how(*parts)
        return [out.detach(), *(torch.autograd.grad(out, parts, weight.to(out)) if at.cuda else ())]

    found = run(leaves, partial(attend, visibility=replace(mask, rendering="flex")), weight)
    seen = mask.dense[:true, :true].to(at.device)
    wide = [part[:, :, :true].double() for part in leaves]
    right = run(wide, partial(scaled_dot_product_attention, attn_mask=seen), weight[:, :, :true])
    groups = {"forward": slice(0, 1), "gradients": slice(1, 4)}
    return {
        name: Compared(
            max(error(a[:, :, :true], b) for a, b in zip(found[part], right[part], strict=True)),
            all(bool(a.isfinite().all()) for a in found[part]),
        )
        for name, part in groups.items()
        if found[part]
    }


def flex(at: Size, say: Say) -> None:
    """Tell error and finiteness of FlexAttention by the number of sinks: the paper's NaNs begin at two and fewer."""
    for rows in reversed(ROWS):
        for dtype in (HALF, torch.float32):
            for sinks in SINKS[:: at.few(1, 3)]:
                name = f"{sinks} sinks, {rows}, {str(dtype).removeprefix('torch.')}"
                for part, (off, finite) in compare_flex(at, sinks, rows, dtype, at.few(32, 2)).items():
                    say(f"{name}: {part}, error", off, "relative")
                    say(f"{name}: {part}, finite", finite)
    if not at.cuda:
        say("gradients, and the compiled kernel", "skipped: needs a GPU")


def timed(at: Size, say: Say, name: str, model: Transformer, causal: RolloutConfig) -> None:
    """Time a stream without decoding, until well after its window is full."""
    full = causal.window + at.few(4, 2)
    blocks = full + at.few(4, 1)
    with counted() as done, peak(at, say, name):
        seconds = [s for s, _ in bench.block_seconds(model, causal, at.grid, blocks, at.text)]
    steady = statistics.median(seconds[full:])
    say(f"{name}: steady block", 1e3 * steady, "ms")
    say(f"{name}: frames a second without decoding", len(CLOCK.frames(causal.layout.block(full).video)) / steady)
    say(f"{name}: blocks 0, 1 and 2", 1e3 * sum(seconds[:3]), "ms")
    if isinstance(model, graphs.Captured):
        say(f"{name}: recordings and replays", list(done.values()), "times")


def stream(at: Size, say: Say) -> None:
    """Time blocks eager and captured, by passes and by window."""
    made: list[Transformer] = []
    say("drawing the weights", seconds_of(lambda: made.append(at.model())), "s")
    (model,) = made
    say("weights", sum(p.nbytes for p in model.parameters()) / 1e9, "GB")
    paper = PASSES["4 passes"]
    timed(at, say, "eager, 4 passes", model, paper)
    for passes, causal in PASSES.items():
        timed(at, say, f"captured, {passes}", graphs.Captured(model), causal)
    for window in (1, 2, 8, 20)[: at.few(4, 2)]:
        timed(at, say, f"captured, window of {window} s", graphs.Captured(model), replace(paper, window=window))
    hosted(at, say, model)


def hosted(at: Size, say: Say, model: Transformer) -> None:
    """Tell what the host does in a block while the device waits: tables, noise, synchronising calls."""
    layout = PAPER
    spans = iter(range(400, 500))
    seconds = at.took(lambda: model.rotations(layout.block(next(spans)), at.grid, 0))
    say("rotations of a new block", 1e3 * seconds, "ms")
    shapes, noise = AV((3, *at.grid, at.config.in_channels), (25, at.config.audio_in_channels)), iter(range(100))
    draw = seeded_noise([0], model.proj_out.weight)
    say("noise of a step", 1e3 * at.took(lambda: draw(next(noise), shapes, 0)), "ms")
    if at.cuda:
        block = bench.steady_block(model, PASSES["4 passes"], at.grid, at.text)
        block()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            block()
            torch.cuda.set_sync_debug_mode("default")
        say("synchronising calls of a block", sum("synchroniz" in str(w.message) for w in told), "times")


def codec_parts(at: Size) -> list[torch.nn.Module]:
    """Build LTX-2's decoders with random weights: at their real sizes (diffusers' defaults), or small ones."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    video_width, audio_width = at.config.in_channels, at.config.audio_in_channels
    channels = {"latent_channels": video_width}, {"latent_channels": audio_width // 16, "base_channels": audio_width}
    small = {"block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32)}
    small |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4}
    options = (
        ({}, {}, {}) if at.whole else (small, {"ch_mult": (1, 1, 1), "num_res_blocks": 1}, {"hidden_channels": 32})
    )
    strides = {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    with torch.device(at.device):
        video = AutoencoderKLLTX2Video(**strides, **channels[0], **options[0])
        audio, vocoder = AutoencoderKLLTX2Audio(**channels[1], **options[1]), LTX2Vocoder(**options[2])
    del video.encoder, audio.encoder
    for module in (video, audio):
        module.latents_std.fill_(1)
        module.latents_mean.zero_()
    # the vocoder computes in fp32, as `load_ltx2_codec` has it
    halves = [torch.nn.Module.to(module, HALF) for module in (video, audio)] if at.cuda else [video, audio]
    return [module.requires_grad_(False).eval() for module in (*halves, vocoder)]


def codec_of(at: Size, modules: list[torch.nn.Module], horizon: int):
    """Give the codec that streams them."""
    from omniforcing_lib.ltx2.codec import LTX2Codec

    return LTX2Codec(*modules, (32 * at.grid[0], 32 * at.grid[1]), horizon=horizon)


def decoders(at: Size, say: Say) -> None:
    """Time the decoding of a block by horizon, with cuDNN's own search for kernels, and with channels last."""
    if not backends.installed("diffusers"):
        return say("decoders", "skipped: needs diffusers")
    modules, blocks = codec_parts(at), at.few(8, 5)
    for how in ("plain", "cuDNN benchmark", "and channels last"):
        torch.backends.cudnn.benchmark = how != "plain"
        for module in modules[0].modules() if how == "and channels last" else ():
            if isinstance(module, torch.nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
        for horizon in (3, 1, 0)[: at.few(3, 1)]:
            codec, seconds, name = codec_of(at, modules, horizon), [], f"horizon {horizon}, {how}"
            state = codec.start()
            with peak(at, say, name):
                for k in range(blocks):
                    video, audio = PAPER.block(k).map(len)
                    shapes = AV((1, video, *at.grid, at.config.in_channels), (1, audio, at.config.audio_in_channels))
                    latents = shapes.map(lambda shape: at.draw(*shape))
                    call = partial(codec.decode, latents, state)
                    seconds.append(seconds_of(lambda call=call: to_arrays(call())))
            say(f"{name}: steady block", 1e3 * min(seconds[-2:]), "ms")
    torch.backends.cudnn.benchmark = False


def whole(at: Size, say: Say) -> None:
    """Time the whole stream, decoding included: frames a second, first frame, first second."""
    model, text = at.model(), StandInText(text_widths(at.config), at.text)
    modules = codec_parts(at) if backends.installed("diffusers") else None
    if modules is None:
        say("decoders", "a stand-in, without diffusers")
    torch.backends.cudnn.benchmark = True
    for horizon in (3, 1)[: at.few(2, 1)] if modules else (0,):
        codec = codec_of(at, modules, horizon) if modules else StandInCodec(at.config, at.grid, at.device)
        for passes in ("4 passes", "3 passes", "2 passes"):
            name, causal = f"{passes}, horizon {horizon}" + ", no decoders" * (not modules), PASSES[passes]
            with peak(at, say, name), Streamer(model, causal, codec, text, "rain on a roof", ahead=True) as live:
                seen = bench.watch(live, causal.window + at.few(8, 3))
            steady = statistics.median(seen.seconds[causal.window + at.few(4, 2) :])
            say(f"{name}: frames a second", len(seen.chunks[-1].frames) / steady)
            say(f"{name}: first frame", seen.seconds_to(1), "s")
            say(f"{name}: first second", seen.seconds_to(CLOCK.fps), "s")


def fp8(at: Size, say: Say) -> None:
    """Time the stream of a model whose weights are kept in e4m3."""
    model = at.model(fp8=True)
    say("weights", sum(p.nbytes for p in model.parameters()) / 1e9, "GB")
    for kind, runs in {"eager": model, "captured": graphs.Captured(model)}.items():
        timed(at, say, f"fp8, {kind}", runs, PASSES["4 passes"])


def compiled(at: Size, say: Say) -> None:
    """Time a steady pass with compiled blocks: what fusing norms, modulation and rotation is worth."""
    model = at.model()
    call = bench.open_block(model, RolloutConfig(), at.grid, 6, at.text)
    say("a pass, eager", 1e3 * at.took(call), "ms")
    backend = "inductor" if at.cuda else "eager"
    graphs.compile_blocks(model, backend=backend)
    say(f"compiling, {backend}", seconds_of(call), "s")
    say(f"a pass, compiled, {backend}", 1e3 * at.took(call), "ms")


def training(at: Size, say: Say) -> None:
    """Time a masked training step of eight layers, bf16 weights as FSDP gathers them: by rendering, and recomputed."""
    for rendering in ("sliced", "dense", "flex")[: 3 if at.cuda else 2]:
        for recompute in (False, True):
            model = at.model(layers=8).requires_grad_(True).train()
            model.recompute = recompute
            step = bench.training_step(model, RolloutConfig(), at.grid, 5, rendering, at.text)
            name = f"{len(model.transformer_blocks)} layers, {rendering}" + ", recomputed" * recompute
            with peak(at, say, name), torch.autocast(torch.device(at.device).type, HALF):
                say(f"{name}: forward and backward", 1e3 * at.took(step), "ms")


def profiled(at: Size, say: Say) -> None:
    """Tell the kernels of a steady pass that take most of its time, and how long the device waits for the host."""
    call = bench.open_block(at.model(), RolloutConfig(), at.grid, 6, at.text)
    seconds = at.took(call)
    with silent(), profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * at.cuda]) as profiler:
        seconds_of(call)
    key = "self_device_time_total" if at.cuda else "self_cpu_time_total"
    kernels = [e for e in profiler.key_averages() if getattr(e, key) and at.cuda == ("CUDA" in str(e.device_type))]
    busy = sum(getattr(e, key) for e in kernels) / 1e6
    say("a pass", 1e3 * seconds, "ms")
    say("kernels of a pass", sum(e.count for e in kernels), "kernels")
    say("device busy in a pass", 1e3 * busy, "ms")
    say("device waits for the host in a pass", 1e3 * max(0.0, seconds - busy), "ms")
    for event in sorted(kernels, key=lambda e: -getattr(e, key))[:20]:
        say(f"kernel {event.key[:90]}, {event.count} times", getattr(event, key) / 1e4 / busy, "%")


PHASES: Mapping[str, tuple[int, tuple[Callable[[Size, Say], None], ...]]] = {
    "environment": (60, (environment, roofs, attention)),
    "tests": (100, (laws, marked_tests)),
    "stream": (150, (stream,)),
    "whole": (90, (whole,)),
    "decoders": (70, (decoders,)),
    "fp8": (50, (fp8,)),
    "profile": (40, (profiled,)),
    "flex": (100, (flex,)),
    "training": (80, (training,)),
    "compile": (90, (compiled,)),
}
"""The most seconds that a phase may take, and its parts; those that matter most come first."""


def run(phase: str, at: Size, say: Say) -> int:
    """Run a phase's parts; one that fails is told, and the next one is tried. Returns how many failed."""
    if at.cuda:
        torch.cuda.set_device(at.device)
    failed = 0
    for part in PHASES[phase][1]:
        try:
            part(at, say)
        except Exception as problem:  # noqa: BLE001  whatever it was, the next part may still work
            failed += 1
            say(f"{part.__name__} FAILED", f"{type(problem).__name__}: {str(problem)[:300]}")
            traceback.print_exc()
    return failed
