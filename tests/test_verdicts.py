"""Verdicts do not lean: planted numbers on every side of every limit, and on none."""

import math

import pytest

from omniforcing_lib import files
from series import claims, profiles, report, verdicts
from series.verdicts import at_least, at_most, verdict

RATIO, FACTOR, GAIN = at_most(1.09), at_least(34.6, nothing=1), at_least(0)


@pytest.mark.parametrize(
    ("value", "interval", "limit", "says"),
    [
        (0.6, (0.3, 1.08), RATIO, verdicts.REPRODUCED),
        (0.5, (0.2, 1.24), RATIO, verdicts.NOT_SEPARATED),  # its mean is far inside
        (1.0, (0.9, 1.09), RATIO, verdicts.NOT_SEPARATED),
        (2.0, (1.1, 4.0), RATIO, verdicts.CONTRADICTED),
        (40, (35, 50), FACTOR, verdicts.REPRODUCED),
        (20, (18, 22), FACTOR, verdicts.DIRECTION),  # more than half of the paper's factor
        (36, (30, 44), FACTOR, verdicts.DIRECTION),
        (1.1, (0.9, 1.3), FACTOR, verdicts.NOT_SEEN),
        (0.5, (0.4, 0.6), FACTOR, verdicts.CONTRADICTED),
        (20, (0.5, 90), FACTOR, verdicts.NOT_SEPARATED),
        (3.0, (2.3, 3.7), GAIN, verdicts.REPRODUCED),
        (0.01, (0, 0.03), GAIN, verdicts.NOT_SEPARATED),  # zero is in it
        (-1, (-2, -0.1), GAIN, verdicts.CONTRADICTED),
    ],
)
def test_the_whole_interval_decides_and_the_mean_never(value, interval, limit, says):
    assert verdict(value, interval, limit) == says
    other = {"higher": at_most, "lower": at_least}[limit.better](-limit.edge, nothing=-limit.nothing)
    assert verdict(-value, tuple(-edge for edge in reversed(interval)), other) == says
    assert verdict(-1e9, interval, limit) == verdict(1e9, interval, limit) == says


@pytest.mark.parametrize("interval", [None, (1.0, 1.0), (math.nan, math.nan), (0.2, math.nan)])
def test_one_seed_and_a_ceiling_have_no_power(interval):
    assert verdict(1.0, interval, RATIO) == verdict(1.0, interval, FACTOR) == verdicts.NO_POWER
    assert verdict(1.0, (0.98, 1.0), at_least(0.9, power=False)) == verdicts.NO_POWER


def test_a_count_needs_no_interval():
    faster = at_least(34.6, nothing=1, exact=True)
    found = [verdict(x, None, faster) for x in (34.6, 43, 21, 17.3, 1, 0.5, math.nan)]
    direction = verdicts.DIRECTION
    assert found[:2] == [verdicts.REPRODUCED] * 2 and found[2:4] == [direction] * 2
    assert found[4:] == [verdicts.NOT_SEEN, verdicts.CONTRADICTED, verdicts.NO_POWER]


def test_a_limit_that_nothing_passes_by_itself_is_refused():
    for made in (lambda: at_least(1, nothing=2), lambda: at_most(2, nothing=1)):
        with pytest.raises(ValueError, match=r"found nothing=\d"):
            made()


def test_a_claim_that_holds_in_part_says_which():
    yes, no, blind = verdicts.REPRODUCED, verdicts.CONTRADICTED, verdicts.NO_POWER
    assert verdicts.whole({"near": yes, "as varied": no}) == f"partly: {yes}: near; {no}: as varied"
    assert verdicts.whole({"colour": blind, "timbre": yes}) == f"partly: {yes}: timbre; {blind}: colour"
    assert verdicts.whole({"two": verdicts.DIRECTION}) == "partly: the direction only"
    assert verdicts.whole({"a": yes, "b": yes}) == yes and verdicts.whole({"a": blind, "b": blind}) == blind


def test_without_a_part_that_holds_the_weightiest_no_stands():
    order = [verdicts.CONTRADICTED, verdicts.NOT_SEEN, verdicts.NOT_SEPARATED, verdicts.NO_POWER]
    assert [verdicts.whole({str(i): v for i, v in enumerate(order[at:])}) for at in range(4)] == order
    with pytest.raises(ValueError, match="one number or more"):
        verdicts.whole({})


