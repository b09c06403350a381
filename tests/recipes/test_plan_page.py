"""A page of a plan shows what the plan says, in pictures that are drawn to scale, and nothing that it does not say."""

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from minga.config.hardware import Device, Machine, machine
from minga.errors import UserError
from minga.planner.estimate import Fact
from minga.planner.inverse import best_plan
from minga.planner.memory import GREEN
from minga.planner.plan import Ask, Plan, Section, plan
from minga.planner.table import cells
from minga.recipes.drawing import WIDTH, LogScale, log_ticks
from minga.recipes.plan_page import write_plan_page

CPU = Machine(
    Device("two cores", "cpu", {"float32": 2e11}, memory=8e9, bandwidth=5e10, per_node=1, achievable={"float32": 1.0})
)
VOID = {"meta", "br", "wbr"}


@pytest.fixture(scope="module")
def v3_plan() -> Plan:
    return plan("v3", "512xH800", tokens=1e12, precision="fp8", peers=20)


@pytest.fixture(scope="module")
def chosen_plan() -> Plan:
    return best_plan(machine("8xH100"), Ask(), hours=24.0)


def page_of(made: Plan, folder) -> str:
    return write_plan_page(made, folder / "plan.html").read_text(encoding="utf-8")


def figures(page: str) -> dict[str, str]:
    """Of each figure, by its title, the HTML."""
    found = re.findall(r"<figure><figcaption>([^<]*)(.*?)</figure>", page, re.DOTALL)
    return {unescape(title): body for title, body in found}


def points(figure: str) -> list[tuple[float, float, float, str]]:
    """Across, down, radius and words of each point."""
    found = re.findall(r'<circle class="\w+" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"><title>([^<]*)', figure)
    return [(float(x), float(y), float(r), said) for x, y, r, said in found]


