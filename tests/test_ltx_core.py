"""Files that load elsewhere: ltx-core 1.0.0, Lightricks' own loader, in a folder of its own beside this environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
import torch
from safetensors.torch import load_file, save_file
from test_transformer import distance

from omniforcing_lib.flow import Skip
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints

LEVELS = AV(torch.tensor([0.6]), torch.tensor([0.3]))
RUN = """
import sys, torch
from safetensors.torch import load_file, save_file
from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationConfig
from ltx_core.guidance.perturbations import Perturbation, PerturbationType
from ltx_core.loader.single_gpu_model_builder import SingleGPUModelBuilder
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.transformer.model_configurator import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator

path, given, out = sys.argv[1:]
model = SingleGPUModelBuilder(LTXModelConfigurator, path, LTXV_MODEL_COMFY_RENAMING_MAP).build(
    torch.device("cpu"), torch.float32
)
assert not [name for name, p in model.named_parameters() if p.is_meta], "parameters that the file did not give"
x = load_file(given)

def modality(name):
    latent, sigma = x[name], x[f"{name}_sigma"]
    timesteps = sigma[:, None].expand(-1, latent.shape[1])
    return Modality(latent, sigma, timesteps, x[f"{name}_positions"], x[f"{name}_text"])

kinds = (PerturbationType.SKIP_VIDEO_SELF_ATTN, PerturbationType.SKIP_AUDIO_SELF_ATTN)
made = {}
for name, skipped in (("whole", []), ("perturbed", [Perturbation(kind, [1]) for kind in kinds])):
    batch = BatchedPerturbationConfig([PerturbationConfig(skipped)])
    with torch.no_grad():
        made |= dict(zip((f"{name}_video", f"{name}_audio"), model(modality("video"), modality("audio"), batch)))
save_file({key: value.contiguous() for key, value in made.items()}, out)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package as PyPI has it, without what it asks for: this environment's newer torch does."""
    folder = tmp_path_factory.mktemp("site")
    fetch = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "ltx-core==1.0.0"]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"ltx-core 1.0.0 could not be fetched: {done.stderr[-200:]}")
    return folder


def positions(x: AV) -> AV:
    """Bounds of each token's cell: seconds, pixels, as Lightricks' patchifiers give them. Shapes: [1, axes, T, 2]."""
    _, frames, height, width, _ = x.video.shape
    f, h, w = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    start = torch.stack([f * 8 - 7, h * 32, w * 32]).flatten(1).double()
    video = torch.stack([start, start + torch.tensor([8.0, 32.0, 32.0])[:, None]], -1)
    video[0].clamp_(min=0)
    video[0] /= 24
    mel = (4.0 * torch.arange(x.audio.shape[1], dtype=torch.float64) - 3)[None]
    audio = torch.stack([mel.clamp(min=0), mel + 4], -1) / 100
    return AV(video[None].float(), audio[None].float())


def elsewhere(path: Path, site: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Run the file in ltx-core, in a process of its own."""
    x, text = synthetic.inputs()
    given = {"video": x.video.flatten(1, 3), "audio": x.audio, "video_text": text.video, "audio_text": text.audio}
    given |= {f"{name}_positions": p for name, p in positions(x)._asdict().items()}
    given |= {f"{name}_sigma": s for name, s in LEVELS._asdict().items()}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / "given.safetensors")
    env = os.environ | {"PYTHONPATH": str(site)}
    run = [sys.executable, "-c", RUN, path, folder / "given.safetensors", folder / "made.safetensors"]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "made.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["2.0", "2.3", "teacher"])
@torch.no_grad()
def test_lightricks_loader_reads_our_files_and_gives_the_same_output(source, site, tmp_path):
    """Equal to 1e-5 in fp32, at two noise levels, and with self-attention perturbed as STG does."""
    if source != "teacher":
        source = synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", source, dtype=torch.float32)
    path = checkpoints.export(source, tmp_path / "out.safetensors")
    theirs, model = elsewhere(path, site, tmp_path), checkpoints.load(path, changes={"cross_modal_sigma": "all"})
    x, text = synthetic.inputs()
    for name, skip in (("whole", None), ("perturbed", Skip(frozenset({1})))):
        mine = model(x, LEVELS, text, skip=skip)
        expected = AV(theirs[f"{name}_video"].reshape(mine.video.shape), theirs[f"{name}_audio"])
        found = distance(mine, expected)
        print(f"{path.name} {name}: {found:.1e}")
        assert found <= 1e-5
    newest = checkpoints.load(path)
    assert distance(newest(x, LEVELS, text, skip=skip), expected) > 1e-3
