"""The report says what the run wrote: right values, right curves, nothing unescaped, and no mood about torn files."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from minga.errors import UserError
from minga.recipes.report import MAX_POINTS, write_report

START = {
    "kind": "start",
    "time": 1.0,
    "config": {"steps": 40, "data": "data/<b>", "model": {"vocab_size": 4096, "rope": {"theta": 10000.0}}},
    "parameters": {"total": 12_300_000, "active": 4_560_000},
    "machine": {"cpu": "Ryzen & Sons", "cores": 8},
}


def step_line(step: int, **changes):
    line = {
        "kind": "step",
        "step": step,
        "loss": 8.0 - 0.1 * step,
        "tokens": step * 4096,
        "tokens_per_second": 1000.0 + step,
        "seconds": 3.0 * step,
        "expert_max_over_mean": 1.5,
    }
    return line | changes


def eval_line(step: int, bits: float, acceptance: float | None = None):
    return {"kind": "eval", "step": step, "val_loss": 2 * bits, "bits_per_byte": bits, "mtp_acceptance": acceptance}


def write_run(folder: Path, lines, tail: str = "") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "run.jsonl").write_text(text, encoding="utf-8")
    return folder


def report_of(folder: Path, lines, tail: str = "") -> str:
    return write_report(write_run(folder, lines, tail)).read_text(encoding="utf-8")


def curves(page: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every polyline of a class, in the order of the page."""
    found = re.findall(rf'<polyline class="curve {kind}" points="([^"]*)"', page)
    return [[tuple(map(float, point.split(","))) for point in points.split()] for points in found]


def tile(page: str, name: str) -> str:
    match = re.search(rf"<dd>([^<]*)</dd><dt>{re.escape(name)}</dt>", page)
    assert match, f"no tile {name!r}"
    return match[1]