def test_seeds_give_students_interval_and_one_seed_gives_none():
    mean, (low, high) = verdicts.over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and high - 2 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4) == 2 - low
    assert verdicts.over_seeds([0.3]) == (0.3, None)


def test_more_comparisons_make_every_interval_wider():
    values = [1.0, 2.0, 4.0, 3.0]
    mean, (low, high) = verdicts.over_seeds(values, comparisons=9)
    assert mean == 2.5 and high - mean == pytest.approx(mean - low) == pytest.approx(7.18487 * 0.645497, rel=1e-4)


@pytest.fixture
def run(tmp_path):
    return report.Run("04", profiles.from_name("smoke"), seed=0, device="cpu", teacher="", folder=tmp_path)


def test_a_run_answers_by_the_intervals_it_recorded(run):
    run.metric("ratio", 0.469, interval=(0.2, 1.24))
    run.metric("one seed", 0.469, interval=None)
    run.metric("broke", math.nan, interval=(math.nan, math.nan))
    run.claim(1, {"ratio": RATIO, "one seed": RATIO}, note="54 clips")
    run.claim(2, {"broke": RATIO})
    run.claim(14, verdicts.NOT_TRIED, also=["ratio"])
    rows = claims.claim_rows({"04": run.metrics})
    says = [verdicts.NOT_SEPARATED, verdicts.NO_POWER, verdicts.NOT_TRIED]
    assert [rows[i]["status"] for i in (0, 1, 13)] == says
    assert rows[0]["ours"] == "ratio: 0.469 [0.2, 1.24] (limit ≤ 1.09); one seed: 0.469 (limit ≤ 1.09); 54 clips"


def test_a_verdict_cannot_be_typed(run):
    run.metric("ratio", 0.469, interval=(0.2, 1.24))
    for typed in (verdicts.REPRODUCED, "reproduced", verdicts.CONTRADICTED):
        with pytest.raises(ValueError, match=r"claim 1 is judged by limits"):
            run.claim(1, typed, also=["ratio"])
    with pytest.raises(ValueError, match="numbered 1 to 14, found 15"):
        run.claim(15, {"ratio": RATIO})
    assert "claim 01" not in run.metrics


def test_a_short_run_is_read_beside_the_stored_long_one(run, tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report.Run, "table", lambda self, rows: tables.append(rows))
    stored = report.Run(
        "04", profiles.from_name("smoke"), seed=0, device="cpu", teacher="", folder=tmp_path / "reports"
    )
    stored.metric("ratio", 0.469, interval=(0.2, 1.24))
    files.write_json(tmp_path / "reports" / "metrics" / "cpu" / "04.json", stored.metrics)
    record = {"notebook": "04", "git": {"commit": "1234567"}, "files": {"student.safetensors": "ab"}}
    files.write_json(tmp_path / "reports" / "run" / "cpu" / "04.json", record)
    files.write_text(tmp_path / "data" / "SHA256SUMS", "ab  student.safetensors\n")
    run.metric("ratio", 3.5, "x")
    run.metric("new", 2)
    run.check("clocks agree", True)
    run.claim(1, {"ratio": RATIO})
    run.summary(["new"])
    judged = {"limit": "≤ 1.09", "says": verdicts.NO_POWER}
    beside = {"measure": "ratio", "value": "3.5 x", "profile cpu": "0.469 [0.2, 1.24]"} | judged
    other = {"measure": "new", "value": "2", "profile cpu": "—", "limit": "", "says": ""}
    assert tables == [[beside, other]]
    files.write_text(tmp_path / "data" / "SHA256SUMS", "cd  student.safetensors\n")
    run.summary()
    assert [*tables[1][0]][-1] == "profile cpu; another student.safetensors than data/ has"
    run.profile = profiles.from_name("cpu")
    run.judged.clear()
    run.summary(["new"])
    assert tables[2:] == [[{"measure": "new", "value": "2"}]]


def test_an_interval_that_holds_the_value_is_no_result(run, monkeypatch):
    tables = []
    monkeypatch.setattr(report.Run, "table", lambda self, rows: tables.extend(rows))
    run.metric("more", 1.2, interval=(1.1, 1.3))
    run.metric("less", 0.8, interval=(0.7, 0.9))
    run.metric("all alike", 1.0, interval=(1.0, 1.0))
    run.metric("one seed", 1.2)
    run.compare("ratio", [*run.metrics], to=1)
    assert [row["its interval"] for row in tables] == ["above 1", "below 1", "holds 1", "no interval"]
