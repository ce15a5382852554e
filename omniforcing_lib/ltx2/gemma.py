"""LTX-2's prompts: Gemma 3 (transformers), then the connectors (diffusers), to the contexts of the two streams.

Gemma is many times larger than the contexts it gives: they are cached on disk, so that Gemma can be unloaded, or need
not be loaded at all. A cached context is found by its prompt and by what the encoder's files hold. Where the cache
cannot be read or written, contexts are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from omniforcing_lib.files import given, write_tensors
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import parts
from omniforcing_lib.safetensors_io import Reader, one_file

NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
SAMPLES, SAMPLE = 64, 4096  # a fingerprint reads 64 stretches of 4096 bytes of a file


def user_cache() -> Path:
    """Give the folder of this user's contexts, below `$XDG_CACHE_HOME` or `~/.cache`."""
    return given(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "omniforcing" / "contexts"


class GemmaText:
    """Encode prompts for LTX-2; a `TextEncoder`. Gemma is loaded when the first prompt is not in the cache.

    Source: specification 1.7.

    Args:
        gemma: folder of Gemma 3 with its tokenizer, as transformers saves it.
        ltx2: LTX-2 single file or diffusers folder that holds the connectors.
        cache: folder for contexts; with None every prompt is computed each time.
        negative: what the unconditional prompt "" stands for.
        length: tokens of a context, padded on the left; a multiple of the connectors' registers.
        place: device and dtype of the encoder while it is loaded.
    """

    def __init__(
        self,
        gemma: str | os.PathLike[str],
        ltx2: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        *,
        negative: str = NEGATIVE,
        length: int = 1024,
        **place: torch.device | torch.dtype,
    ) -> None:
        if not (Path(gemma) / "config.json").is_file():
            raise ValueError(f"{gemma} is no folder of a Gemma model: it has no config.json")
        self.gemma, self.ltx2, self.cache = Path(gemma), Path(ltx2), None if cache is None else Path(cache)
        self.negative, self.length, self.place = negative, length, {"dtype": torch.bfloat16} | place
        self._modules: tuple[object, nn.Module, nn.Module] | None = None

    @cached_property
    def widths(self) -> AV[int]:
        """Width of the context of each stream."""
        return parts.context_widths(self.ltx2)

    @property
    def channels(self) -> int:
        """Width of the video's context."""
        return self.widths.video

    @cached_property
    def identity(self) -> str:
        """Fingerprint of all files that make a context, of its length and its precision."""
        connectors = self.ltx2.glob("connectors/*") if self.ltx2.is_dir() else [self.ltx2]
        suffixes = (".safetensors", ".json", ".model")
        files = [path for path in (*self.gemma.iterdir(), *connectors) if path.suffix in suffixes]
        return fingerprint(files, f"{self.length} {self.place['dtype']} tokens")

    @property
    def loaded(self) -> bool:
        """Tell whether the encoder is in memory."""
        return self._modules is not None

    def encode(
        self, prompts: Sequence[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AV[Tensor]:
        """Encode prompts, from the cache where possible; "" is the negative prompt.

        A warning names a prompt that has more tokens than a context: what is behind them is left out.

        Shapes: pair [B, length, width of the stream].
        """
        contexts = [self._context(prompt.strip() or self.negative) for prompt in prompts]
        return AV(*zip(*contexts, strict=True)).map(lambda rows: torch.cat([row.to(device, dtype) for row in rows]))

    def unload(self) -> None:
        """Free the encoder's memory; it is loaded again when a prompt is not in the cache."""
        self._modules = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _context(self, prompt: str) -> AV[Tensor]:
        if self.cache is None:
            return self._compute(prompt)[0]
        path = self.cache / f"{hashlib.sha256(f'{self.identity} {prompt}'.encode()).hexdigest()}.safetensors"
        try:
            stored = one_file(path)
            reader = Reader(stored.entries)
            self._report(prompt, int(stored.metadata["tokens"]))
            return AV(reader.get("video"), reader.get("audio"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no cached context ({error}); delete it, and it is made again") from error
        except OSError:  # not there yet, or not readable: then writing fails too, and says why
            context, tokens = self._compute(prompt)
        try:
            told = {"prompt": prompt, "encoder": self.identity, "tokens": str(tokens)}
            write_tensors(path, context._asdict(), told)
        except OSError as error:
            self.cache = None
            warnings.warn(f"contexts are not kept, name another folder for them: {error}", stacklevel=2)
        return context

    def _report(self, prompt: str, tokens: int) -> None:
        if tokens > self.length:
            said = f"{prompt[:40]!r}... has {tokens:,} tokens, the encoder takes {self.length:,}"
            warnings.warn(f"the prompt {said}: the last {tokens - self.length:,} are left out", stacklevel=5)

    @torch.no_grad()
    def _compute(self, prompt: str) -> tuple[AV[Tensor], int]:
        """Run Gemma and the connectors on one prompt, as LTX-2's pipeline does; give its number of tokens too."""
        if self._modules is None:
            self._modules = self._load()
        tokenizer, gemma, connectors = self._modules
        count = len(tokenizer(prompt).input_ids)
        self._report(prompt, count)
        tokens = tokenizer(
            [prompt], padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(gemma.device)
        asked = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        states = gemma(**asked, output_hidden_states=True).hidden_states
        hidden = torch.stack(states, -1).to(next(connectors.parameters()).dtype)
        video, audio, _ = connectors(hidden, tokens.attention_mask, padding_side="left")
        return AV(video, audio).map(Tensor.cpu), count

    def _load(self) -> tuple[object, nn.Module, nn.Module]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.gemma, local_files_only=True, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        whole = AutoModel.from_pretrained(
            self.gemma, local_files_only=True, use_safetensors=True, dtype=self.place["dtype"]
        )
        gemma = getattr(whole, "language_model", whole).requires_grad_(False).eval()
        connectors = parts.load(self.ltx2, "connectors", **self.place)
        if (width := gemma.config.hidden_size) != (expected := connectors.config.caption_channels):
            widths = f"{width}, the connectors take {expected}"
            raise ValueError(f"{self.gemma}: the hidden width is {widths}; use the Gemma that LTX-2 was trained with")
        for stream in (connectors.video_connector, connectors.audio_connector):
            registers = stream.num_learnable_registers
            if not registers or self.length % registers:
                raise ValueError(f"length is a multiple of the connectors' {registers} registers, found {self.length}")
        return tokenizer, gemma.to(**self.place), connectors


def fingerprint(files: Iterable[Path], more: str = "") -> str:
    """Hash names, sizes and evenly spread samples of files: other weights give another hash, 24 GB within a moment."""
    digest = hashlib.sha256(more.encode())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(size - SAMPLE, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
