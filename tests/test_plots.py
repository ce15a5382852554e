"""Figures say what the numbers say, fit a page, and leave matplotlib alone; widgets show what their twins show."""

import io
from dataclasses import replace
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from omniforcing_lib import masks
from omniforcing_lib.bounce import world
from omniforcing_lib.layout import AV, LAYOUTS, PAPER
from omniforcing_lib.media import wav_bytes
from series import plots, widgets

RNG = np.random.default_rng(0)


class Event(NamedTuple):
    time_s: float


def a_clip(seed=0, seconds=2):
    return world.render(world.scene(seed), seconds=seconds)


def some_masks(layout, latents=7):
    return {name: mask.numpy() for name, mask in masks.dense(layout, latents, 16).items()}


def leaky():
    matrix = np.triu(RNG.random((4, 4)))
    matrix[2, 0] = 1e-4
    return matrix


def some_motions(count):
    angle = RNG.uniform(0, 2 * np.pi, count)
    return np.stack([*RNG.uniform(8, 56, (2, count)), 60 * np.cos(angle), 60 * np.sin(angle)], axis=1)


FIGURES = {
    "rulers": lambda: plots.rulers(LAYOUTS, 4),
    "overview": lambda: plots.overview(PAPER),
    "strip": lambda: plots.strip(a_clip(), [Event(0.4)], [Event(0.41), Event(1.2)], title="a red ball, bell"),
    "contact_sheet": lambda: plots.contact_sheet([a_clip(i) for i in range(6)], [f"clip {i}" for i in range(6)]),
    "mask_grid": lambda: plots.mask_grid(some_masks(PAPER), PAPER, 7, 16, block=1),
    "leak_heatmap": lambda: plots.leak_heatmap({"video → audio": leaky(), "audio → video": np.triu(leaky())}),
    "curves": lambda: plots.curves({"student": ([1, 2], [3, 4], ([2, 3], [4, 5]))}, xlabel="s", ylabel="F1", log="y"),
    "bars_with_ci": lambda: plots.bars_with_ci({"F1": {"teacher": (0.8, 0.7, 0.9), "student": (0.7, 0.6, 0.8)}}),
    "by_sinks": lambda: plots.by_sinks({"norm": {"ours": ([0, 4, 16], [np.nan, 40, 9])}}, log=True),
    "phase": lambda: plots.phase(
        {row: {"logits x 1, rate 0.1": 2.0, "logits x 8, rate 0.1": np.inf} for row in ("0 sinks", "no QK-norm")},
        {
            row: dict.fromkeys(("logits x 1, rate 0.1", "logits x 8, rate 0.1"), "0.7")
            for row in ("0 sinks", "no QK-norm")
        },
    ),
    "error_by_block": lambda: plots.error_by_block({"free-running": AV(RNG.random((8, 5)), RNG.random(5))}),
    "block_times": lambda: plots.block_times({"student": RNG.random(60) * 99 + 300, "teacher": [9000, 9100]}),
    "velocities": lambda: plots.velocities(
        {name: some_motions(192) for name in ("real", "teacher", "Stage 2", "b", "a")}
    ),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_fits_its_page(draw):
    fig = draw()
    data = plots.png(fig)
    width, height = fig.get_size_inches()
    assert Image.open(io.BytesIO(data)).size == (round(width * 100), round(height * 100)) and width <= plots.WIDTH
    assert len(data) <= 60_000
    FigureCanvasAgg(fig).draw()
    drawn = fig.get_tightbbox()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02


def test_every_figure_is_tried():
    assert set(FIGURES) == {name for name, thing in vars(plots).items() if hasattr(thing, "__wrapped__")}


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    FIGURES["curves"]()
    assert dict(mpl.rcParams) == before and not plt.get_fignums()


def test_the_same_arrays_give_the_same_picture():
    assert plots.png(FIGURES["rulers"]()) == plots.png(FIGURES["rulers"]())


def test_streams_sinks_and_teacher_keep_their_colours():
    names = plots.colours(["video loss", "audio loss", "teacher", "16 sinks", "student", "stage 2"])
    assert list(names.values())[:4] == [*plots.STREAM, plots.GREY, plots.SINK]
    assert len(set(names.values())) == 6
    assert len({*plots.colours(["16 sinks", "2 sinks", "0 sinks", "teacher", "teacher, 8 steps"]).values()}) == 5


def test_a_bar_that_is_no_number_has_a_dash():
    axes = plots.bars_with_ci({"frames": {"deaf": (float("nan"),), "hears": (4.0, 3.0, 5.0)}}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["—", "4"] and axes.get_xlim()[1] > 5


def test_a_mask_picture_colours_exactly_what_is_seen():
    layout = replace(PAPER, sinks=4)
    dense = some_masks(layout)
    fig = plots.mask_grid(dense, layout, 7, 16)
    for axes, mask in zip(fig.axes, dense.values(), strict=True):
        picture = axes.images[0].get_array()
        assert np.array_equal((picture < 1).any(axis=2), mask)
    sinks = fig.axes[1].images[0].get_array()[10, :5]
    assert (sinks[:4].argmax(axis=1) == 1).all() and sinks[4].argmax() == 0


def test_a_leak_is_crossed_and_only_a_leak():
    for matrix, crossed in ((leaky(), [(0, 2)]), (np.triu(np.ones((4, 4))), [])):
        crosses = plots.leak_heatmap(matrix).axes[0].lines[-1]
        assert list(zip(*crosses.get_data(), strict=True)) == crossed


def test_a_strip_lays_each_frame_and_click_at_its_time():
    frames = np.repeat(np.arange(48, dtype=np.uint8)[:, None, None, None], 3, 3).repeat(8, 1).repeat(8, 2)
    samples = np.zeros(32000, np.float32)
    samples[24000] = 1
    axes = plots.strip(AV(frames, samples), pictures=8).axes[0]
    for image in axes.images:
        start, stop, *_ = image.get_extent()
        assert abs(image.get_array()[0, 0, 0] / 24 - (start + stop) / 2) <= 1 / 24
    outline = axes.collections[0].get_paths()[0].vertices
    assert outline[outline[:, 1].argmax(), 0] == pytest.approx(1.5, abs=0.01)


def test_rulers_show_every_latent_of_the_table():
    axes = plots.rulers(PAPER, 2).axes[0]
    assert [t.get_text() for t in axes.texts if "block" in t.get_text()] == [
        "block 1: 3",
        "block 1: 25",
        "block 2: 3",
        "block 2: 25",
    ]


def test_what_is_not_finite_is_marked_by_name():
    axes = FIGURES["by_sinks"]().axes[0]
    assert [t.get_text() for t in axes.texts] == ["NaN"] and len(axes.lines[0].get_xdata()) == 2


def test_a_map_crosses_out_broken_runs_and_leaves_what_was_not_run_white():
    norms = {"0 sinks": {"a": 2.0, "b": np.inf}, "16 sinks": {"a": 30.0}}
    notes = {"0 sinks": {"a": "0.9", "b": "nan"}, "16 sinks": {"a": "1.1"}}
    axes = plots.phase(norms, notes).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 0]]]
    assert [t.get_text() for t in axes.texts] == ["2\n0.9", "inf\nnan", "30\n1.1", ""]
    assert np.ma.getmaskarray(axes.images[0].get_array()).tolist() == [[False, True], [False, True]]


