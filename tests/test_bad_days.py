"""Killed while writing, a full disk, many streams at once: what was there stays, what is made stays the same."""

import errno
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_stream import codec, stream  # noqa: F401  fixtures

from omniforcing_lib import files, media
from omniforcing_lib.layout import AV
from omniforcing_lib.training import run_folder
from omniforcing_lib.training.distributed import ALONE

sys.path.append(str(Path(__file__).parent / "reliability"))
import writer

KILLS = 8  # of each kind
DEAD = 2**22 + 1  # above any process number that Linux gives


@pytest.mark.parametrize("name", writer.KINDS)
def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, name):
    path = tmp_path / name
    found = writer.kill_writers(path, KILLS, random.Random(name))
    print(name, found)
    assert found["kills"] == KILLS and not found["lost"]
    writer.KINDS[name](path, 7)
    assert writer.version_of(path) == 7
    (plain := tmp_path.with_name(f"{name} as anybody writes it")).touch()
    assert path.stat().st_mode == plain.stat().st_mode  # the same people may read it
    left = [entry.name for entry in tmp_path.iterdir() if entry != path]
    assert all(entry.startswith(f".{name}.") and entry.endswith(".part") for entry in left)


def test_what_the_killed_left_is_swept_and_what_the_living_write_is_not(tmp_path):
    path = tmp_path / "a.json"
    dead, fresh, living = (tmp_path / f".a.json.{n}.part" for n in (DEAD, DEAD + 1, os.getppid()))
    for part in (dead, fresh, living):
        part.mkdir()
        (part / "a.json").write_text("half")
    long_ago = time.time() - 2 * files.STALE_S
    for part in (dead, living):
        os.utime(part / "a.json", (long_ago, long_ago))
    files.write_json(path, {})
    assert not dead.exists() and fresh.exists() and living.exists()


@contextmanager
def no_room(limit=200_000):
    """No file may grow beyond this; what a full disk answers with "no space left" then ends in "file too large"."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def large(path):
    """Write more than there is room for, in the way that the file's kind is written."""
    noise = np.random.default_rng(0).integers(0, 255, (49, 64, 64, 3), np.uint8)
    match path.suffix:
        case ".txt":
            files.write_text(path, "x" * 10**6)
        case ".json":
            files.write_json(path, {"a": ["x"] * 10**6})
        case ".safetensors":
            files.write_tensors(path, {"a": torch.zeros(10**6)})
        case ".mp4":
            media.write_clip(path, AV(noise, np.zeros(32_160, np.float32)))
        case ".wav":
            files.write_bytes(path, media.wav_bytes(np.zeros(10**6, np.float32)))


@pytest.mark.parametrize("kind", ["txt", "json", "safetensors", "mp4", "wav"])
def test_a_full_disk_is_told_by_name_and_leaves_the_old_file_alone(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"old")
    with no_room(), pytest.raises(OSError, match=rf"a.{kind} could not be written and is as it was.*too large"):
        large(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    large(path)
    assert path.stat().st_size > 200_000


def test_a_truly_full_disk_too(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk here")
    try:
        for kind in ("txt", "safetensors", "mp4"):
            path = tmp_path / f"a.{kind}"
            path.write_bytes(b"old")
            with pytest.raises(OSError, match=r"is as it was.*No space left"):
                large(path)
            assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
            path.unlink()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_knows_no_rights_is_written_all_the_same(tmp_path, monkeypatch):
    def chmod(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.Path, "chmod", chmod)
    assert files.write_text(tmp_path / "a.txt", "whole").read_text() == "whole"


@pytest.fixture
def no_locks(monkeypatch):
    """What flock answers on many disks of a network."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)


def opened(folder):
    with run_folder.RunFolder(folder, {}, 0, ALONE):
        return (folder / "lock").read_text()


def test_a_disk_without_locks_holds_a_run_and_says_so(tmp_path, no_locks, capsys):
    assert opened(tmp_path) == f"{socket.gethostname()} process {os.getpid()}\n"
    assert "no locks here (No locks available)" in capsys.readouterr().out


def test_without_locks_a_run_that_lives_keeps_its_folder_and_a_dead_one_does_not(tmp_path, no_locks):
    (tmp_path / "lock").write_text(f"{socket.gethostname()} process {os.getppid()}\n")
    with pytest.raises(ValueError, match=f"in use by {socket.gethostname()} process {os.getppid()}"):
        opened(tmp_path)
    (tmp_path / "lock").write_text(f"{socket.gethostname()} process {DEAD}\n")
    assert str(os.getpid()) in opened(tmp_path)


@pytest.mark.parametrize("found", [errno.EAGAIN, errno.EWOULDBLOCK])
def test_only_would_block_means_that_another_run_has_the_folder(tmp_path, monkeypatch, found):
    def flock(*_):
        raise OSError(found, os.strerror(found))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ValueError, match="in use by a run that has just begun"):
        opened(tmp_path)


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    """By a stand-in for `msvcrt`; the name of the owner stays readable, and a lock that is taken is a busy folder."""
    held = set()

    def locking(file, mode, count):
        place = os.lseek(file, 0, os.SEEK_CUR)
        if place in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(place)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    assert opened(tmp_path) == f"{socket.gethostname()} process {os.getpid()}\n"
    assert min(held) > 1000
    with pytest.raises(ValueError, match="in use by a run that has just begun"):
        opened(tmp_path)


def bits(chunks):
    return b"".join(chunk.frames.tobytes() + chunk.samples.tobytes() for chunk in chunks)


def test_eight_streams_in_one_process_give_the_bits_of_each_alone(stream):  # noqa: F811
    alone = [bits(islice(stream(seed=seed), 3)) for seed in range(8)]
    together, streams = {}, [stream(seed=seed) for seed in range(8)]

    def run(seed):
        together[seed] = bits(islice(streams[seed], 3))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(alone)) == 8 and [together[seed] for seed in range(8)] == alone


SHIPPED = """import hashlib, sys
import torch
from itertools import islice
from omniforcing_lib import stream
from omniforcing_lib.bounce import codecs, text
from omniforcing_lib.ltx2 import checkpoints
torch.set_num_threads(1)
causal = checkpoints.read("student").causal
student, codec = checkpoints.load("student"), codecs.shipped_codec()
live = stream.Streamer(student, causal, codec, text.TinyText(), "a red ball, bell", 7)
digest = hashlib.sha256()
for chunk in islice(live, 3):
    digest.update(chunk.frames.tobytes() + chunk.samples.tobytes())
print(digest.hexdigest())"""


@pytest.mark.slow
def test_eight_processes_give_the_bits_of_one_alone():
    def start():
        return subprocess.Popen([sys.executable, "-c", SHIPPED], stdout=subprocess.PIPE, text=True)

    alone = start().communicate()[0]
    found = [process.communicate()[0] for process in [start() for _ in range(8)]]
    assert len(alone.strip()) == 64 and found == [alone] * 8
