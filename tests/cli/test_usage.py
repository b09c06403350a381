"""pytest tests/cli/test_usage.py: `minga keys` and `minga usage`."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from minga.cli import usage
from minga.cli.main import main
from minga.errors import UserError
from minga.planner.estimate import Estimate
from minga.runtime import machine
from minga.serve.keys import Key, Keys
from minga.serve.meter import Meter, Usage
from minga.serve.store import Store


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "cpu_power_limit", lambda: None)
    monkeypatch.setattr(machine, "gpu_power_limit", lambda: None)
    return tmp_path


@pytest.fixture
def used(here: Path) -> None:
    """Two requests of ana and one of ben: 3.6 million tokens, an hour of busy time."""
    store = Store("minga.db")
    meter = Meter(store)
    for key, day in (("ana", 1), ("ana", 2), ("ben", 2)):
        meter.record(
            Usage(
                key, "m", "/v1/chat/completions", "r",
                prompt_tokens=1_000_000, cached_tokens=400_000, completion_tokens=200_000, reasoning_tokens=50_000,
                busy_seconds=1200, time=datetime(2026, 11, day, 12).timestamp(),
            )
        )  # fmt: skip
    meter.close()
    store.close()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    message = json.loads(out)["error"]["message"]
    assert err == f"error: {message}\n"
    return message


# ---------------------------------------------------------------------- keys


def test_a_key_is_made_listed_and_revoked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "ana", "--tokens-per-minute", "20000", "--concurrent", "2"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch("mk-[0-9a-f]{64}\n", out)
    assert "shown this once" in err
    store = Store("minga.db", create=False)
    assert Keys(store).find(out.strip()) == Key("ana", tokens_per_minute=20000, max_concurrent=2)

    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^ana +mk-[0-9a-f]{12}\.\.\. +\S+ +- +- +20,000 +2 +-$", listed, re.MULTILINE)
    assert out.strip() not in listed

    assert main(["keys", "revoke", "ana"]) == 0
    assert Keys(store).find(out.strip()) is None
    assert capsys.readouterr().out == "ana is revoked\n"
    store.close()


def test_keys_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--requests-per-minute", "5", "--max-output-tokens", "100"]
    assert main(["keys", "add", "ana", "--file", "other.db", *limits, "--json"]) == 0
    added = json.loads(capsys.readouterr().out)
    assert added["name"] == "ana"
    assert main(["keys", "revoke", "ana", "--file", "other.db", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"revoked": "ana"}
    assert main(["keys", "list", "--file", "other.db", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["keys"]
    assert listed.pop("revoked") >= listed.pop("created")
    assert listed == {
        "name": "ana",
        "id": added["key"][3:15],
        "requests_per_minute": 5,
        "tokens_per_minute": None,
        "max_concurrent": None,
        "max_output_tokens": 100,
    }


def test_mistakes_with_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such file (minga.db). `minga keys add NAME`" in refused(capsys, "keys", "list")
    assert "there is no such file" in refused(capsys, "keys", "revoke", "ana")
    assert "add needs a name (keys add)" in refused(capsys, "keys", "add")
    assert "list takes no name" in refused(capsys, "keys", "list", "ana")
    assert "--concurrent is for a new key (keys revoke)" in refused(
        capsys, "keys", "revoke", "ana", "--concurrent", "2"
    )
    assert "invalid choice: 'remove'" in refused(capsys, "keys", "remove", "ana")
    assert not Path("minga.db").exists()
    assert "max_concurrent is 0" in refused(capsys, "keys", "add", "ana", "--concurrent", "0")
    assert main(["keys", "list"]) == 0
    assert "there is no key" in capsys.readouterr().out


# ---------------------------------------------------------------------- usage


def test_usage_by_key(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--watts", "300", "--price-per-kwh", "0.5", "--machine-price-per-hour", "1", "--currency", "EUR"]
    assert main(["usage", "--since", "2026-11-01", *rates]) == 0
    head, ana, ben, total, _, note = capsys.readouterr().out.splitlines()
    assert re.sub(" +", " ", head) == "key requests prompt cached completion reasoning busy hours kWh EUR EUR/1M tokens"
    assert re.sub(" +", " ", ana) == "ana 2 2,000,000 800,000 400,000 100,000 0.67 0.2 0.767 0.319"
    assert re.sub(" +", " ", ben) == "ben 1 1,000,000 400,000 200,000 50,000 0.33 0.1 0.383 0.319"
    assert re.sub(" +", " ", total) == "total 3 3,000,000 1,200,000 600,000 150,000 1.00 0.3 1.15 0.319"
    assert note == (
        "since 2026-11-01 00:00. counted: busy time at 300 W, 0.5 EUR a kWh, 1 an hour for the machine, PUE 1"
    )


def test_usage_of_a_machine_whose_power_is_not_known(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--since", "2026-11-01", "--by", "day"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^2026-11-02 .* \d\S* - \d\S* ", out, re.MULTILINE)
    assert re.search(r"busy time at \S+ - \S+ W, 0.17 USD a kWh, PUE 1", out)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0, 0, "0"), (1e-5, 0.0123, "<0.0001 - 0.012"), (9.87, 1234.5, "9.9 - 1,234"), (0.3191, 0.3191, "0.319")],
)
def test_numbers_for_people(low: float, high: float, text: str) -> None:
    assert usage._range(Estimate.between(low, high)) == text


def test_usage_as_json(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    period = ["--since", "2026-11-01T00:00:00", "--until", "2026-11-02"]
    assert main(["usage", *period, "--by", "model", "--watts", "300", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["by"] == "model" and document["since"].startswith("2026-11-01T00:00:00")
    assert document["rates"]["watts"] == {"low": 300, "high": 300}
    (row,) = document["rows"]
    assert (row["group"], row["num_requests"], row["prompt_tokens"], row["busy_seconds"]) == ("m", 1, 1_000_000, 1200)
    assert row["kwh"] == {"low": pytest.approx(0.1), "high": pytest.approx(0.1)}
    assert row["price_per_million_tokens"]["low"] == pytest.approx(0.017 / 1.2)
    assert document["total"] == row | {"group": "total"}


def test_no_usage(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--since", "2020-01-01", "--until", "2020-01-02"]) == 0
    assert capsys.readouterr().out == "no request since 2020-01-01 00:00\n"
    assert main(["usage", "--since", "2020-01-01", "--until", "2020-01-02", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == [] and document["total"]["price_per_million_tokens"] is None


def test_mistakes_with_usage(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'yesterday' is no time (--since). write 12h" in refused(capsys, "usage", "--since", "yesterday")
    assert "'999999999w' is no time (--since)" in refused(capsys, "usage", "--since", "999999999w")
    swapped = ("--since", "2026-11-02", "--until", "2026-11-01")
    assert "is not before --until 2026-11-01" in refused(capsys, "usage", *swapped)
    assert "there is no such file (gone.db)" in refused(capsys, "usage", "--keys", "gone.db")
    for watts in ("-5", "nan"):
        assert "watts and prices are 0 or more" in refused(capsys, "usage", "--watts", watts)


def test_moments() -> None:
    now = datetime(2026, 11, 25, 12, tzinfo=UTC)
    assert usage.moment("36h", "--since", now) == datetime(2026, 11, 24, tzinfo=UTC)
    assert usage.moment("2w", "--since", now) == datetime(2026, 11, 11, 12, tzinfo=UTC)
    assert usage.moment("2026-11-25T10:00:00+02:00", "--since", now) == datetime(2026, 11, 25, 8, tzinfo=UTC)
    for text in ("", "7", "d7", "2026-13-01", "٧d"):
        with pytest.raises(UserError, match="is no time"):
            usage.moment(text, "--since", now)
