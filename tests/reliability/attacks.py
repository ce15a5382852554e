"""Hostile input, drawn from a random generator: broken checkpoints, films, prompts, words of the command line.

Each attack takes a `random.Random` and what is whole, and gives what is broken; nothing here asserts anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random

import av
import numpy as np

HUGE = (-1, 0, 1, 3, 7, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**64, 10**30)
ODD_VALUES = (*HUGE, None, True, "", "many", "../up", [], {}, [1, 2], {"a": 1}, -0.5, 1e308, float("nan"), float("inf"))
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F128", "", "f32", None, 4)


def file_of(header: object, data: bytes, length: int | None = None) -> bytes:
    """Put together a safetensors file; a header that is text or bytes goes in as it is."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", (len(raw) if length is None else length) % 2**64) + raw + data


def parts_of(whole: bytes) -> tuple[dict, bytes]:
    """Split a safetensors file into header and data."""
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def cut(dice: Random, whole: bytes) -> bytes:
    """End early: anywhere, or at one of the file's own boundaries."""
    header, data = parts_of(whole)
    start = len(whole) - len(data)
    ends = [e for name, entry in header.items() if name != "__metadata__" for e in entry["data_offsets"]]
    edges = [0, 7, 8, 9, start - 1, start, *(start + end for end in ends), len(whole) - 1]
    return whole[: dice.choice([*edges, dice.randrange(len(whole))])]


def length_of_header(dice: Random, whole: bytes) -> bytes:
    """Say another length of the header."""
    true = struct.unpack("<Q", whole[:8])[0]
    return struct.pack("<Q", dice.choice([*HUGE, true - 1, true + 1, dice.randrange(2**20)]) % 2**64) + whole[8:]


def entry(dice: Random, whole: bytes) -> bytes:
    """Change what the header says of one tensor."""
    header, data = parts_of(whole)
    name = dice.choice([name for name in header if name != "__metadata__"])
    said = header[name]
    match dice.randrange(8):
        case 0:
            said["data_offsets"] = [dice.choice(HUGE), dice.choice(HUGE)]
        case 1:
            said["data_offsets"] = said["data_offsets"][::-1]
        case 2:
            said["shape"] = [dice.choice(HUGE) for _ in range(dice.randrange(6))]
        case 3:
            said["dtype"] = dice.choice(DTYPES)
        case 4:
            said.pop(dice.choice([*said]))
        case 5:
            said[dice.choice([*said])] = dice.choice(ODD_VALUES)
        case 6:
            header[dice.choice(["../../x", name + "x", "", "\0", "x" * 4096])] = header.pop(name)
        case 7:
            header.pop(name)
    return file_of(header, data)


def twice(dice: Random, whole: bytes) -> bytes:
    """Name one tensor two times, or give two tensors one place."""
    header, data = parts_of(whole)
    one, other = dice.sample([name for name in header if name != "__metadata__"], 2)
    if dice.random() < 0.5:
        header[other]["data_offsets"] = header[one]["data_offsets"]
        return file_of(header, data)
    text = json.dumps(header)
    return file_of(f"{text[:-1]}, {json.dumps(one)}: {json.dumps(header[other])}}}", data)


def odd_header(dice: Random, whole: bytes) -> bytes:
    """Give a header that is no map of tensors at all."""
    odd = [
        "",
        "null",
        "[]",
        "[" * 10_000,
        "{" * 100,
        '{"a":',
        b"\xff\xfe",
        '{"__metadata__": 3}',
        '{"__metadata__": {}}',
    ]
    odd += ['{"x": ' * 500 + "1" + "}" * 500, " " * 4096, json.dumps({str(i): {} for i in range(999)})]
    return file_of(dice.choice(odd), whole[-64:])


def flipped(dice: Random, whole: bytes) -> bytes:
    """Change single bytes, mostly in the header."""
    out = bytearray(whole)
    end = len(whole) if dice.random() < 0.3 else len(whole) - len(parts_of(whole)[1])
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        out[dice.randrange(end)] = dice.randrange(256)
    return bytes(out)


