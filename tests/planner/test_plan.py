"""pytest tests/planner/test_plan.py"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minga
from minga.config.hardware import Device, Machine
from minga.config.presets import laptop, v2_lite, v3
from minga.errors import UserError
from minga.planner import plan as module
from minga.planner.architecture import architecture_of
from minga.planner.estimate import Estimate, Fact
from minga.planner.plan import Ask, Section, lay_out, plan, what_would
from minga.planner.prices import Price

CPU = Machine(
    Device("two cores", "cpu", {"float32": 2e11}, memory=8e9, bandwidth=5e10, per_node=1, achievable={"float32": 1.0})
)


def qwen() -> dict[str, object]:
    """Qwen2.5-32B."""
    return {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8,
    }  # fmt: skip


def test_json_has_no_infinity() -> None:
    made = plan(laptop(), CPU)
    fact = Fact("far.away", Estimate(1.0, 2.0, math.inf))
    document = replace(made, sections=(*made.sections, Section("", (fact,)))).document()
    assert json.loads(json.dumps(document, allow_nan=False))["far"]["away"] == {
        "low": 1.0,
        "typical": 2.0,
        "high": None,
    }


def test_the_document_has_what_other_programs_rely_on() -> None:
    document = minga.plan(v3(), "2048xH800", tokens=14.8e12, precision="fp8").document()
    assert document["params"]["total"] == 671_026_404_352 and document["params"]["active"] == 37_552_282_624
    assert document["kv_bytes_per_token"] == 70_272
    assert document["flops_per_token"] == pytest.approx(260.6e9, rel=1e-3)
    for place in (document["train"]["gpu_hours"], document["energy_kwh"], document["money"]["final_run"]):
        assert place.keys() == {"low", "typical", "high"} and 0 < place["low"] <= place["typical"] <= place["high"]
    parts = document["memory"]
    assert parts["verdict"] in ("green", "amber")
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
    assert sum(parts.get(name, 0) for name in names) == pytest.approx(parts["device_bytes"])
    json.dumps(document, allow_nan=False)


def test_names_configs_and_dictionaries_are_one() -> None:
    ask = Ask(tokens=1e12)
    plans = [
        plan(each, "64xA100", ask=ask) for each in ("v2-lite", v2_lite(), v2_lite().to_hf(), architecture_of(v2_lite()))
    ]
    assert {json.dumps(each.document() | {"title": ""}) for each in plans} == {
        json.dumps(plans[0].document() | {"title": ""})
    }


def test_what_the_api_promises() -> None:
    made = plan(v2_lite(), "64xH100", tokens=1e12)
    assert made.flops == pytest.approx(made.value("flops_per_token") * 1e12)
    assert made.seconds is not None and made.money is not None and made.kwh is not None and made.bytes is not None
    hours = made.value("train.gpu_hours")
    assert made.seconds.typical == pytest.approx(hours.typical * 3600 / 64)
    nothing = plan(v2_lite(), "64xH100")
    assert nothing.flops is nothing.seconds is nothing.money is nothing.kwh is None
    assert nothing.bytes is not None  # what serving takes


def test_every_number_says_where_it_comes_from() -> None:
    made = plan(v3(), "2048xH800", tokens=1e12, precision="fp8", peers=20)
    for fact in made.facts:
        assert fact.formula or fact.source or isinstance(fact.value, str), fact.name
    assert len({fact.name for fact in made.facts}) == len(made.facts)


@settings(deadline=None, max_examples=40)
@given(st.floats(1e9, 1e13), st.floats(1.1, 100))
def test_more_tokens_never_cost_less(tokens: float, factor: float) -> None:
    few, many = (plan(v2_lite(), "8xH100", tokens=count, batch_tokens=2**20) for count in (tokens, tokens * factor))
    for name in ("train.gpu_hours", "train.days", "energy_kwh", "money.final_run"):
        assert few.value(name).typical < many.value(name).typical


def test_money_energy_and_carbon_go_with_what_is_given() -> None:
    plain = plan(v2_lite(), "8xH100", tokens=1e10)
    hours = plain.value("train.gpu_hours")
    given = plan(v2_lite(), "8xH100", tokens=1e10, price=2.0, price_per_kwh=0.5, pue=1.0, country="FRA")
    assert given.money is not None and given.kwh is not None and plain.kwh is not None
    assert given.money.typical == pytest.approx(2 * hours.typical)
    assert given.kwh.typical < plain.kwh.typical
    assert given.value("money.electricity").typical == pytest.approx(0.5 * given.kwh.typical)
    assert given.value("carbon_kg").typical < 0.2 * plain.value("carbon_kg").typical
    whole = plain.value("money.with_development")
    assert whole.low >= 2 * plain.money.low and whole.high == pytest.approx(5.6 * plain.money.high, rel=0.02)  # type: ignore[union-attr]


def test_an_old_price_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Price(Estimate(1, 2, 3), "device-hour", date(2020, 1, 1), ("somewhere",))
    monkeypatch.setattr(module, "rental", lambda device: old)
    assert any("2020-01, older than a year" in note for note in plan(v2_lite(), "H100").notes)
    monkeypatch.setattr(module, "rental", lambda device: replace(old, as_of=date.today()))
    assert not any("older" in note for note in plan(v2_lite(), "H100").notes)


def test_the_watts_of_a_whole_machine_are_taken_as_they_are() -> None:
    made = plan(laptop(), CPU, tokens=1e7, watts=Estimate.exactly(100.0), pue=1.0)
    hours = made.value("train.gpu_hours")
    assert made.kwh is not None and made.kwh.typical == pytest.approx(0.1 * hours.typical)
    assert plan(laptop(), CPU, tokens=1e7).kwh is None  # nothing is known of it, and nothing guessed


def test_a_processor_trains_as_our_own_command_does() -> None:
    setup = lay_out(architecture_of(laptop()), CPU, Ask(tokens=1e7))
    assert (setup.optimizer, setup.precision, setup.fused_loss, setup.seq_len) == ("muon", "float32", True, 1024)
    assert setup.step_tokens <= 1e7 / 200 * 2


def test_lora_and_a_teacher() -> None:
    full, lora = (plan(v2_lite(), "8xH100", tokens=1e9, fixed=fixed) for fixed in ({}, {"lora_rank": 16}))
    taught = plan(v2_lite(), "8xH100", tokens=1e9, teacher=architecture_of(qwen()))
    assert lora.flops < 0.75 * full.flops < taught.flops  # type: ignore[operator]
    assert lora.memory.optimizer < 0.2 * full.memory.optimizer  # type: ignore[union-attr]
    assert taught.memory.weights > full.memory.weights and taught.seconds.typical > 1.5 * full.seconds.typical  # type: ignore[union-attr]
    assert plan(v2_lite(), "8xH100", tokens=1e9, lora_rank=16).document() == lora.document()


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UserError, match=r"holds this model in training \(memory\)\. what would: .*--lora 16.*devices"):
        plan(v3(), "8xH100", tokens=1e12)
    roomy = Machine(replace(CPU.device, memory=64e9))
    assert "LoRA (--lora 16)" in what_would(architecture_of(v2_lite()), roomy, Ask(tokens=1e9))
    assert what_would(architecture_of(v2_lite()), CPU, Ask(tokens=1e9)) == []
    with pytest.raises(UserError, match="cannot be cut"):
        plan(v3(), "2048xH800", tokens=1e12, fixed={"tp": 3})


def test_amber_is_said_with_what_would_make_it_green() -> None:
    made = plan(v2_lite(), "4090", tokens=2e7, fixed={"lora_rank": 16, "stored": "int4"})
    assert made.value("memory.verdict") == "amber"
    assert any(note.startswith("memory is amber") and "fused loss" in note for note in made.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": -1.0}, "tokens is -1.0"),
        ({"tokens": float("nan")}, "tokens is nan"),
        ({"seq_len": 0}, "seq len is 0"),
        ({"utilization": 0.0}, "utilization is 0.0"),
        ({"utilization": 1.5}, "utilization is 1.5"),
        ({"acceptance": 2.0}, "acceptance is 2.0"),
        ({"pue": 0.5}, "pue is 0.5"),
        ({"price": -1.0}, "price is -1.0"),
        ({"country": "Atlantis"}, "no country"),
        ({"peers": 0}, "peers is 0"),
        ({"tokns": 1}, "'tokns' is nothing to ask for"),
        ({"fixed": {"dp": 3}}, "'dp' cannot be fixed"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(v2_lite(), "8xH100", **({"tokens": 1e9} | change))  # type: ignore[arg-type]


def test_a_pool_names_what_its_links_allow() -> None:
    made = plan(v2_lite(), "8xH100", peers=20, up=2.5e6, down=12.5e6)
    lost = [made.value(f"pool.{name}.lost") for name in ("data-parallel", "diloco", "muloco", "sparseloco")]
    assert lost[0] > 0.999 and lost[3] == min(lost)
    sentences = made.sections[-1].lines
    assert any("expert parallelism over 20 Mbit/s is hopeless" in sentence for sentence in sentences)


def test_no_torch_is_needed() -> None:
    """In a process in which torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import minga\n"
        "p = minga.plan('v3', '2048xH800', tokens=1e12, precision='fp8')\n"
        "assert p.money.typical > 0\n"
        "from minga.cli.main import main\n"
        "sys.exit(main(['plan', '--config', 'v3', '--machine', '8xH200', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params"]["total"] == 671_026_404_352
