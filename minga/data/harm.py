"""How harmful is a text: a score in [0, 1] for each of OpenAI's 13 moderation categories, from one half on harmful.

Two judges, of which the harsher counts. `HarmClassifier` is linear, one logistic regression a category, over hashed
words, pairs of words and character 3- to 5-grams; `minga.recipes.guard` trains it, and the weights that come with the
package, int8, say in their metadata on what and how well they do. `RULES` is a short table of patterns in English
and Spanish with a reason each. Both read the text as `normalise` leaves it, so that a look-alike letter, a zero-width
space or `k 1 l l` does not hide a word.

This is a first net, small enough to run on every message: it knows words and their neighbours, not meaning. It misses
what is said in other words or languages, and what a larger guard model is for (`minga.serve.moderation.ModelGuard`).
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minga.errors import UserError

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
THRESHOLD = 0.5
SHIPPED = Path(__file__).with_name("harm.safetensors")

# ---------------------------------------------------------------------------------------------- reading


# Letters of other scripts that look Latin: Cyrillic and Greek, the basic ones.
_LOOK_ALIKES = str.maketrans("абвгеёзікмнорстухуѕјԁԛԝһӏαβγεικνορτυχωϲ", "abbreezikmhopctyxysjdqwhlabyeikvoptuxwc")
_LEET = str.maketrans("013457@$!", "oieastasi")
_LEET_INSIDE = re.compile(r"(?<=[a-z])[013457@$!]+(?=[a-z])|(?<![\w@$])[@$](?=[a-z]{2})")
_SPACED_OUT = re.compile(r"(?<!\w)(?:\w[ .\-_*]){3,}\w(?!\w)")
_WORDS = re.compile(r"\w+")


def normalise(text: str) -> str:
    """The letters that a reader sees: compatibility forms, case, accents and invisible characters are folded away,
    look-alikes and the digits of leetspeak become letters, single letters with gaps between become a word."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in text if unicodedata.category(char) not in ("Mn", "Cf"))
    text = text.casefold()
    if not text.isascii():
        text = text.translate(_LOOK_ALIKES)
    text = _LEET_INSIDE.sub(lambda match: match[0].translate(_LEET), text)
    text = _SPACED_OUT.sub(lambda match: re.sub(r"[ .\-_*]", "", match[0]), text)
    return " ".join(text.split())


NUM_WORD_BUCKETS = 1 << 13
NUM_GRAM_BUCKETS = 1 << 14
NUM_BUCKETS = NUM_WORD_BUCKETS + NUM_GRAM_BUCKETS