def test_velocities_show_every_clip_where_it_goes_on_the_screen():
    """Corners count the directions; down is down: a ball that falls to the right is a dot at the lower right."""
    moves = np.array([[9, 9, 40, 45], [9, 9, 41, 44], [9, 9, -40, 45], [9, 9, -30, -50]], float)
    (axes,) = plots.velocities({"student": moves}).axes
    assert axes.lines[-1].get_xydata().tolist() == moves[:, 2:].tolist()
    middle = axes.transData.transform((0, 0))
    sides = [(t.get_text(), *(axes.transData.transform(t.get_position()) > middle).tolist()) for t in axes.texts]
    assert sides == [("2", True, False), ("0", True, True), ("1", False, False), ("1", False, True)]
    allowed = axes.patches[0]
    assert allowed.get_radii() == (65, 65) and allowed.get_width() == 10 and axes.get_title(loc="left") == "student"


def test_a_bar_without_an_interval_has_its_number_and_no_whisker():
    axes = plots.bars_with_ci({"F1": {"one seed": (0.8,), "many": (0.7, 0.6, 0.8)}}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.8", "0.7"] and [t.xy[0] for t in axes.texts] == [0.8, 0.8]
    drawn = [len(line) == 2 and np.isfinite(line).all() for line in axes.collections[0].get_segments()]
    assert drawn == [False, True]


def test_clips_and_titles_must_match():
    for draw in (plots.contact_sheet, widgets.clip_browser):
        with pytest.raises(ValueError, match="found 1 clips and 2 titles"):
            draw([a_clip()], ["one", "two"])


def test_mask_explorer_shows_the_twin_of_what_is_chosen():
    explorer = widgets.mask_explorer(seconds=2)
    (name, sinks, block), picture = explorer.children[0].children, explorer.children[1]
    first = picture.value
    sinks.value, block.value = 4, 1
    layout = replace(PAPER, sinks=4)
    assert picture.value == plots.png(plots.mask_grid(some_masks(layout), layout, 7, 16, block=1)) != first
    name.value = "released"
    assert sinks.value == 0 and block.value is None and len(block.options) == 3


@pytest.mark.parametrize("ordered", [False, True], ids=["list", "slider"])
def test_clip_browser_shows_and_sounds_the_chosen_clip(ordered):
    clips = [a_clip(0), a_clip(1)]
    choice, picture, sound = widgets.clip_browser(clips, ["a", "b"], ordered=ordered).children
    choice.value = 1
    assert picture.value == plots.png(plots.strip(clips[1], title="b"))
    assert sound.value == wav_bytes(clips[1].audio)