def config(dice: Random, whole: bytes) -> bytes:
    """Change one value of the JSON config in the metadata, or the metadata itself."""
    header, data = parts_of(whole)
    said = header["__metadata__"]
    if dice.random() < 0.15:
        key = dice.choice([*said])
        said[key] = dice.choice(
            ["", "null", "[]", "{", "NaN", '{"transformer": []}', '{"transformer": {}}', "3", "x" * 9999]
        )
        return file_of(header, data)
    settings = json.loads(said["config"])
    part = settings[dice.choice([*settings])]
    path = [part]
    while path and isinstance(path[-1], dict) and dice.random() < 0.6:
        inner = [value for value in path[-1].values() if isinstance(value, dict)]
        if not inner:
            break
        path.append(dice.choice(inner))
    if dice.random() < 0.1:
        path[-1].pop(dice.choice([*path[-1]]), None)
    else:
        path[-1][dice.choice([*path[-1]])] = dice.choice(ODD_VALUES)
    said["config"] = json.dumps(settings)
    return file_of(header, data)


CHECKPOINT_ATTACKS: tuple[Callable[[Random, bytes], bytes], ...] = (
    cut,
    length_of_header,
    entry,
    entry,
    twice,
    odd_header,
    flipped,
    config,
    config,
    config,
)


def broken_film(dice: Random, whole: bytes) -> bytes:
    """Cut, swap, repeat, blank or change bytes of a film."""
    n = len(whole)
    a, b = sorted(dice.randrange(n) for _ in range(2))
    match dice.randrange(6):
        case 0:
            return whole[:a]
        case 1:
            return whole[a:]
        case 2:
            return whole[:a] + whole[b:]
        case 3:
            return whole[:a] + whole[a:b] * 2 + whole[b:]
        case 4:
            return whole[:a] + bytes(b - a) + whole[b:]
    out = bytearray(whole)
    for _ in range(dice.choice([1, 4, 16, 256])):
        out[dice.randrange(n)] = dice.randrange(256)
    return bytes(out)


LAYOUTS = ("mono", "stereo", "5.1", "7.1")
RATES = (8000, 11025, 44100, 48000, 96000)


def odd_film(dice: Random, path: Path) -> Path:
    """Write a whole but unusual film: odd sizes, one frame, uneven times, many channels, no sound or no picture."""
    pictures, sound = dice.choice([(True, True), (True, True), (True, False), (False, True)])
    times = [0.0]
    for _ in range(dice.choice([0, 0, 1, 5, 30])):
        times.append(times[-1] + dice.choice([1 / 24, 1 / 60, 0.2, 1.0]))
    size = dice.choice([(64, 64), (33, 65), (1, 1), (2, 511), (240, 17)])
    with av.open(str(path), "w", format="matroska") as container:
        video = audio = None
        if pictures:
            video = container.add_stream("ffv1", rate=1000)
            video.height, video.width, video.pix_fmt = *size, "bgr0"
            video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        if sound:
            rate, layout = dice.choice(RATES), dice.choice(LAYOUTS)
            audio = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        for time in times if pictures else ():
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 40, np.uint8), "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        if sound:
            count = dice.choice([1, 100, rate // 2, rate * 2])
            channels = audio.codec_context.layout.nb_channels
            frame = av.AudioFrame.from_ndarray(np.zeros((1, count * channels), np.int16), "s16", layout)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = round(dice.choice([0, 0, 0.5]) * rate)
            container.mux(audio.encode(frame))
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))
    return path


SCRIPTS = "ašжλअ中あ한ا🎈é\u0301\u202e\u200b\ufeff\x00\x07\x1b[31m\n\r\t\u2028'\"\\%{}$`;|&<>\ud800"


