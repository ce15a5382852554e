"""LTX-2's prompts: Gemma 3 or 4 (transformers), then the connectors (diffusers), to the contexts of the two streams.

Gemma is many times larger than the contexts it gives: they are cached on disk, so that Gemma can be unloaded, or need
not be loaded at all. A cached context is found by its prompt and by what the encoder's files hold. Where the cache
cannot be read or written, contexts are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from omniforcing_lib.files import given, write_tensors
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import formats, parts
from omniforcing_lib.safetensors_io import Reader, one_file, raw, read_json, table

NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
SAMPLES, SAMPLE = 64, 4096  # a fingerprint reads 64 stretches of 4096 bytes of a file


def user_cache() -> Path:
    """Give the folder of this user's contexts, below `$XDG_CACHE_HOME` or `~/.cache`."""
    return given(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "omniforcing" / "contexts"


class GemmaText:
    """Encode prompts for LTX-2; a `TextEncoder`. Gemma is loaded when the first prompt is not in the cache.

    Source: specification 1.7.

    Args:
        gemma: folder of Gemma 3 or 4 with its tokenizer, as transformers saves it, or LTX-2.5's text encoder, one file.
        ltx2: LTX-2 files or diffusers folder that hold projection and connectors.
        cache: folder for contexts; with None every prompt is computed each time.
        negative: what the unconditional prompt "" stands for.
        length: tokens of a context, padded on the left; a multiple of the connectors' registers.
        place: device and dtype of the encoder while it is loaded.

    Raises:
        ValueError: there is no Gemma, or not the one that the files of `ltx2` were trained with.
    """

    def __init__(
        self,
        gemma: str | os.PathLike[str],
        ltx2: parts.Source,
        cache: str | os.PathLike[str] | None = None,
        *,
        negative: str = NEGATIVE,
        length: int = 1024,
        **place: torch.device | torch.dtype,
    ) -> None:
        self.gemma, self.ltx2, self.cache = Path(gemma), ltx2, None if cache is None else Path(cache)
        self.described = _described(self.gemma)
        _check_version(self.gemma, self.described, ltx2)
        self.negative, self.length, self.place = negative, length, {"dtype": torch.bfloat16} | place
        self._modules: tuple[object, nn.Module, nn.Module] | None = None

    @cached_property
    def identity(self) -> str:
        """Fingerprint of all files that make a context, of its length and its precision."""
        connectors = [p.glob("connectors/*") if p.is_dir() else [p] for p in parts.paths(self.ltx2)]
        gemma = self.gemma.iterdir() if self.gemma.is_dir() else [self.gemma]
        files = {path for path in chain(gemma, *connectors) if path.suffix in (".safetensors", ".json", ".model")}
        return fingerprint(files, f"{self.length} {self.place['dtype']} tokens")

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
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoModel, AutoTokenizer

        if self.gemma.is_file():
            tokenizer, whole = _from_file(self.gemma, self.described, self.place["dtype"])
        else:
            tokenizer = AutoTokenizer.from_pretrained(self.gemma, local_files_only=True, padding_side="left")
            whole = AutoModel.from_pretrained(
                self.gemma, local_files_only=True, use_safetensors=True, dtype=self.place["dtype"]
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        first, start = tokenizer.bos_token, tokenizer.bos_token_id
        if tokenizer("a").input_ids[0] != start:  # Gemma 4's does not begin with it, Gemma 3's does
            begin = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, start)])
            tokenizer.backend_tokenizer.post_processor = begin
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


def _described(gemma: Path) -> dict:
    """Read the config of a Gemma, from its folder or from the metadata of LTX-2.5's text encoder; nothing is loaded."""
    if gemma.is_file():
        text = one_file(gemma).metadata.get("gemma_config")
        if text is None:
            raise ValueError(f"{gemma} is no text encoder: its metadata has no `gemma_config`")
        return table(gemma, text)
    if not (gemma / "config.json").is_file():
        raise ValueError(f"{gemma} is no folder of a Gemma model: it has no config.json")
    return read_json(gemma / "config.json")


def _check_version(gemma: Path, described: Mapping, source: parts.Source) -> None:
    """Refuse a Gemma that an LTX-2 was not trained with: its contexts would have the right shape and no meaning."""
    files = [path for path in parts.paths(source) if path.is_file()]
    if not files:
        return
    metadata, found = parts.opened(files).metadata, described.get("gemma_version")
    wanted = table(files[0], metadata.get("gemma_source_checkpoint", "{}")).get("gemma_version")
    newer = formats.version_number(metadata.get("model_version")) >= (2, 4)
    kind, expected = described.get("model_type", ""), "gemma4" if newer else "gemma3"
    if found != wanted if wanted else not kind.startswith(expected):
        raise ValueError(
            f"{gemma}: this is {found or kind or 'a Gemma of no known version'}, and {files[0].name} was trained with "
            f"{wanted or expected}; name that one (gemma)"
        )
    if newer and not wanted:
        warnings.warn(f"{files[0].name} does not say which Gemma it was trained with; taken: {gemma}", stacklevel=3)


def _from_file(path: Path, described: Mapping, dtype: torch.dtype) -> tuple[object, nn.Module]:
    """Load tokenizer and language model of LTX-2.5's text encoder, whose names are Comfy's or transformers'."""
    from accelerate import init_empty_weights
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    entries, state = one_file(path).entries, {}
    if "tokenizer_json" not in entries:
        raise ValueError(f"{path} holds no `tokenizer_json`; get the text encoder again, or give a folder of Gemma 4")
    config = AutoConfig.for_model(**described).get_text_config()
    with init_empty_weights():
        model = AutoModel.from_config(config)
    reader = Reader(entries)
    for name in entries:
        bare = name.removeprefix("model.").removeprefix("language_model.")
        if name.startswith("model.") and bare.split(".")[0] in ("layers", "embed_tokens", "norm"):
            state[bare] = reader.get(name, dtype)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: the tensors do not fit its `gemma_config`: {error}") from error
    words = Tokenizer.from_str(raw(entries["tokenizer_json"]).decode())
    special = {
        f"{name}_token": words.id_to_token(getattr(config, f"{name}_token_id")) for name in ("bos", "eos", "pad")
    }
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special), model


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