class Parser(HTMLParser):
    """Every element that is opened is closed, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))


def parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_loads_nothing(v3_plan, chosen_plan, tmp_path):
    for made in (v3_plan, chosen_plan, plan("tiny", CPU), plan("tiny", CPU, tokens=1e6)):
        page = page_of(made, tmp_path)
        parser = parsed(page)
        names = {tag for tag, _ in parser.tags}
        assert not names & {"script", "img", "link", "iframe"}
        assert not {"src", "href", "srcset"} & {name for _, attributes in parser.tags for name in attributes}
        assert not re.search(r"url\(|@import|NaN|>inf|e\+\d\d %", page)
        drawings = [attributes for tag, attributes in parser.tags if tag == "svg"]
        assert drawings and all(each["role"] == "img" and len(each["aria-label"] or "") > 20 for each in drawings)


def test_every_number_of_the_plan_is_there_with_its_derivation(v3_plan, tmp_path):
    page = page_of(v3_plan, tmp_path)
    text = unescape(page.replace("<wbr>", ""))
    for fact in v3_plan.facts:
        assert f"<code>{fact.name}</code>" in text
        value, spread = cells(fact)
        assert value in text and spread in text and fact.formula in text and fact.source in text
        assert all(f"<li>{name} = " in text for name in fact.inputs)
    for note in v3_plan.notes:
        assert f"<li>{note}</li>" in text


def test_headline_numbers(v3_plan, tmp_path):
    tiles = {}
    for value, small, name in re.findall(
        r"<dd>([^<]*)(?:<small>([^<]*)</small>)?</dd><dt>([^<]*)", page_of(v3_plan, tmp_path)
    ):
        tiles[name] = (value, small)
    assert tiles["parameters"] == ("671 B", "")
    assert tiles["active for a token"] == ("37.6 B", "")
    assert tiles["tokens to train on"] == ("1 T", "")
    facts = {fact.name: fact for fact in v3_plan.facts}
    assert tiles["time to train"] == cells(facts["train.days"])
    assert tiles["rent of the run"] == cells(facts["money.final_run"])
    assert tiles["tokens/s read in training"] == cells(replace(facts["train.tokens_per_second"], unit=""))
    value, small = tiles["memory of a device in training"]
    assert value == cells(facts["memory.device_bytes"])[0] and small.endswith(v3_plan.value("memory.verdict"))


def test_memory_is_drawn_to_the_scale_of_the_device(v3_plan, tmp_path):
    figure = figures(page_of(v3_plan, tmp_path))["Memory of a device in training"]
    bars = [
        (float(x), float(w)) for x, w in re.findall(r'<rect class="c\d" x="([\d.]+)" y="\d+" width="([\d.]+)"', figure)
    ]
    available = v3_plan.machine.device.memory
    assert all(a[0] < b[0] for a, b in pairwise(bars))
    assert bars[-1][0] + bars[-1][1] == pytest.approx(WIDTH * v3_plan.memory.total / available, abs=2)
    marks = [float(x) for x in re.findall(r'<line class="mark" x1="([\d.]+)"', figure)]
    assert marks == pytest.approx([WIDTH * GREEN, WIDTH])


def test_what_is_too_much_runs_over_the_mark(v3_plan, tmp_path):
    memory = replace(v3_plan.memory, activations=2 * v3_plan.machine.device.memory)
    figure = figures(page_of(replace(v3_plan, memory=memory), tmp_path))["Memory of a device in training"]
    marks = [float(x) for x in re.findall(r'<line class="mark" x1="([\d.]+)"', figure)]
    assert marks[1] == pytest.approx(WIDTH * v3_plan.machine.device.memory / memory.total, abs=0.1)
    assert "red" in figure


def test_parts_of_a_step_fill_the_bar(v3_plan, tmp_path):
    figure = next(
        body for title, body in figures(page_of(v3_plan, tmp_path)).items() if title.startswith("Time of a step")
    )
    widths = [float(width) + 1 for width in re.findall(r'<rect class="c\d"[^>]* width="([\d.]+)"', figure)]
    assert sum(widths) == pytest.approx(WIDTH, abs=0.1 * len(widths) + 3)
    fact = next(fact for fact in v3_plan.facts if fact.name == "train.step_seconds")
    assert len(widths) == sum(value > 0 for name, value in fact.inputs.items() if name != "tokens")


def test_more_devices_take_less_time_and_those_that_cannot_are_said(v3_plan, tmp_path):
    figure = figures(page_of(v3_plan, tmp_path))["Rent (USD) against time (days)"]
    found = points(figure)
    devices = [int(said.split(" ")[0].replace(",", "")) for *_, said in found]
    assert sorted(devices) == [256, 512, 1024, 2048] and devices[-1] == 512  # the plan's own is drawn last, above all
    by_devices = sorted(zip(devices, found, strict=True))
    assert all(a[1][0] > b[1][0] for a, b in pairwise(by_devices))
    assert "Left out: 128 (no set-up of 128 H800" in figure
    assert figure.count('<path class="reach') == 2 * len(found)
    own = found[-1][3]
    assert cells(next(fact for fact in v3_plan.facts if fact.name == "train.days"))[0] in own


def test_without_a_price_hours_are_drawn(tmp_path):
    free = plan("v2-lite", "8xH100", tokens=1e9, price=0.0)
    assert "Device-hours against time (hours)" in figures(page_of(free, tmp_path))


def test_more_users_get_less_each_and_more_in_all(v3_plan, tmp_path):
    figure = figures(page_of(v3_plan, tmp_path))["Tokens/s of the machine against those of one user"]
    by_batch = sorted((int(said.split(" ")[0].replace(",", "")), x, y) for x, y, _, said in points(figure))
    assert by_batch[0][0] == 1 and v3_plan.value("serve.batch") in [batch for batch, *_ in by_batch]
    assert all(a[1] >= b[1] and a[2] >= b[2] for a, b in pairwise(by_batch))
    assert figure.count('<circle class="held"') == 1


def test_the_models_that_were_near(chosen_plan, tmp_path):
    page = page_of(chosen_plan, tmp_path)
    figure = figures(page)["Loss (nats a token) against time (hours)"]
    found = sorted(points(figure))
    assert len(found) == len(chosen_plan.front)
    assert all(a[1] < b[1] for a, b in pairwise(found))  # later is lower
    (own,) = re.findall(r'<circle class="held".*?<title>([^<]*)', figure)
    facts = {fact.name: fact for fact in chosen_plan.facts}
    days, loss = cells(facts["train.days"])[0], f"{facts['scaling.loss'].value.typical:.3f}"
    assert (
        own
        == f"{cells(facts['params.active'])[0]} active, {cells(facts['train.tokens'])[0]} tokens: {days}, loss {loss}"
    )
    assert "also worth it" not in page  # the picture says it


def test_what_a_plan_lacks_is_left_out(v3_plan, tmp_path):
    serving = page_of(plan("v3", "8xH200"), tmp_path)
    assert list(figures(serving)) == [
        "Memory of a device in serving",
        "Tokens/s of the machine against those of one user",
    ]
    assert "<h2>Training</h2>" not in serving and "time to train" not in serving
    at_home = figures(page_of(plan("tiny", CPU, tokens=1e6), tmp_path))
    assert not [title for title in at_home if "against time" in title]  # nobody has four of their laptop
    assert "hopeless" in page_of(v3_plan, tmp_path) and "hopeless" not in serving
    empty = page_of(Plan("nothing", v3_plan.model, v3_plan.machine, ()), tmp_path)
    assert not re.search("<h2|<figure|<table|<dd", empty)
    parsed(empty)


def test_hostile_text_is_escaped(v3_plan, tmp_path):
    evil = '</p><script>alert("x")</script><img src=x onerror=alert(1)>'
    fact = Fact(evil, evil, evil, evil, evil, {evil: evil}, evil)
    section = Section(evil, (fact,), (evil,))
    made = replace(v3_plan, title=evil, notes=(evil,), sections=(section, *v3_plan.sections))
    page = page_of(made, tmp_path)
    parser = parsed(page)
    assert not {tag for tag, _ in parser.tags} & {"script", "img"}
    assert not [name for _, attributes in parser.tags for name in attributes if name.startswith("on")]
    assert "<h1>&lt;/p&gt;&lt;script&gt;" in page


def test_a_failed_write_keeps_the_old_page_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "plan.html").write_text("old", encoding="utf-8")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_plan_page(plan("tiny", CPU), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.parametrize("name", ["none/plan.html", "", "."])
def test_where_no_page_can_be_written(tmp_path, name):
    with pytest.raises(UserError, match="cannot write") as caught:
        write_plan_page(plan("tiny", CPU), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_numbers_of_a_logarithmic_axis():
    scale = LogScale(1, 100, 0, 200)
    assert [scale(value) for value in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert log_ticks(3, 250) == [5, 10, 20, 50, 100, 200]
    assert log_ticks(3, 25000) == [10, 100, 1000, 10000]
    assert log_ticks(2.1, 2.9) == pytest.approx([2.2, 2.4, 2.6, 2.8])