def features(text: str) -> npt.NDArray[np.intp]:
    """The buckets, rising, that the normalised text's words, pairs of words and character n-grams fall into."""
    normal = normalise(text)
    present = np.zeros(NUM_BUCKETS, dtype=bool)
    words = np.array([zlib.crc32(word.encode()) for word in _WORDS.findall(normal)], dtype=np.uint32)
    pairs = words[:-1] * np.uint32(0x9E3779B1) + words[1:]
    for hashes in (words, pairs):
        present[_mixed(hashes) % NUM_WORD_BUCKETS] = True
    chars = np.frombuffer(f" {normal} ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    grams = chars.copy()
    for size in (2, 3, 4, 5):
        grams = grams[:-1] * np.uint32(0x01000193) + chars[size - 1 :]
        if size > 2:
            present[NUM_WORD_BUCKETS + _mixed(grams) % NUM_GRAM_BUCKETS] = True
    return np.flatnonzero(present)


def _mixed(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Lets each bit of a hash decide about the lowest ones (the end of MurmurHash3)."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


# ---------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """Where `pattern` is found in the normalised text, each of `categories` scores at least `score`.

    `words`, parted by bars, stand for `{}` in the pattern, and one of them must occur for the pattern to be tried.
    """

    categories: tuple[str, ...]
    score: float
    words: str
    pattern: str
    reason: str

    @functools.cached_property
    def stems(self) -> list[str]:
        return self.words.split("|")

    @functools.cached_property
    def compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern.replace("{}", f"(?:{self.words})"))

    def finds(self, normal: str) -> bool:
        return any(stem in normal for stem in self.stems) and self.compiled.search(normal) is not None


# A gap of some words, none of which turns the sentence round: who prevents a thing does not ask for it.
_GAP = (
    r"(?:(?!against|detect|prevent|remov|protect|avoid|report|stop|help|signs|whether|recogni|defen|survive|"
    r"spot|police|"
    r"contra |deteccion|preven|proteg|evitar|ayud|denunci|elimina|reconoc|sobreviv).){0,60}?"
)
_ASK = (
    r"\b(?:how (?:to|do|does|can|could|would|should|might)|ways? to|steps? (?:to|for)|instructions? (?:to|for|on)|"
    r"guide (?:to|for|on)|tutorial|recipe for|teach me|tell me how|explain how|give me|plan to|"
    r"como|instrucciones (?:para|de)|pasos para|guia (?:para|de)|receta (?:para|de)|ensena(?:me)?|dime|explicame)\b"
)
_MAKE = (
    r"\b(?:make|making|build|create|creating|construct|assembl|manufactur|produc|synthesi[sz]|cook|brew|"
    r"hacer|hago|fabric|constru|armar|prepar|crear|produc|sintetiz|cocin)\w*"
)
_PERSON = (
    r"(?:my|a|an|the|your|his|her|some|another|mi|un|una|el|la|al?|su)?(?: mi)? ?(?:ex[ -]?)?"
    r"(?:someone|somebody|people|person|man|woman|wife|husband|girlfriend|boyfriend|boss|neighbou?r|teacher|coworker|"
    r"roommate|parents?|mother|father|brother|sister|mom|dad|baby|child|children|classmates?|family|"
    r"alguien|personas?|gente|hombre|mujer|esposa|esposo|marido|novia|novio|jefe|vecin[oa]|profesora?|companer[oa]|"
    r"padres?|madre|herman[oa]|hij[oa]|nin[oa]s?|familia)\b"
)
_IN_PLAY = r"(?!.{0,40}\b(?:game|minecraft|skyrim|fortnite|gta|sims|rpg|chess|juego|videojuego|ajedrez)\b)"
_GROUPS = (
    "jews|muslims|christians|blacks|black people|white people|immigrants|migrants|refugees|mexicans|asians|arabs|gays|"
    "gay people|lesbians|homosexuals|trans people|women|gypsies|disabled people|indians|africans|"
    "judios|musulmanes|cristianos|negros|inmigrantes|migrantes|refugiados|mexicanos|asiaticos|arabes|homosexuales|"
    "lesbianas|mujeres|gitanos|discapacitados|indios|indigenas|venezolanos|bolivianos|haitianos"
)
_CHILD = (
    r"(?:child|children|kids?|minors?|underage|toddlers?|preteens?|schoolgirls?|menor|menores|ninos?|ninas?|infantil)\b"
)

RULES = (
    Rule(
        ("illicit", "illicit/violent"),
        0.9,
        "bomb|explosive|grenade|molotov|detonator|bomba|explosivo|granada|detonador",
        _ASK + _GAP + _MAKE + _GAP + r"(?<!bath )(?<!seed )(?<!cocoa )(?<!hot chocolate )\b{}s?\b"
        r"(?! (?:calorimeter|shelter|squad|hidraulica|centrifuga|"
        r"de (?:agua|calor|vacio|aire|bano|semillas|chocolate|infusion|insulina)))",
        "asks how to make an explosive",
    ),
    Rule(
        ("illicit", "illicit/violent"),
        0.9,
        "nerve agent|nerve gas|sarin|mustard gas|ricin|chemical weapon|biological weapon|bioweapon|anthrax|dirty bomb|"
        "arma quimica|armas quimicas|arma biologica|armas biologicas|gas mostaza|ricina|agente nervioso|gas nervioso",
        _ASK + _GAP + _MAKE + _GAP + r"\b{}",
        "asks how to make a weapon of mass destruction",
    ),
    Rule(
        ("illicit", "illicit/violent"),
        0.8,
        "ghost gun|untraceable gun|untraceable firearm|silencer|unregistered gun|illegal gun|illegal firearm|"
        "arma ilegal|arma sin registro|silenciador para",
        _ASK + _GAP + r"\b{}",
        "asks for a weapon outside the law",
    ),
    Rule(
        ("illicit",),
        0.85,
        "meth|methamphetamine|cocaine|heroin|fentanyl|lsd|mdma|metanfetamina|cocaina|heroina|fentanilo",
        _ASK + _GAP + _MAKE + _GAP + r"\b{}\b",
        "asks how to make a drug",
    ),
    Rule(
        ("illicit",),
        0.8,
        "ransomware|keylogger|botnet|malware|computer virus|rootkit|spyware|virus informatico|troyano",
        r"\b(?:write|create|creating|build|code|develop|make|spread|deploy|escrib|crea|program|desarroll|propag|hacer)\w*\b"
        + _GAP
        + r"\b{}\b(?! (?:scan|detec|analy|remov|prot|defen|sample|policy))",
        "asks for malware",
    ),
    Rule(
        ("illicit",),
        0.75,
        "hack|hackear|hackeo",
        r"(?<!assist with )(?<!help with )\b{}(?:ing)? (?:in ?to )?"
        r"(?:someone|somebody|(?:my|his|her|a|an|the|la|el|mi|un|una) (?:\w+ )?"
        r"(?:ex|wife|husband|girlfriend|boyfriend|neighbou?r|friend|bank|account|email|phone|"
        r"cuenta|correo|telefono|banco|novia|novio|vecino|esposa|esposo)\b)",
        "asks to break into accounts or devices of others",
    ),
    Rule(
        ("illicit",),
        0.75,
        "launder money|counterfeit money|counterfeit bills|fake passport|fake id|phishing email|phishing page|identity theft|"
        "lavar dinero|blanquear dinero|billetes falsos|falsificar|pasaporte falso|correo de phishing|robar identidad",
        r"(?:" + _ASK + r"|\b(?:write|create|make|escribe|crea|redacta)\b)" + _GAP + r"\b{}",
        "asks for help with fraud or forgery",
    ),
    Rule(
        ("illicit",),
        0.7,
        "shoplift|pickpocket|hotwire|hot-wire|steal a car|steal from|break into a house|break into a car|break into someone|"
        "robar una casa|robar un coche|robar un auto|robar en|robarle a|entrar a robar",
        _ASK + _GAP + r"\b{}\b(?!.{0,40}\b(?:movie|film|game|base|bases|pelicula|juego)\b)",
        "asks how to steal",
    ),
    Rule(
        ("self-harm", "self-harm/intent"),
        0.9,
        "die|kill myself|end my life|end it all|hurt myself|cut myself|hang myself|"
        "morir|morirme|matarme|suicidarme|quitarme la vida|cortarme|ahorcarme|acabar con mi vida",
        r"\b(?:i(?: just| really| only)? (?:want|wanna|plan|intend|wish|need|have decided|decided)|i(?: am|'m| m) going|"
        r"quiero|voy|pienso|planeo|deseo|he decidido|decidi)(?: to| a)? {}\b"
        r"(?! (?:hard|laughing|for|of laughter|my hair|el pelo|de (?:risa|amor|hambre)))",
        "says that they want to hurt themselves",
    ),
    Rule(
        ("self-harm", "self-harm/instructions"),
        0.9,
        "kill myself|end my life|commit suicide|hang myself|overdose on|cut myself|starve myself|make myself throw up|"
        "suicidarme|matarme|quitarme la vida|ahorcarme|autolesionarme|cortarme las venas|suicidarse|provocarme el vomito",
        r"(?:" + _ASK + r"|\b(?:painless|easiest|quickest|best|sin dolor|mejor|facil)\b)" + _GAP + r"\b{}\b",
        "asks how to hurt oneself",
    ),
    Rule(
        ("self-harm", "harassment"),
        0.85,
        "kill yourself|hang yourself|kys|matate|suicidate|ahorcate",
        r"(?:^|[.,!?] ?|\b(?:go|just|should|and|please|deberias|anda y|mejor|ve y|por favor) )\b{}\b",
        "tells someone to hurt themselves",
    ),
    Rule(
        ("sexual", "sexual/minors"),
        0.95,
        "child porn|child erotic|kiddie porn|underage porn|underage sex|underage nude|sex with a minor|sex with a child|"
        "sex with children|pornografia infantil|porno infantil|sexo con menores|sexo con una menor|sexo con ninos|sexo con ninas",
        r"\b(?:create|make|find|access|get|watch|download|share|produce|distribute|sell|buy|write|describe|have|generate|"
        r"crear|ver|descargar|conseguir|compartir|encontrar|vender|comprar|escribe|genera|tener)\b" + _GAP + r"\b{}",
        "seeks sexual content with minors",
    ),
    Rule(
        ("sexual", "sexual/minors"),
        0.9,
        "groom|seduce|molest|sexual|erotic|nude|naked|porn|seducir|erotic|desnud|abusar",
        r"(?:"
        + _ASK
        + r"|\b(?:write|tell|describe|generate|roleplay|escribe|cuenta|describe|genera)\b)"
        + _GAP
        + r"\b(?:(?:groom|seduce|molest|seducir|abusar de)\b"
        + _GAP
        + r"\b"
        + _CHILD
        + r"|(?:sexual(?:ly)?(?: explicit)?|erotic\w*|nude|naked|porn\w*|desnud\w*)(?: \w+){0,4} "
        + _CHILD
        + r"|"
        + _CHILD
        + r"(?: \w+){0,3} (?:nude|naked|porn\w*|desnud\w*))(?!.{0,20}(?:education|abuse|educacion))",
        "sexualises minors",
    ),
    Rule(
        ("sexual",),
        0.75,
        "erotic|porn|sexually explicit|smut|hardcore sex|explicit sex|erotico|erotica|sexo explicito",
        r"\b(?:write|tell me|describe|generate|create|compose|escrib\w+|cuentame|genera|crea|redacta)\b"
        + _GAP
        + r"\b{}",
        "asks for explicit sexual content",
    ),
    Rule(
        ("sexual",),
        0.7,
        "cock|pussy|cum|clit|tits|dick|polla|verga|tetas",
        r"\b(?:suck|fuck|lick|thrust|rid|strok|chup|foll|lam)\w*\b.{0,40}\b{}\b|"
        r"\b{}\b.{0,40}\b(?:suck|fuck|lick|thrust|moan|chup|foll|gem)\w*",
        "explicit sexual content",
    ),
    Rule(
        ("violence", "illicit/violent", "illicit"),
        0.85,
        "kill|murder|poison|stab|strangle|torture|kidnap|matar|asesinar|envenenar|apunalar|torturar|secuestrar",
        _ASK + _GAP + r"\b{} " + _PERSON + _IN_PLAY,
        "asks how to hurt a person",
    ),
    Rule(
        ("violence", "illicit/violent", "illicit"),
        0.85,
        "mass shooting|school shooting|terrorist attack|suicide attack|tiroteo masivo|tiroteo escolar|"
        "atentado terrorista|atentado suicida",
        _ASK
        + _GAP
        + r"\b(?:plan|planning|commit|carry out|stage|organi[sz]e|planear|cometer|organizar|perpetrar)\b"
        + _GAP
        + r"\b{}",
        "asks for help with an attack",
    ),
    Rule(
        ("violence", "violence/graphic"),
        0.75,
        "murder|killing|torture|dismember|decapitat|disembowel|mutilat|asesinato|tortura|desmembr|decapita|mutila",
        r"\b(?:gruesome|graphic|gory|gore|brutal|sadistic|vivid detail|sangrient\w+|explicit\w+|macabr\w+)\b.{0,60}\b{}|"
        r"\b(?:describe|write|escribe|describeme)\b"
        + _GAP
        + r"\b{}\w*.{0,60}\b(?:in (?:graphic|gory|vivid|gruesome)|con todo detalle|con detalles sangrientos)",
        "asks for gore",
    ),
    Rule(
        ("violence", "violence/graphic"),
        0.7,
        "entrails|intestines|guts|severed|blood|tripas|intestinos|sangre",
        r"\b(?:disembowel|eviscerat|dismember|decapitat|mutilat|ripped|slit|destrip|desmembr|decapit|degoll)\w*\b.{0,60}\b{}\b",
        "gore",
    ),
    Rule(
        ("harassment", "harassment/threatening", "violence"),
        0.85,
        "kill|murder|hurt|stab|shoot|beat|burn|destroy|find you|matar|romper|pegar|apunalar|mato|morir",
        r"\b(?:(?:i|we)(?: wi|')?ll|i(?: am|'m| m)(?: going to| gonna))(?: \w+){0,4}? "
        r"(?:kill|murder|hurt|stab|shoot|beat|burn|destroy) (?:you|your (?:house|family|kids))\b|"
        r"\bvas a morir\b|\b(?:te|os|lo|la) (?:voy|vamos) a (?:matar|romper|pegar|apunalar)\b|"
        r"\bvoy a (?:matarte|romperte|apunalarte)\b|\bte mato\b",
        "threatens a person",
    ),
    Rule(
        ("harassment",),
        0.7,
        "idiot|moron|pathetic|worthless|loser|retard|piece of shit|bitch|scum|ugly|"
        "idiota|imbecil|estupid|inutil|basura|mierda|asqueros|puta",
        r"\b(?:you(?:'re| are|r)?|u r|eres|sos|es usted)(?: such| just| nothing but| tan)?(?: an?| una?)?"
        r"(?: (?:fucking|stupid|complete|total|ugly|dumb|maldit[oa]|completo|puto|puta))* {}\b(?! free)|\bhij[oa] de {}",
        "insults a person",
    ),
    Rule(
        ("hate",),
        0.8,
        _GROUPS,
        r"\b{} (?:are|should be|deserve|must be|son|deben ser|merecen|deberian ser)"
        r"(?: all| nothing but| just| tod[oa]s)?(?: \w+)? ?"
        r"(?:vermin|subhuman|animals|parasites|inferior|filth\w*|disgusting|criminals|trash|savages|a plague|cockroaches|rats|"
        r"infrahumanos|animales|parasitos|inferiores|asquerosos|criminales|basura|salvajes|una plaga|cucarachas|ratas)",
        "demeans a group of people",
    ),
    Rule(
        ("hate", "hate/threatening", "violence"),
        0.9,
        _GROUPS,
        r"(?:\b(?:kill|exterminate|gas|hang|shoot|burn|eradicate|matar|exterminar|quemar|ahorcar|fusilar)"
        r"(?: (?:all|every|them|the|a|tod[oa]s|los|las))* {}|"
        r"\b{} (?:should|must|deserve to|deben|deberian|merecen)(?: all| tod[oa]s)? "
        r"(?:be (?:killed|exterminated|gassed|hanged|shot|burned|eradicated)|die|morir|"
        r"ser (?:exterminad|elimin|fusilad|quemad)\w*))",
        "calls for violence against a group of people",
    ),
    Rule(
        ("hate",),
        0.75,
        "nigger|kike|faggot|wetback|raghead|tranny|sudaca|"
        "negro de mierda|maricon de mierda|judio de mierda|indio de mierda",
        r"\b{}s?\b",
        "a slur",
    ),
)


def matching_rules(text: str) -> list[Rule]:
    """The rules that speak on this text."""
    normal = normalise(text)
    return [rule for rule in RULES if rule.finds(normal)]


# ---------------------------------------------------------------------------------------------- classifier


@dataclass(frozen=True)
class HarmClassifier:
    """`weights`: (NUM_BUCKETS, 13) int8, times `scale`; with `bias`, (13,) float32 both, the logits of a text whose
    features have length one. A category without training data has a bias of minus infinity: only rules score it."""

    weights: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def learned_scores(self, text: str) -> npt.NDArray[np.float32]:
        """What the weights alone say, (13,) in the order of `CATEGORIES`."""
        buckets = features(text)
        total = self.weights[buckets].sum(axis=0, dtype=np.int32)
        logits = total * self.scale / np.float32(max(len(buckets), 1)) ** 0.5 + self.bias
        return (1 / (1 + np.exp(-np.clip(logits, -60, 60)))).astype(np.float32)

    def scores(self, text: str) -> dict[str, float]:
        """Category -> [0, 1]: the classifier's score or that of the severest rule, whichever is higher."""
        scores = {
            name: round(float(score), 6) for name, score in zip(CATEGORIES, self.learned_scores(text), strict=True)
        }
        for rule in matching_rules(text):
            for category in rule.categories:
                scores[category] = max(scores[category], rule.score)
        return scores

    def save(self, path: Path | str) -> None:
        tensors: dict[str, npt.NDArray[Any]] = {"weights": self.weights, "scale": self.scale, "bias": self.bias}
        save_file(tensors, path, {"harm_classifier": json.dumps(self.metadata, ensure_ascii=False)})

    @classmethod
    def load(cls, path: Path | str = SHIPPED) -> HarmClassifier:
        """Reads a file that `save` wrote; without a path, the one that comes with the package.

        Raises `UserError` for a file that is none.
        """
        try:
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                metadata = json.loads((file.metadata() or {}).get("harm_classifier", "{}"))
        except FileNotFoundError:
            raise UserError(f"{path} is not there (guard). name a file that `minga guard train --out` wrote") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"cannot read {path}: {error} (guard). name a file that `minga guard train` wrote"
            ) from None
        shapes = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
        num = len(CATEGORIES)
        if shapes != {
            "weights": ("int8", (NUM_BUCKETS, num)),
            "scale": ("float32", (num,)),
            "bias": ("float32", (num,)),
        }:
            raise UserError(f"{path} is no harm classifier (guard). name a file that `minga guard train` wrote")
        return cls(**tensors, metadata=metadata)


def quantise(weights: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(NUM_BUCKETS, 13) float32 -> int8 and one scale a category."""
    scale = np.maximum(np.abs(weights).max(axis=0), 1e-8).astype(np.float32) / np.float32(127)
    return np.rint(weights / scale).astype(np.int8), scale


def flagged_categories(scores: Mapping[str, float], names: Sequence[str] = CATEGORIES) -> list[str]:
    return [name for name in names if scores.get(name, 0.0) >= THRESHOLD]