def prompt(dice: Random) -> str:
    """Give a text that is nearly, or not at all, a prompt."""
    words = ["a", "red", "ball,", "bell", "a red ball, bell", "A RED BALL,", "pink", "", " ", "-", "--out", "../../x"]
    text = " ".join(dice.choice(words) for _ in range(dice.randrange(5)))
    for _ in range(dice.choice([0, 1, 1, 8])):
        at = dice.randrange(len(text) + 1)
        text = text[:at] + dice.choice(SCRIPTS) + text[at:]
    return text * dice.choice([1, 1, 1, 1, 1000, 100_000])


NUMBERS = ("-1", "0", "1e9", "nan", "0x10", "1.5", "", "two", str(-(2**63) - 1), "1" * 5000, "9" * 30, "1_0", "٣")
PATHS = ("", ".", "/", "../up.mp4", "a\0.mp4", "/nowhere/at/all.mp4", "x" * 300 + ".mp4", "clip", "-", "\n.mp4")


def command(dice: Random, folder: Path) -> list[str]:
    """Give words for the command line of which at least one is wrong."""
    out, wrong = ["--out", str(folder / "never.mp4")], "a pink ball, " + prompt(dice)
    match dice.randrange(6):
        case 0:
            number = [dice.choice(["--seed", "--seconds"]), dice.choice(NUMBERS)]
            return [dice.choice(["generate", "render"]), "--prompt", wrong, *number, *out]
        case 1:
            number = (
                ["--seed", dice.choice(["-1", "9" * 30, "x"])],
                ["--seconds", dice.choice(["0", "-5", "9" * 9, "5 s"])],
            )
            return [dice.choice(["generate", "render"]), "--prompt", "a red ball, bell", *dice.choice(number), *out]
        case 2:
            model = dice.choice([*PATHS, str(folder), "teachers"])
            return ["generate", "--prompt", "a red ball, bell", "--model", model, *out]
        case 3:
            return ["render", "--prompt", wrong, "--out", dice.choice(PATHS)]
        case 4:
            return ["inspect", dice.choice([*PATHS, str(folder), "teachers", "../data/teacher"])]
    return ["reproduce", "--profile", "smoke", "--out", str(folder / "run"), *wrong_parameter(dice)]


def wrong_parameter(dice: Random) -> list[str]:
    """Give an option of `reproduce` that must stop it before anything runs."""
    names = ["sed", "../seed", "seed.x", "__class__", "se ed", "", "seed seed", "out_dir", "profile", "ſeed"]
    values = ["-1", "1e9", "9" * 30, "1" * 5000, "nan", "", "[" * 5000, "(" * 300 + ")" * 300, "{'a': 1}", "1j", "True"]
    match dice.randrange(4):
        case 0:
            return ["-p", f"{dice.choice(names)}={dice.choice(values)}"]
        case 1:
            return ["-p", "seed=" + dice.choice(values)]
        case 2:
            return ["--only", dice.choice(["../01", "9", "01/..", "\0", "x" * 9999, "01,99", "*"])]
    return ["-p", "teacher=" + dice.choice(["../nowhere.safetensors", "a\0b", "/nowhere", "x" * 5000])]


def stream_state(dice: Random, whole: bytes) -> bytes:
    """Break a stored stream: its file as any safetensors file, what it says, or the numbers in it."""
    if dice.random() < 0.4:
        return dice.choice(CHECKPOINT_ATTACKS[:-3])(dice, whole)
    header, data = parts_of(whole)
    said = json.loads(header["__metadata__"]["stream"])
    match dice.randrange(5):
        case 0:
            said.pop(dice.choice([*said]))
        case 1:
            said[dice.choice([*said])] = dice.choice(ODD_VALUES)
        case 2:
            said = dice.choice([*ODD_VALUES])
        case 3:
            header["__metadata__"] = dice.choice([{}, {"stream": "{"}, {"stream": ""}, {"steam": "{}"}])
            return file_of(header, data)
        case 4:
            header.pop(dice.choice([name for name in header if name != "__metadata__"]))
    header["__metadata__"]["stream"] = json.dumps(said)
    return file_of(header, data)
