"""Each benchmark runs, and ends with the one line that programs read."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minga import store
from minga.config import ModelConfig, TrainConfig
from minga.config.presets import tiny
from minga.recipes import pretrain as pretraining
from minga.recipes.pretrain import pretrain

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = {"id", "ours", "theirs", "peer", "unit", "ratio", "runs", "spread"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[Callable[[str], ModuleType]]:
    """The scripts as modules, found as they find each other."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def bench(scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`bench(answers, **settings)`: a Bench whose measurements are `answers[name](**arguments)`."""
    train = scripts("train")

    def make(answers: dict[str, Callable[..., Any]], **settings: Any) -> Any:
        monkeypatch.setattr(train, "measure", lambda script, name, *, threads, **rest: answers[name](**rest))
        monkeypatch.setattr(train.Bench, "shards", str(tmp_path))
        defaults: dict[str, Any] = {"data": None, "minutes": 40, "threads": 2, "quick": False, "only": ""}
        return train.Bench(**{**defaults, **settings})

    return make


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a measurement changes in its own process is put back in this one."""
    monkeypatch.setattr(pretraining, "optimizer_of", pretraining.optimizer_of)


# ---------------------------------------------------------------------------------------------- engine


@pytest.fixture
def small_models(scripts, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The engine's benchmark with a tiny model in place of all, without pauses."""
    engine = scripts("engine")
    config = tiny().replace(n_group=1, topk_group=1, qk_nope_head_dim=32, num_nextn_predict_layers=0)
    monkeypatch.setattr(engine, "model_config", lambda name: config)
    monkeypatch.setattr(engine, "PAUSE", 0)
    return engine


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_engine_beside_llama_cpp(small_models: ModuleType, format: str) -> None:
    pytest.importorskip("llama_cpp")
    settings: dict[str, Any] = {"model": "b", "format": format, "rounds": 2}
    decoded = small_models.measure_decode(**settings, context=20, tokens=4)
    prefilled = small_models.measure_prefill(**settings, length=64)
    for found in (decoded, prefilled):
        assert all(len(found[side]) == 2 and min(found[side]) > 0 for side in ("ours", "theirs"))
    speeds = small_models.measure_throughput(model="b", format=format, requests=3, prompt=8, tokens=4)
    assert min(speeds.values()) > 0