def full_run():
    load = [[1.0, 0.5, 2.0, 0.5], [4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    lines = [START, *(step_line(n, expert_load=load if n % 10 == 0 else None) for n in range(1, 41))]
    lines += [eval_line(20, 2.75, 0.5), eval_line(40, 1.8766, 0.714)]
    lines += [{"kind": "sample", "step": 40, "prompt": "To be", "text": "To be, or not"}]
    return [*lines, {"kind": "end", "reason": "done", "seconds": 3725.0}]


def test_headline_numbers(tmp_path):
    page = report_of(tmp_path, full_run())
    assert tile(page, "parameters") == "12.3 M"
    assert tile(page, "active for a token") == "4.56 M"
    assert tile(page, "bits per byte, held-out") == "1.877"
    assert tile(page, "loss, held-out") == "3.753"
    assert tile(page, "steps") == "40"
    assert tile(page, "tokens") == "163,840"
    assert tile(page, "tokens a second") == "1,021"  # the median of 1001 ... 1040
    assert tile(page, "time") == "1 h 2 min"
    assert tile(page, "MTP acceptance") == "71 %"
    assert '<p class="outcome">finished</p>' in page


def test_curves_hold_one_point_a_line_and_fall(tmp_path):
    page = report_of(tmp_path, full_run())
    raw, _ = curves(page, "raw")  # of the loss, then of the speed
    assert len(raw) == 40
    assert [x for x, _ in raw] == sorted(x for x, _ in raw)
    assert all(a[1] < b[1] for a, b in pairwise(raw))  # loss falls, so SVG's y grows
    assert [len(points) for points in curves(page, "held")] == [2, 2, 2]  # loss, bits per byte, MTP acceptance
    assert "step 40: 1.8766</title>" in page
    smoothed, imbalance, speed = curves(page, "train")
    assert len(smoothed) == len(imbalance) == len(speed) == 40
    assert smoothed[20][1] == pytest.approx(raw[20][1], abs=0.1)  # the mean of a straight line lies on it
    assert len({y for _, y in imbalance}) == 1


def test_points_lie_where_the_axis_says(tmp_path):
    page = report_of(tmp_path, [START, *(step_line(n, loss=float(n)) for n in range(1, 11))])
    raw = curves(page, "raw")[0]
    figure = page[: page.index('<polyline class="curve raw"')]
    labels = re.findall(r'<text x="38" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', figure)
    ticks = {float(value): float(y) - 4 for y, value in labels}
    assert len(ticks) >= 3
    for value, y in ticks.items():
        if value in range(1, 11):
            assert raw[int(value) - 1][1] == pytest.approx(y, abs=0.11)


def test_heat_map_has_a_cell_for_each_expert(tmp_path):
    page = report_of(tmp_path, full_run())
    cells = re.findall(r'class="load (hot|cold)"[^>]*fill-opacity="([\d.]+)"><title>([^<]*)</title>', page)
    assert len(cells) == 12
    assert cells[2] == ("hot", "1.00", "layer 1, expert 3: 2.00")
    assert cells[4] == ("hot", "1.00", "layer 2, expert 1: 4.00")
    assert cells[5][:2] == ("cold", "1.00")
    assert [opacity for _, opacity, _ in cells[8:]] == ["0.00"] * 4  # an even layer is calm


def test_hostile_text_is_escaped(tmp_path):
    evil = '</p><script>alert("x")</script><img src=x onerror=alert(1)>'
    lines = [
        START | {"machine": {evil: evil}, "config": {evil: [evil]}},
        step_line(1),
        {"kind": "sample", "step": evil, "prompt": evil, "text": evil + "&amp;<b>bold</b>"},
        {"kind": "end", "reason": evil},
    ]
    folder = tmp_path / "<i>run"
    folder.mkdir()
    page = report_of(folder, lines)
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    names = {tag for tag, _ in tags}
    assert not names & {"script", "img", "i", "link", "iframe"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page
    assert "&amp;amp;&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<h1>&lt;i&gt;run</h1>" in page


def test_page_loads_nothing_from_elsewhere(tmp_path):
    page = report_of(tmp_path, full_run())
    assert not re.search(r"\b(src|href)=|url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page


def test_torn_last_line_is_left_out(tmp_path):
    page = report_of(tmp_path, [START, step_line(1), step_line(2)], tail='{"kind": "step", "step": 3, "lo')
    assert len(curves(page, "raw")[0]) == 2
    assert tile(page, "steps") == "2"
    assert "still training, or interrupted" in page


def test_torn_in_the_middle_of_a_character(tmp_path):
    write_run(tmp_path, [START, step_line(1)])
    with open(tmp_path / "run.jsonl", "ab") as file:
        file.write(b'{"kind": "sample", "text": "caf\xc3')
    assert tile(write_report(tmp_path).read_text(encoding="utf-8"), "steps") == "1"


def test_resumed_run_counts_each_step_once(tmp_path):
    lines = [START, *(step_line(n) for n in range(1, 31)), {"kind": "end", "reason": "stopped", "seconds": 90}]
    lines += [START, *(step_line(n) for n in range(21, 41))]
    page = report_of(tmp_path, lines)
    assert len(curves(page, "raw")[0]) == 40
    assert "still training" in page  # the first end was not the last word


def test_values_that_cannot_be_drawn_are_skipped(tmp_path):
    bad = [step_line(2, loss=math.nan), step_line(3, loss=math.inf), step_line(4, loss=None), step_line(5, loss="x")]
    page = report_of(tmp_path, [step_line(1), *bad, step_line(6, loss=10**400), step_line(7)], tail="[" * 99_999)
    assert len(curves(page, "raw")[0]) == 2
    assert "nan" not in page and "inf," not in page


def test_line_ends_of_unicode_do_not_end_a_line(tmp_path):
    line = json.dumps({"kind": "sample", "step": 1, "text": "one\u2028two\x85three"}, ensure_ascii=False)
    page = report_of(tmp_path, [START], tail=line + "\n")
    assert "one\u2028two\x85three</p>" in page


@pytest.mark.parametrize(
    ("lines", "present", "absent"),
    [
        ([START], "Settings", "Learning"),
        ([step_line(1)], "Learning", "Samples"),
        ([eval_line(5, 2.0)], "Bits per byte", "MTP acceptance"),
        ([{"kind": "sample", "prompt": None, "text": None}], "Samples", "Experts"),
        ([{"kind": "end", "reason": "stopped"}], "stopped before its end", "Learning"),
        ([{"kind": "news", "of": "a later version"}, {}], "Minga", "Learning"),
        ([step_line(1, expert_load=[[], "x"]), START | {"config": None, "machine": "a shed"}], "a shed", "Settings"),
    ],
)
def test_missing_kinds_leave_out_their_section(tmp_path, lines, present, absent):
    page = report_of(tmp_path, lines)
    assert present in page
    assert absent not in page


def test_a_single_point_and_a_flat_curve_are_drawn(tmp_path):
    page = report_of(tmp_path, [step_line(7, loss=0.0)])
    assert len(curves(page, "raw")[0]) == 1
    page = report_of(tmp_path, [step_line(n, loss=2.5) for n in range(1, 4)])
    assert len({y for _, y in curves(page, "raw")[0]}) == 1


def test_long_runs_are_thinned_to_means(tmp_path):
    lines = [step_line(n, loss=5.0 + (-1) ** n, expert_max_over_mean=None) for n in range(1, 2 * MAX_POINTS + 1)]
    raw = curves(report_of(tmp_path, lines), "raw")[0]
    assert len(raw) == MAX_POINTS
    assert len({y for _, y in raw}) == 1  # each bucket of two averages 6 and 4


def test_settings_and_machine_tables(tmp_path):
    page = report_of(tmp_path, full_run())
    rows = dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td></tr>', page))
    assert rows["model.vocab_size"] == "4096"
    assert rows["model.rope.theta"] == "10000.0"
    assert rows["data"] == "data/&lt;b&gt;"
    assert rows["cpu"] == "Ryzen &amp; Sons"


def test_prompt_is_not_said_twice(tmp_path):
    assert "<b>To be</b>, or not</p>" in report_of(tmp_path, full_run())


def test_a_prompt_that_is_only_a_line_end_is_not_shown(tmp_path):
    page = report_of(tmp_path, [{"kind": "sample", "step": 1, "prompt": "\n", "text": "\n\nExeunt."}])
    assert "<p>Exeunt.</p>" in page


def test_missing_and_empty_runs_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"run\.jsonl is not there"):
        write_report(tmp_path)
    (tmp_path / "run.jsonl").write_text('\n{"kind": "st', encoding="utf-8")
    with pytest.raises(UserError, match="holds no line of a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_failed_write_keeps_the_old_report_and_leaves_nothing(tmp_path, monkeypatch):
    write_run(tmp_path, full_run())
    (tmp_path / "report.html").write_text("old", encoding="utf-8")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.jsonl"]


def test_a_new_report_replaces_the_old(tmp_path):
    first = write_report(write_run(tmp_path, [step_line(1)]))
    second = write_report(write_run(tmp_path, [step_line(2)]))
    assert first == second == tmp_path / "report.html"
    assert tile(second.read_text(encoding="utf-8"), "steps") == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.jsonl"]


def test_curves_of_what_one_watches(tmp_path):
    watched = {"train_bits_per_byte": 2.0, "mfu": 0.41, "lr": 0.02, "grad_norm": 1.0, "memory": 1.5e9}
    lines = [START, *(step_line(n, **watched | {"grad_norm": 9.0 if n == 7 else 1.0}) for n in range(1, 11))]
    page = report_of(tmp_path, [*lines, {"kind": "skip", "step": 7, "reason": "leapt"}])
    for title in ("Bits per byte", "Gradient norm", "Learning rate", "MFU"):
        assert title in page
    assert tile(page, "MFU") == "41 %"
    assert tile(page, "memory") == "1.5 GB"
    assert re.findall(r'<circle class="dots".*?<title>([^<]*)</title>', page) == ["skipped steps, step 7: 9.0000"]


def test_a_skip_before_the_checkpoint_that_a_run_went_on_from_counts_and_a_later_one_is_forgotten(tmp_path):
    steps = [step_line(n, grad_norm=1.0) for n in range(1, 11)]
    skips = [{"kind": "skip", "step": step} for step in (3, 8)]
    page = report_of(tmp_path, [START, *steps, *skips, *steps[5:], {"kind": "skip", "step": 6}])
    assert re.findall(r"skipped steps, step (\d+)", page) == ["3", "6"]


def test_heat_map_over_time_has_a_band_a_layer_and_shades(tmp_path):
    loads = [[[1.0, 2.0], [1.0, 1.0]], [[1.0, 0.5], [1.0, 1.0]], [[1.0, 1.0], [1.4, 0.7]]]
    page = report_of(tmp_path, [START, *(step_line(10 * n + 10, expert_load=load) for n, load in enumerate(loads))])
    paths = {
        (kind, float(shade)): d.count("M")
        for kind, shade, d in re.findall(r'<path class="(hot|cold)" fill-opacity="([\d.]+)" d="([^"]*)"', page)
    }
    assert paths == {("hot", 1.0): 1, ("cold", 1.0): 1, ("hot", 0.4): 1, ("cold", 0.6): 1}
    one = report_of(tmp_path, [START, step_line(10, expert_load=loads[0])])
    assert "over time" not in one  # nothing to compare


def test_a_report_of_many_experts_stays_small(tmp_path):
    load = [[0.3 + (e % 5) for e in range(64)] for _ in range(20)]
    page = report_of(tmp_path, [START, *(step_line(n, expert_load=load) for n in range(200))])
    assert len(page) < 1_500_000


def test_the_plan_is_told_with_formula_and_source(tmp_path):
    choice = {"name": "batch_size", "value": 8, "formula": "D^0.383 <b>", "source": "Power Lines"}
    page = report_of(tmp_path, [START | {"plan": {"choices": [choice, "torn"]}}, step_line(1)])
    assert "Why these numbers" in page
    assert "D^0.383 &lt;b&gt;<br><small>Power Lines</small>" in page
    for plan in (None, [], {"choices": None}, {"choices": 3}):
        report_of(tmp_path, [START | {"plan": plan}, step_line(1)])
