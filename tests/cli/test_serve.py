"""minga serve --dry-run, and servers that memory does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import minga
from minga.cli.main import main
from minga.config.presets import tiny
from minga.model.transformer import Transformer
from minga.planner.counts import cache_bytes_per_token, count_parameters
from minga.planner.own_memory import SERVE_PROCESS

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `minga serve ...`; returns exit code, stdout and stderr."""

    def ask(*arguments: object) -> tuple[int, str, str]:
        code = main(["serve", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    minga.save(Transformer(tiny()).init_weights(torch.Generator().manual_seed(0)), path)
    return path


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def free(num_bytes: float) -> None:
        monkeypatch.setattr("minga.cli.serve.memory", lambda: (int(num_bytes), int(num_bytes)))

    return free


def test_the_plan_of_a_server(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minga.store.load_stored", lambda *_, **__: pytest.fail("weights were read"))
    code, out, err = ask(folder, "--dry-run")
    assert (code, err) == (0, "")
    for words in ("parameters", "file of weights", "free: green", "for one user who is alone", "of both"):
        assert words in out
    code, out, _ = ask(f"a={folder}", f"b={folder}", "--quant", "int8", "--cache", "int8", "--dry-run", "--json")
    plan = json.loads(out)
    a, b = plan["models"]
    assert (code, a["name"], b["name"]) == (0, "a", "b")
    assert a["params"]["total"] == count_parameters(tiny()).total
    assert a["kv_bytes_per_token"] == cache_bytes_per_token(tiny(), number="int8", mtp=True)
    assert plan["memory"]["runtime"] == SERVE_PROCESS
    assert plan["memory"]["weights"] == a["memory"]["weights"] + b["memory"]["weights"]
    assert a["serve"]["per_user"]["typical"] <= a["serve"]["alone"]["typical"]
    assert a["serve"]["cost_per_million"]["output"]["low"] > 0


def test_cost_follows_utilization_price_and_currency(ask: Ask, folder: Path) -> None:
    def cost(*flags: object) -> float:
        _, out, _ = ask(folder, "--dry-run", "--json", "--machine-price-per-hour", 1, "--watts", 0, *flags)
        value: float = json.loads(out)["models"][0]["serve"]["cost_per_million"]["output"]["typical"]
        return value

    # the machine is timed anew each time
    assert cost("--utilization", 0.01) > 3 * cost("--utilization", 0.9)
    _, out, _ = ask(folder, "--dry-run", "--currency", "EUR")
    assert " EUR" in out
    assert "USD" not in out


def test_a_server_that_cannot_work_is_refused_unless_forced(
    ask: Ask, folder: Path, free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr("minga.serve.server.open_app", lambda *_, **__: started.append(1))
    monkeypatch.setattr("minga.serve.server.run_until_signal", lambda *_, **__: None)
    port = ("--port", 0)
    free(1e6)
    code, out, err = ask(folder, *port)
    assert (code, out, err.count("\n"), started) == (2, "", 1, [])
    assert err.startswith("error: the server needs about 31")
    assert "--force starts it anyway" in err
    assert ask(folder, "--dry-run")[0] == 0
    assert "without --force it is refused" in ask(folder, "--dry-run")[1]
    assert ask(folder, *port, "--force")[::2] == (0, "")
    free(8e9)
    assert ask(folder, *port)[::2] == (0, "")
    assert started == [1, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--utilization", "0"], "--utilization is 0.0"),
        (["--utilization", "nan"], "--utilization is nan"),
        (["--max-running", "0"], "--max-running is 0"),
        (["--prefix-memory", "much"], "prefix_memory is 'much'"),
        (["--watts", "-3"], "watts and prices are 0 or more"),
        (["--watts", "1e308"], "at most 1e+12"),
        (["--port", "-1"], "--port is -1 (serve)"),
        (["--port", "65536"], "--port is 65536 (serve)"),
        (["--quant", "int3"], "invalid choice: 'int3'"),
        (["--prefix-memory", "-1GB"], "expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line(ask: Ask, folder: Path, flags: list[str], message: str) -> None:
    code, out, err = ask(folder, "--dry-run", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_model_that_is_not_there(ask: Ask) -> None:
    code, out, err = ask("/nowhere", "--dry-run")
    assert (code, out) == (2, "")
    assert "nothing at this path (/nowhere)" in err


def test_an_empty_name_is_not_the_folder_one_is_in(ask: Ask) -> None:
    code, out, err = ask("", "--dry-run")
    assert (code, out) == (2, "")
    assert "'' names no model (MODEL)" in err
