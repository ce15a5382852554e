"""Plan the memory of Stage 3 without any: the model on the meta device, its activations as autograd would keep them.

Bytes are counted, not guessed: parameters by component, what a roll-out and a critic step save for their gradients,
the rings of the KV cache, and the largest module that FSDP gathers. One number is assumed: `RESERVE`.

Shapes: B clips a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig, new_cache, rollout
from omniforcing_lib.transformer import Transformer
from omniforcing_lib.transformer import empty as empty_model

GB = 10**9
RESERVE = 4 * GB
"""CUDA's context, NCCL's buffers, and what the allocator cannot use."""
BOARDS = {"80 GB": 80 * GB, "141 GB": 141 * GB, "192 GB": 192 * GB}


@dataclass(frozen=True)
class Clip:
    """Say what one GPU trains on at a time.

    Attributes:
        batch: clips.
        seconds: of a clip.
        grid: tokens of a video frame.
        text: tokens of a prompt.
    """

    batch: int = 1
    seconds: int = 5
    grid: tuple[int, int] = (16, 24)
    text: int = 1024


@dataclass(frozen=True)
class Counted:
    """Bytes that a dry run found.

    Attributes:
        parameters: numbers of the generator, and of critic or teacher, which have no sinks.
        gathered: numbers of the largest module that is gathered: a block, or all that is outside of blocks.
        kept: bytes saved for gradients by a roll-out and by a critic step.
        inputs: the same where blocks are recomputed: inputs of blocks; `count` adds what one layer keeps.
        cache: bytes of the rings.
    """

    parameters: tuple[int, int]
    gathered: int
    kept: tuple[int, int]
    inputs: tuple[int, int]
    cache: int


def count(config: ModelConfig, causal: RolloutConfig, clip: Clip, dtype: torch.dtype = torch.bfloat16) -> Counted:
    """Count a model from dry runs of one layer and of two, computing in `dtype`: layers are alike."""
    one, two = (dry_run(replace(config, num_layers=n), causal, clip, dtype) for n in (1, 2))

    def stretched(a: int, b: int) -> int:
        return a + (config.num_layers - 1) * (b - a)

    values = {name: getattr(one, name) for name in ("parameters", "kept", "inputs")}
    found = {n: tuple(map(stretched, v, getattr(two, n))) for n, v in values.items()}
    layer = tuple(b - a for a, b in zip(one.kept, two.kept, strict=True))
    inputs = tuple(map(sum, zip(found["inputs"], layer, strict=True)))
    return Counted(found["parameters"], one.gathered, found["kept"], inputs, stretched(one.cache, two.cache))


def dry_run(config: ModelConfig, causal: RolloutConfig, clip: Clip, dtype: torch.dtype) -> Counted:
    """Run Stage 3's passes on the meta device, every layer of them; takes no memory and no weights."""
    generator, critic = (empty_model(config.with_sinks(n)).to(dtype) for n in (causal.layout.sinks, 0))
    sizes = tuple(sum(p.numel() for p in model.parameters()) for model in (generator, critic))
    block = sum(p.numel() for p in generator.transformer_blocks[0].parameters())
    rest = sizes[0] - block * config.num_layers
    latents = generator.clock.latents(clip.seconds)

    def empty(shape: Sequence[int]) -> Tensor:
        return torch.empty(clip.batch, *shape, dtype=dtype, device="meta")

    def noise(k: int, shapes: AV[tuple[int, ...]], draw: int) -> AV[Tensor]:
        return shapes.map(empty)

    text = AV(*(empty((clip.text, config.caption_channels)) for _ in range(2)))
    with _saving(generator) as rolled:
        blocks = [*rollout(generator, causal, text, noise, clip.grid, latents.video, exit_step=0)]
    sigma = torch.empty(clip.batch, device="meta")
    with _saving(critic) as judged:
        critic(config.latent_shapes(latents, clip.grid).map(empty), AV(sigma, sigma), text)
    cache = new_cache(generator, causal, clip.grid, clip.batch, len(blocks))
    kept, inputs = zip(rolled(), judged(), strict=True)
    return Counted(sizes, max(block, rest), kept, inputs, cache.nbytes)


class _Fused(TorchFunctionMode):
    """Attend by the fused kernel, which keeps no probabilities; left alone, the meta device takes the plain one."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        if func is scaled_dot_product_attention and not kwargs:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _saving(model: Transformer) -> Iterator:
    """Add up what autograd keeps within the block, weights left out, and the inputs of the model's blocks."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}
    inputs = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return x

    def note(module: torch.nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            inputs.append(sum(x.nbytes for x in args[0]))

    handles = [block.register_forward_pre_hook(note) for block in model.transformer_blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), _Fused():
        yield lambda: (sum(s.nbytes() for s in storages.values()), sum(inputs))
    for handle in handles:
        handle.remove()


def parameters(config: ModelConfig) -> int:
    """Count a model's parameters; nothing is allocated."""
    return sum(p.numel() for p in empty_model(config).parameters())


def training_bytes(config: ModelConfig, average: bool = True) -> int:
    """Count what one model that learns holds: fp32 weights, gradients, both moments of AdamW, and the average."""
    return (20 if average else 16) * parameters(config)


def components(counted: Counted, gpus: int, *, amp: bool = True, recompute: bool = True) -> dict[str, int]:
    """Give the bytes of every component on one of `gpus` GPUs, all models sharded over all of them."""
    student, scorer = counted.parameters
    narrow = 2 if amp else 4
    gradients = narrow * counted.gathered
    return {
        "generator: weights, fp32": 4 * student // gpus,
        "generator: gradients, fp32": 4 * student // gpus,
        "generator: AdamW": 8 * student // gpus,
        "generator: average": 4 * student // gpus,
        "critic: weights, fp32": 4 * scorer // gpus,
        "critic: gradients, fp32": 4 * scorer // gpus,
        "critic: AdamW": 8 * scorer // gpus,
        "teacher: weights": narrow * scorer // gpus,
        "gathered: two modules and a gradient": 2 * narrow * counted.gathered + gradients,
        "activations, recomputed" if recompute else "activations, kept": max(
            counted.inputs if recompute else counted.kept
        ),
        "KV cache": counted.cache,
        "reserve": RESERVE,
    }


def table(counted: Counted, gpus: Sequence[int], *, amp: bool = True) -> str:
    """Lay the plan out: components by number of GPUs, then what fits which board."""
    full = {n: components(counted, n, amp=amp) for n in gpus}
    rows = [("GB on each GPU", *(f"{n} GPU{'s' * (n > 1)}" for n in gpus))]
    rows += [(name, *(f"{full[n][name] / GB:,.1f}" for n in gpus)) for name in full[gpus[0]]]
    kept = {n: components(counted, n, amp=amp, recompute=False)["activations, kept"] for n in gpus}
    rows.append(("(activations, kept, instead)", *(f"{kept[n] / GB:,.1f}" for n in gpus)))
    rows.append(("total", *(f"{sum(full[n].values()) / GB:,.1f}" for n in gpus)))
    for (name, room), recompute in product(BOARDS.items(), (True, False)):
        totals = [sum(components(counted, n, amp=amp, recompute=recompute).values()) for n in gpus]
        how = "recomputed" if recompute else "kept"
        rows.append((f"fits {name}, activations {how}", *("yes" if t <= room else "no" for t in totals)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