def test_engine_decodes_a_file_as_it_is(small_models: ModuleType, scripts, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    scripts("peers").write_gguf(small_models._floats("b"), tmp_path / "m.gguf", "Q8_0")
    found = small_models.measure_file(str(tmp_path / "m.gguf"), rounds=2, tokens=4)
    assert found["kinds"] == ["Q8_0"]
    assert all(len(found[side]) == 2 and min(found[side]) > 0 for side in ("ours", "theirs"))


def test_engine_peer_computes_the_same(small_models: ModuleType, scripts, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, file = small_models._floats("b"), tmp_path / "model.gguf"
    scripts("peers").write_gguf(model, file, "Q8_0")
    peer, ids = scripts("peers").Llama(file, threads=1, context=64), list(range(5, 25))
    peer.prefill(ids)
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0, -1]
    assert (peer.logits() - ours).norm() < 0.05 * ours.norm()


def test_engine_beside_transformers(small_models: ModuleType) -> None:
    assert min(small_models.measure_transformers("b", context=4, tokens=2, rounds=2)) > 0
    assert small_models.measure_one_by_one("b", prompt=4, tokens=3) > 0


def test_engine_roofline_counts_what_a_token_reads(small_models: ModuleType) -> None:
    found = small_models.measure_roofline("b", "int8", tokens=4, rounds=1)
    model = small_models._floats("b")
    weights = {name: p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and p.ndim > 1}
    touched = sum(size // 4 if ".experts." in name else size for name, size in weights.items())  # 2 of 8 experts
    assert touched < found["bytes_a_token"] < 1.2 * touched + 4000


def test_engine_speculation_and_bits(make_config: Callable[..., TrainConfig], scripts, shards: Path) -> None:
    run = str(pretrain(make_config(steps=2)).run)
    found = scripts("engine").measure_speculation(run, "int8", rounds=1, tokens=8)
    assert 0 < found["limit"] < 2
    assert len(found["plain"]) == len(found["ahead"]) == len(found["always"]) == len(found["acceptance"]) == 4
    bits = scripts("engine").measure_bits
    exact = bits(run, str(shards), None, None, 500)
    for format, cached in (("int8", None), (None, "int8")):
        assert bits(run, str(shards), format, cached, 500) == pytest.approx(exact, rel=0.05)


def test_engine_rows_and_failures(scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A row whose peer is missing fails alone."""
    engine = scripts("engine")
    answers = {"decode": {"ours": [3.0, 4.0], "theirs": [1.0, 2.0]}}

    def measure(script: str, name: str, *, threads: int, **rest: Any) -> Any:
        if rest["context"]:
            raise engine.Failed("no llama_cpp")
        return answers[name]

    monkeypatch.setattr(engine, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["engine.py", "--only", "decode/a/int8", "--quick"])
    assert engine.main() == 1
    out = capsys.readouterr()
    rows = json.loads(out.out.splitlines()[-1])["rows"]
    assert [row["id"] for row in rows] == [f"decode/a/int8/ctx0/threads{threads}" for threads in (1, 2)]
    assert rows[0]["ratio"] == 2.5 and set(rows[0]) == KEYS
    assert out.err.count("failed: decode/a/int8/ctx4096") == 2
    answers["file"] = {"ours": [3.0], "theirs": [2.0], "kinds": ["Q4_1", "Q8_0"]}
    monkeypatch.setattr(engine, "measure", lambda script, name, **rest: answers[name])
    monkeypatch.setattr(sys, "argv", ["engine.py", "--only", "decode/smollm2", "--smollm2", "some/m.gguf"])
    assert engine.main() == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert found["ratio"] == 1.5 and found["note"] == "m.gguf: Q4_1 and Q8_0, as in the file"
    monkeypatch.setattr(sys, "argv", ["engine.py", "--only", "decode/smollm2"])
    with pytest.raises(SystemExit):
        engine.main()
    assert "decode/smollm2/int8/ctx0/threads2 is left out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- quant


def test_quant_beside_llama_cpp(make_config: Callable[..., TrainConfig], scripts, shards: Path) -> None:
    """Both sides from one trained model: more bits are nearer to it, and a type that rows do not fit is told of."""
    pytest.importorskip("llama_cpp")
    quant = scripts("quant")
    settings = {"path": str(pretrain(make_config(steps=2)).run), "data": str(shards), "max_tokens": 500}
    ours = {f: quant.measure_ours(**settings, format=f, calibration=512) for f in ("int8", "int4", "int4-gptq", "fp8")}
    theirs = {kind: quant.measure_theirs(**settings, kind=kind) for kind in ("Q8_0", "Q4_0", "Q4_K")}
    for found in (*ours.values(), *theirs.values()):
        assert 0 < found["kl"] < 0.1 and 0.5 < found["top1"] <= 1 and abs(found["bits-per-byte"]) < 0.05
    assert ours["int8"]["kl"] < ours["int4"]["kl"] / 10 and theirs["Q8_0"]["kl"] < theirs["Q4_0"]["kl"] / 10
    assert (
        ours["int4"]["bits-per-weight"] == ours["int4-gptq"]["bits-per-weight"] < 6
    )  # norms and routers are many here
    assert 8 < theirs["Q8_0"]["bits-per-weight"] < 10
    assert theirs["Q4_K"]["substituted"] and "Q4_K" not in theirs["Q4_K"]["substituted"]


def test_quant_refuses_what_it_cannot_compare(scripts, tmp_path: Path) -> None:
    import minga
    from minga.errors import UserError
    from minga.model.transformer import Transformer

    quant = scripts("quant")
    grouped = ModelConfig(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
    model = Transformer(grouped).init_weights()
    minga.save(model, tmp_path / "llama")
    with pytest.raises(UserError, match="has no MLA"):
        quant.measure_theirs(str(tmp_path / "llama"), "shards", "Q8_0", 100)
    minga.save(store.quantize(model, "int8"), tmp_path / "int8")
    with pytest.raises(UserError, match="in few bits already"):
        quant.measure_ours(str(tmp_path / "int8"), "shards", "int4", 100, 100)


def test_quant_rows(scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each side is measured once, and a peer that fails takes its own rows with it."""
    quant, asked = scripts("quant"), []
    found = {"kl": 0.02, "top1": 0.9, "bits-per-byte": 0.01, "bits-per-weight": 4.5, "tokens": 1000}

    def measure(script: str, name: str, *, threads: int, **rest: Any) -> Any:
        asked.append(rest.get("format") or rest["kind"])
        if asked[-1] == "Q4_1":
            raise quant.Failed("no llama_cpp")
        return found if name == "ours" else {**found, "kl": 0.04, "weights": 100, "substituted": {"Q5_0": 3}}

    monkeypatch.setattr(quant, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["quant.py", "runs/demo", "--data", "shards"])
    assert quant.main() == 1
    out = capsys.readouterr()
    rows = {row["id"]: row for row in json.loads(out.out.splitlines()[-1])["rows"]}
    assert sorted(asked) == ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0", "fp8", "int4", "int4-gptq", "int8"]
    assert len(rows) == 4 * (10 - 2) and all(set(row) - {"note"} == KEYS for row in rows.values())
    assert rows["kl/int4-gptq/q4_k"]["ratio"] == 0.5
    assert rows["kl/int4-gptq/q4_k"]["note"] == "1,000 tokens, 3% of the weights in Q5_0"
    assert out.err.count("no llama_cpp") == 4 * 2
    monkeypatch.setattr(sys, "argv", ["quant.py", "--only", "kl/int8/q8_0"])
    assert quant.main() == 1
    assert "give --model and --data" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- train: measurements


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_step_of_either_side_is_timed(scripts, side: str) -> None:
    speed = scripts("train").measure_speed(side, "tiny", steps=1)
    assert speed["tokens_per_second"] > 0
    assert 5e7 < speed["peak_bytes"] < 1e11  # bytes, not kilobytes


@pytest.mark.usefixtures("unpatched")
def test_both_sides_are_timed_with_adamw(scripts) -> None:
    from minga.train.optim import Muon

    train = scripts("train")
    config = TrainConfig(model=train.SPEED_MODELS["tiny"](), steps=1)
    assert any(isinstance(part, Muon) for part in pretraining._build(config)[1]._parts)
    scripts("ours").adamw_alone()
    optimizer = pretraining._build(config)[1]
    optimizer.set_momentum(0.9)
    assert not any(isinstance(part, Muon) for part in optimizer._parts)


def test_a_measurement_has_a_process_of_its_own(scripts) -> None:
    common = scripts("common")
    assert common.measure(str(BENCHMARKS / "train.py"), "peak", threads=1) > 1e8
    with pytest.raises(common.Failed, match="speed"):
        common.measure(str(BENCHMARKS / "train.py"), "speed", threads=1, side="ours", model="no such", steps=1)


def test_the_baseline_trains_for_its_budget(scripts, make_config: Callable[..., TrainConfig], monkeypatch) -> None:
    baseline = scripts("baseline")
    monkeypatch.setitem(baseline.SIZES, "10m", {"n_layer": 1, "n_head": 2, "n_embd": 32})
    monkeypatch.setattr(baseline, "SEQ_LEN", 32)
    shards = baseline.open_shards(make_config().data)
    said: list[dict[str, Any]] = []
    options = {"lr": 1e-2, "batch_tokens": 128, "evaluations": 2, "eval_tokens": 500, "say": said.append}
    last = baseline.train(shards, "10m", budget=2.0, **options)
    assert last == said[-1]
    assert last["step"] == last["steps"] > 10
    assert 0.5 < last["seconds"] < 8.0
    assert 0 < last["bits_per_byte"] < said[0]["bits_per_byte"] * 1.05


def test_the_learning_rate_is_not_left_at_the_edge_of_the_sweep(scripts, monkeypatch) -> None:
    baseline = scripts("baseline")
    tried = []

    def train(*_: Any, lr: float, **__: Any) -> dict[str, float]:
        tried.append(lr)
        return {"bits_per_byte": abs(lr - 7.5e-3)}

    monkeypatch.setattr(baseline, "train", train)
    assert baseline.sweep(None, "10m", budget=1, batch_tokens=1) == 8e-3
    assert tried == [*baseline.LEARNING_RATES, 8e-3, 16e-3]


# ---------------------------------------------------------------------------------------------- train: rows


def test_speed_memory_and_utilisation_of_alternating_runs(bench) -> None:
    order = []

    def speed(side: str, precision: str = "float32", muon: bool = False, **_: Any) -> dict[str, float]:
        if muon:  # as one trains: its memory counts, not its speed
            return {"tokens_per_second": 1.0, "peak_bytes": 50.0}
        order.append(side)
        return {"tokens_per_second": {"theirs": 10.0, "ours": 15.0}[side] + len(order), "peak_bytes": 100.0}

    b = bench({"speed": speed, "peak": lambda: 1e9}, only="train/")
    b.speed("b", ["float32"], rounds=3, steps=1)
    assert order == ["theirs", "ours"] * 3
    rows = {row["id"]: row for row in b.rows}
    assert list(rows) == [f"train/{name}/b" for name in ("tokens-per-second", "peak-memory", "mfu")]
    assert all(set(row) - {"note"} == KEYS for row in rows.values())
    fast = rows["train/tokens-per-second/b"]
    assert (fast["ours"], fast["theirs"], fast["runs"]) == (19.0, 13.0, 3)
    assert fast["spread"] == [21 / 15, 17 / 11]
    assert rows["train/peak-memory/b"]["ratio"] == 0.5


def _run(*bits: float) -> dict[str, Any]:
    evaluations = [
        {"seconds": 100.0 * n, "tokens": 1000 * n, "bits_per_byte": value, "val_loss": value, "mtp_acceptance": 0.5}
        for n, value in enumerate(bits, 1)
    ]
    return {"evaluations": evaluations, "balance": {"median": 1.2, "spread": [1.1, 1.3], "steps": 9}}


BASELINE = {"bits_per_byte": 2.0, "seconds": 4800.0, "tokens": 5000, "lr": 1e-3}


def test_equal_loss_is_the_first_evaluation_as_low_as_the_baseline(bench) -> None:
    budgets = []

    def ours(budget: float, **_: Any) -> dict[str, Any]:
        budgets.append(budget)
        return _run(2.5, 2.1) if len(budgets) == 1 else _run(2.4, 2.0, 1.9)

    b = bench({"baseline": lambda **_: BASELINE, "ours": ours})
    b.equal_loss("30m")
    (row,) = b.rows
    assert (row["ours"], row["theirs"], row["ratio"]) == (200.0, 4800.0, 24.0)
    assert budgets[1] == pytest.approx(1.3 * budgets[0])  # the first schedule ended too early


def test_what_a_longer_run_shows(bench) -> None:
    b = bench({"ours": lambda **_: _run(2.0, 1.9)})
    b.watched()
    rows = {row["id"]: row for row in b.rows}
    assert rows["train/mtp-acceptance/30m"]["ours"] == 0.5
    assert rows["train/balance/max-over-mean"]["spread"] == [1.1, 1.3]


def test_a_loss_that_is_never_reached_has_no_ratio(bench) -> None:
    b = bench({"baseline": lambda **_: BASELINE, "ours": lambda **_: _run(2.3)})
    b.equal_loss("10m")
    (row,) = b.rows
    assert (row["ours"], row["ratio"]) == (None, None)
    assert "not reached: 2.3" in row["note"]


def test_loss_gaps_are_relative_to_float32(bench) -> None:

    def steps(changes: dict[str, Any], **_: Any) -> dict[str, Any]:
        losses = {"float32": 4.0, "fp8": 4.01, "int8": 3.99}
        return _run(4.02 if changes.get("optimizer_bits") == 8 else losses[changes.get("precision", "float32")])

    b = bench({"steps": steps}, quick=True)
    b.gaps()
    assert {row["id"]: round(row["ours"], 6) for row in b.rows} == {
        "train/fp8-loss-gap": 0.0025,
        "train/int8-loss-gap": -0.0025,
        "train/optimizer8-loss-gap": 0.005,
    }
    assert all("2,000 without --quick" in row["note"] for row in b.rows)


@pytest.mark.parametrize("quick", [True, False])
def test_all_rows_and_what_only_leaves_out(scripts, bench, quick: bool) -> None:
    train = scripts("train")

    def failing(**_: Any) -> Any:
        raise train.Failed("no memory")

    answers = {
        "speed": lambda **_: {"tokens_per_second": 1.0, "peak_bytes": 1.0},
        "peak": lambda: 1e9,
        "steps": lambda **_: _run(2.0),
        "baseline": lambda **_: BASELINE,
        "ours": lambda **_: _run(1.9),
    }
    b = bench(answers, quick=quick)
    train.run_all(b)
    left_out = {"train/compute-to-equal-loss/30m"} if quick else set()
    assert {row["id"] for row in b.rows} == set(train.IDS) - left_out
    only = bench({"speed": answers["speed"], "peak": answers["peak"]}, quick=quick, only="train/peak")
    train.run_all(only)
    assert [row["id"] for row in only.rows] == ["train/peak-memory/b"]
    broken = bench({**answers, "steps": failing}, quick=quick)
    train.run_all(broken)
    assert broken.failures == ["loss gaps: no memory"]
    assert len(broken.rows) == len(b.rows) - 3


def test_the_ablation_measures_time_to_equal_loss(scripts) -> None:
    def curve(*bits: float) -> list[tuple[float, float]]:
        return [(100.0 * n, value) for n, value in enumerate(bits, 1)]

    curves = {"full-recipe": curve(3.0, 2.0), "adamw": curve(3.5, 2.5), "mtp": curve(2.5, 1.5), "gqa": curve(1.0, 0.5)}
    rows = scripts("ablation").rows(curves, "30m")
    ratios = {row["id"].rpartition("/")[2]: row["ratio"] for row in rows}
    assert ratios["adamw"] == pytest.approx(200 / 150)  # the reference is at 2.5 halfway between its evaluations
    assert ratios["mtp"] == pytest.approx(150 / 200)
    assert "gqa" not in ratios  # what it is compared with has not been run


def test_the_ablation_runs_what_is_asked_for_and_its_reference(scripts, monkeypatch, tmp_path: Path, capsys) -> None:
    ablation, asked = scripts("ablation"), []

    def answer(script: str, name: str, *, threads: int, **arguments: Any) -> dict[str, Any]:
        asked.append((name, arguments["variant"], arguments["budget"]))
        if arguments["variant"] == "dense":
            raise ablation.Failed("no memory")
        return _run(3.0, 2.0)

    monkeypatch.setattr(ablation, "measure", answer)
    monkeypatch.setattr(ablation.corpus, "shards", lambda data, say: str(tmp_path))
    assert ablation.main(["--only", "ablation/gqa", "--minutes", "2", "--threads", "1", "--json"]) == 1
    assert asked == [("variant", "dense", 120.0), ("variant", "gqa", 120.0)]
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == [] and "failed: dense: no memory" in err
    with pytest.raises(SystemExit):
        ablation.main(["--only", "ablation/none"])
    assert "the rows are ablation/full-recipe, ablation/adamw" in capsys.readouterr().err


def test_every_variant_is_a_model_that_trains(scripts) -> None:
    """Those that settings express, on the real recipe: each differs from it, and its active size stays about equal."""
    from minga.planner.counts import count_parameters

    full = scripts("ours").recipe("10m")
    size = count_parameters(full.model).active
    for name, variant in scripts("ablation").VARIANTS.items():
        if variant.change is not None:
            assert variant.change(full) != full
            assert count_parameters(variant.change(full).model).active == pytest.approx(size, rel=0.1), name


@pytest.mark.parametrize(("size", "millions"), [("10m", 10), ("30m", 30)])
def test_the_recipes_have_the_size_they_are_named_for(scripts, size: str, millions: int) -> None:
    from minga.planner.counts import count_parameters

    assert count_parameters(scripts("ours").recipe(size).model).active / 1e6 == pytest.approx(millions, rel=0.2)


# ---------------------------------------------------------------------------------------------- corpus


def test_text_without_markup(scripts) -> None:
    corpus = scripts("corpus")
    page = '<head><title>T</title></head><div class="navheader"><p>Up</p></div><p>One  <b>two</b></p><pre>a\n  b</pre>'
    ((_, text),) = corpus.html("name", page)
    assert corpus.tidy(text) == "One two\n\na\n  b\n"
    ((_, text),) = corpus.pod(
        "name", "=head1 NAME\n\nUse C<print>, I<B<not>> L<say|perlfunc>, E<lt>b>.\n\n=over 4\n\n=cut\n"
    )
    assert corpus.tidy(text) == "NAME\n\nUse print, not say, <b>.\n"
    entries = "".join(f"Word{n} \\Word\\\n   Same as {{Other}}.\n   [1913 Webster]\n\n" for n in range(2000))
    parts = [text for _, text in corpus.dictionary("name", entries)]
    assert len(parts) > 1
    assert "\n\n".join(parts).count("Same as Other.") == 2000
    assert not any("Webster" in part for part in parts)


def test_the_files_of_a_package(scripts, tmp_path: Path) -> None:
    corpus = scripts("corpus")
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:xz") as archive:
        for name, data in (("./b.txt", b"bb"), ("./a.txt", b"aaa"), ("./c.png", b"x")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    package = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0"), ("data.tar.xz", held.getvalue())):
        package += f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    (tmp_path / "p.deb").write_bytes(package)
    assert list(corpus.members(tmp_path / "p.deb")) == [("./a.txt", b"aaa"), ("./b.txt", b"bb")]


def test_what_cannot_be_had_is_one_line(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = scripts("corpus")
    monkeypatch.setattr(corpus, "COMMANDS", {key: ["no-such-program"] for key in corpus.COMMANDS})
    (tmp_path / "moby-dick").mkdir()
    (tmp_path / "moby-dick" / "a.txt").write_text("Call me Ishmael.\n")
    said: list[str] = []
    assert corpus.fetch(tmp_path, said.append) == 17
    assert len(said) == len(corpus.ORIGINS) + 1
    assert (
        "passed over: no-such-program is not installed. to have it, make this work: no-such-program dict-gcide"
        in said[0]
    )
