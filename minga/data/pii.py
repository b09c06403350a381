"""Personal data and secrets in text: found by pattern and checksum, and replaced by a mark such as `[EMAIL]`.

A pattern alone takes an order number for a card. So wherever a number carries a check digit it is computed (Luhn for
cards, mod 97 for IBANs, each country's own for its identity numbers), and a bare run of digits that only its
surroundings could explain counts only after a word such as "tel" or "CPF". Names and postal addresses have neither a
form nor a checksum: for those, and for more languages, there is `engine="presidio"` (the extra `pii`).

Each pattern reads the text in linear time, hostile text too: what may repeat is bounded, and a lookbehind keeps a match
from being tried again at each character of a run.
"""

from __future__ import annotations

import functools
import importlib
import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from minga.errors import UserError


@dataclass(frozen=True, order=True)
class Pii:
    """`text[start:end]` is of this kind, one of `KINDS`."""

    start: int
    end: int
    kind: str


def find_pii(text: str, kinds: Collection[str] | None = None, *, engine: str = "minga") -> list[Pii]:
    """What is found, in order and without overlaps: where two meet the longer one counts, then the more specific kind.

    `kinds`: only these of `KINDS`. `engine`: "minga", or "presidio" for Microsoft's recognisers without a language
    model. Raises `UserError` for an unknown kind or engine, and if presidio is not installed.
    """
    wanted = _checked(kinds)
    if engine == "presidio":
        found = _find_with_presidio(text, wanted)
    elif engine == "minga":
        found = [Pii(*span, kind) for kind in KINDS if kind in wanted for span in _DETECTORS[kind](text)]
    else:
        raise UserError(f"{engine!r} is no engine (pii). take minga or presidio")
    rank = {kind: place for place, kind in enumerate(KINDS)}
    taken = bytearray(len(text))
    chosen = []
    for pii in sorted(found, key=lambda pii: (pii.start - pii.end, rank[pii.kind], pii.start)):
        if taken.find(1, pii.start, pii.end) < 0:
            taken[pii.start : pii.end] = b"\x01" * (pii.end - pii.start)
            chosen.append(pii)
    return sorted(chosen)


def scrub(text: str, kinds: Collection[str] | None = None, *, engine: str = "minga") -> str:
    """The text with each finding of `find_pii` replaced by its kind: `[EMAIL]`, `[CARD]`, ..."""
    parts, at = [], 0
    for pii in find_pii(text, kinds, engine=engine):
        parts += [text[at : pii.start], f"[{pii.kind.upper()}]"]
        at = pii.end
    return "".join([*parts, text[at:]])


def _checked(kinds: Collection[str] | None) -> Collection[str]:
    for kind in kinds or ():
        if kind not in KINDS:
            raise UserError(f"{kind!r} is no kind of personal data (pii). take one of {', '.join(KINDS)}")
    return KINDS if kinds is None else kinds


# ---------------------------------------------------------------------------------------------- check digits


def _digits(text: str) -> list[int]:
    return [int(char) for char in text if "0" <= char <= "9"]


def _weighted(digits: list[int], weights: tuple[int, ...]) -> int:
    return sum(digit * weight for digit, weight in zip(digits, weights, strict=False))


def is_luhn(number: str) -> bool:
    """ISO/IEC 7812: every second digit from the right is doubled, its digits added; the sum divides by ten."""
    digits = _digits(number)[::-1]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def is_iban(iban: str) -> bool:
    """ISO 13616: the country's length; the first four characters moved to the end, as a number, leave 1 mod 97."""
    compact = "".join(iban.split()).upper()
    if len(compact) != _IBAN_LENGTHS.get(compact[:2]):
        return False
    return int((compact[4:] + compact[:4]).translate(_LETTERS_AS_NUMBERS)) % 97 == 1


_LETTERS_AS_NUMBERS = {ord(letter): str(value) for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", start=10)}


def _is_card(number: str) -> bool:
    digits = "".join(map(str, _digits(number)))
    issued = re.match(r"4|5[0-8]|2[2-7]|3[0-9]|6[0-9]", digits)  # Visa, Mastercard, Amex/JCB/Diners, Discover/UnionPay
    return bool(issued) and 13 <= len(digits) <= 19 and len(set(digits)) > 1 and is_luhn(digits)


def _is_ssn(number: str) -> bool:
    area, group, serial = re.findall(r"\d+", number)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _is_dni(text: str) -> bool:
    """Spain: the letter of a DNI, or of a NIE whose X, Y, Z stands for 0, 1, 2, is the number mod 23."""
    compact = re.sub(r"[ .\-]", "", text).upper()
    number = compact[:-1].translate(str.maketrans("XYZ", "012"))
    return compact[-1] == "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]


def _is_cpf(text: str) -> bool:
    """Brazil: two check digits mod 11, each over all digits before it."""
    digits = _digits(text)
    if len(set(digits)) == 1:
        return False
    return all(
        digits[size] == _weighted(digits[:size], tuple(range(size + 1, 1, -1))) * 10 % 11 % 10 for size in (9, 10)
    )


def _is_rut(text: str) -> bool:
    """Chile: mod 11 with the weights 2 to 7 from the right; a check digit of ten is written K."""
    number, check = re.sub(r"[.\-]", "", text[:-1]), text[-1].upper()
    total = _weighted(_digits(number)[::-1], (2, 3, 4, 5, 6, 7, 2, 3))
    return check == "0123456789K0"[11 - total % 11]


_MOD_11_WEIGHTS = (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)


def _is_cuit(text: str) -> bool:
    """Argentina: mod 11; nobody is given a number whose check digit would be ten."""
    digits = _digits(text)
    return -_weighted(digits[:10], _MOD_11_WEIGHTS) % 11 == digits[10]


def _is_ruc(text: str) -> bool:
    """Peru: mod 11, ten and eleven written 0 and 1."""
    digits = _digits(text)
    return (11 - _weighted(digits[:10], _MOD_11_WEIGHTS) % 11) % 10 == digits[10]


def _is_cedula(text: str) -> bool:
    """Ecuador: two digits of the province, a third below 6, and Luhn's sum over the ten."""
    digits = _digits(text)
    province = digits[0] * 10 + digits[1]
    return (1 <= province <= 24 or province == 30) and digits[2] < 6 and is_luhn(text)


def _is_curp(text: str) -> bool:
    """Mexico: letters count by their place in an alphabet with Ñ; the weights fall from 18 to 2; mod 10."""
    values = ["0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ".index(char) for char in text.upper()[:17]]
    return int(text[17]) == -_weighted(values, tuple(range(18, 1, -1))) % 10


# ---------------------------------------------------------------------------------------------- detectors

_NOT_BEFORE = r"(?<![\w.+/\-])"  # a number that starts here is not the rest of another, of a date or of a path
_NOT_AFTER = r"(?![\w@]|[.\-/]\d)"
Span = tuple[int, int]
Detector = Callable[[str], Iterator[Span]]


def _pattern(pattern: str, is_valid: Callable[[str], bool] = lambda _: True, flags: int = re.ASCII) -> Detector:
    """Finds what matches and passes; a group `pii` is the finding, where there is one, and the rest its surroundings."""
    compiled = re.compile(pattern, flags)
    group = "pii" if "pii" in compiled.groupindex else 0

    def find(text: str) -> Iterator[Span]:
        return (match.span(group) for match in compiled.finditer(text) if is_valid(match[group]))

    return find


def _either(*detectors: Detector) -> Detector:
    return lambda text: (span for detector in detectors for span in detector(text))


def _after(words: str, number: str) -> str:
    """The number, where one of the words stands before it: `CPF: 12345678909`, `tel. 612345678`, `mi RUC es el ...`."""
    joint = r"[\s.:#=]{0,4}(?i:(?:n[oº°]|number|is|was|es|el|is|at|al|en|on)\b[\s.:]{0,3}){0,2}"
    return rf"(?i:\b(?:{words})\b){joint}(?P<pii>{number}){_NOT_AFTER}"


def _find_ibans(text: str) -> Iterator[Span]:
    """The length of an IBAN is its country's, so that the words behind it do not belong to it."""
    for match in re.finditer(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d(?=[ ]?[A-Za-z0-9])", text, re.ASCII):
        rest = _IBAN_RESTS.get(match[0].upper()[:2])
        whole = rest and rest.match(text, match.end())
        if whole and is_iban(text[match.start() : whole.end()]):
            yield match.start(), whole.end()


def _is_ipv4(text: str) -> bool:
    return all(len(part) < 4 and int(part) < 256 and part == str(int(part)) for part in text.split("."))


def _is_ipv6(text: str) -> bool:
    """At least three groups, or a first one of four characters: `a::b` and `std::dec` are more often code."""
    groups = [group for group in text.split(":") if group]
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return any(char.isdigit() for char in text) and (len(groups) > 2 or (len(groups) > 1 and len(groups[0]) == 4))


def _is_international(text: str) -> bool:
    digits = "".join(map(str, _digits(text)))
    if digits.startswith("00"):
        digits = digits[2:]
    return 8 <= len(digits) <= 15 and re.match(_COUNTRY_CODES, digits) is not None


def _is_number_to_call(text: str) -> bool:
    return 7 <= len(_digits(text)) <= 15 and re.fullmatch(r"(?:19|20)\d\d[-./]\d\d?[-./]\d\d?.*", text) is None


# E.164: the assigned country codes by zone.
_COUNTRY_CODES = (
    r"1[2-9]|7|2[07]|21[123568]|2[2346]\d|25[0-8]|29[01789]|3[0-4691]|35\d|37[0-8]|38[0-35-79]|4[013-9]|42[013]|"
    r"50\d|5[1-8]|59\d|6[0-6]|67\d|68\d|69[012]|8[1246]|85[02356]|88[06]|9[0-58]|96\d|97\d|99[2-68]"
)
_NATIONAL_PHONES = (
    r"\(?[2-9]\d{2}\)[ ]?[2-9]\d{2}[ .\-]\d{4}",  # North America: (415) 555-2671
    r"[2-9]\d{2}([.\-])[2-9]\d{2}\1\d{4}",  # 415-555-2671
    r"1-[2-9]\d{2}-[2-9]\d{2}-\d{4}",  # 1-800-555-2671
    r"[679]\d{2}([ .\-])\d{3}\1\d{3}",  # Spain: 612 345 678
    r"[679]\d{2}([ .\-])\d{2}\1\d{2}\1\d{2}",  # 612 34 56 78
    r"\(\d{2,3}\)[ ]?9?[ ]?\d{4}-?\d{4}",  # Brazil: (11) 91234-5678; Argentina: (011) 4321-1234
    r"0[1-9](?:([ .])\d{2})(?:\1\d{2}){3}",  # France: 06 12 34 56 78
    r"07\d{3}[ ]\d{3}[ ]?\d{3}|02\d[ ]\d{4}[ ]\d{4}|01\d{3}[ ]\d{6}",  # United Kingdom
    r"9[ ]\d{4}[ ]\d{4}",  # Chile: 9 8765 4321
    r"09\d[ \-]?\d{3}[ \-]?\d{4}",  # Ecuador: 099 123 4567
    r"(?:55|33|81)[ \-]\d{4}[ \-]\d{4}",  # Mexico: 55 1234 5678
    r"9\d{2}[ ]\d{3}[ ]\d{3}",  # Peru: 987 654 321
    r"3\d{2}[ ]\d{3}[ ]\d{4}",  # Colombia: 310 456 7890
)
_PHONE_WORDS = (
    r"tel|tels|tél|telf?|tfno|telephone|tel[eé]fonos?|phone|phones|mobile|m[oó]vil|celular|cel|cell|fax|whats?app|"
    r"call|call me|llama|ll[aá]mame|llamar|text me|ring|contact|contacto|fono|telefone"
)

# The length of an IBAN: its countries.
_IBAN_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL",
    19: "MK SI",
    20: "AT BA EE KZ LT LU XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
    32: "LC",
}
_IBAN_LENGTHS = {country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()}
_IBAN_RESTS = {
    country: re.compile(rf"(?:[ ]?[A-Za-z0-9]){{{length - 4}}}(?![A-Za-z0-9])")
    for country, length in _IBAN_LENGTHS.items()
}
_TOKENS = (
    r"A(?:KIA|SIA)[0-9A-Z]{16}",  # Amazon
    r"gh[pousr]_[A-Za-z0-9]{36,255}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{22,255}",
    r"glpat-[A-Za-z0-9_\-]{20,64}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9\-]{10,250}",  # Slack
    r"xapp-[A-Za-z0-9\-]{10,250}",
    r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,250}",  # Stripe
    r"sk-[A-Za-z0-9_\-]{20,250}",  # OpenAI, Anthropic, DeepSeek
    r"AIza[A-Za-z0-9_\-]{35}",  # Google
    r"hf_[A-Za-z0-9]{30,64}",  # Hugging Face
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[A-Za-z0-9_\-]{50,250}",
)
_PRIVATE_KEY = (
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----)[\s\S])*-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:\s{0,4}[A-Za-z0-9+/=]{16,})*)"  # a key that is cut off
)

# Kind -> detector, the more specific first.
_DETECTORS: dict[str, Detector] = {
    "private_key": _pattern(_PRIVATE_KEY),
    "jwt": _pattern(r"(?<![\w\-])eyJ[\w\-]{8,8000}\.eyJ[\w\-]{8,8000}\.[\w\-]{8,8000}"),
    "api_key": _pattern(rf"(?<![A-Za-z0-9_\-])(?:{'|'.join(_TOKENS)})(?![A-Za-z0-9])"),
    "email": _pattern(
        r"(?<![\w.%+\-])[\w%+][\w.%+'\-]{0,63}@(?:[^\W_][\w\-]{0,62}\.){1,8}[^\W\d_]{2,24}(?![\w@])", flags=0
    ),
    "iban": _find_ibans,
    "card": _pattern(rf"{_NOT_BEFORE}\d{{4}}(?:[ \-]?\d){{9,15}}{_NOT_AFTER}", _is_card),
    "curp": _pattern(r"(?i)\b[A-Z][AEIOUX][A-Z]{2}\d{6}[HMX][A-Z]{5}[A-Z0-9]\d\b", _is_curp),
    "cpf": _either(
        _pattern(rf"{_NOT_BEFORE}\d{{3}}\.\d{{3}}\.\d{{3}}-\d{{2}}{_NOT_AFTER}", _is_cpf),
        _pattern(_after("cpf", r"\d{11}"), _is_cpf),
    ),
    "cuit": _either(
        _pattern(rf"{_NOT_BEFORE}(?:2[0347]|3[034])-\d{{8}}-\d{_NOT_AFTER}", _is_cuit),
        _pattern(_after("cui[tl]", r"(?:2[0347]|3[034])\d{9}"), _is_cuit),
    ),
    "ruc": _pattern(_after("ruc", r"(?:1[057]|20)\d{9}"), _is_ruc),
    "cedula": _pattern(_after("c[eé]dula|c\\.?i|identificaci[oó]n", r"\d{9}-?\d"), _is_cedula),
    "rut": _pattern(rf"{_NOT_BEFORE}\d{{1,2}}(?:\.\d{{3}}\.\d{{3}}|\d{{6}})-[\dkK]{_NOT_AFTER}", _is_rut),
    "dni": _pattern(
        rf"{_NOT_BEFORE}(?:\d{{8}}|\d{{2}}\.\d{{3}}\.\d{{3}}|[XYZxyz]-?\d{{7}})[ \-]?[A-Za-z]{_NOT_AFTER}", _is_dni
    ),
    "ssn": _pattern(rf"{_NOT_BEFORE}(?:\d{{3}}-\d{{2}}-\d{{4}}|\d{{3}} \d{{2}} \d{{4}}){_NOT_AFTER}", _is_ssn),
    "ip": _either(
        _pattern(r"(?<![\w.\-])(?<!version )(?<!release )(\d{1,3}(?:\.\d{1,3}){3})(?![\w\-]|\.\d)", _is_ipv4),
        _pattern(r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?![\w:])", _is_ipv6),
    ),
    "phone": _either(
        _pattern(r"(?<![\w+])(?:\+|00)[ ]?[(]?[1-9](?:[ ().\-/]{0,2}\d){6,13}(?!\w)", _is_international),
        # A row of numbers is none of them, so neither may a number go before, nor another follow.
        *(_pattern(rf"{_NOT_BEFORE}(?<!\d )(?:{pattern}){_NOT_AFTER}(?! \d)") for pattern in _NATIONAL_PHONES),
        _pattern(_after(_PHONE_WORDS, r"(?:[(]\d{1,4}[)]|\d)(?:[ .\-/]{0,2}\d){5,14}"), _is_number_to_call, flags=0),
    ),
}
KINDS = tuple(_DETECTORS)


# ---------------------------------------------------------------------------------------------- presidio

_PRESIDIO_KINDS = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "IP_ADDRESS": "ip",
    "US_SSN": "ssn",
    "ES_NIF": "dni",
    "ES_NIE": "dni",
}


def _find_with_presidio(text: str, kinds: Collection[str]) -> list[Pii]:
    entities = [entity for entity, kind in _PRESIDIO_KINDS.items() if kind in kinds]
    results = _presidio().analyze(text=text, language="en", entities=entities) if entities else []
    return [Pii(result.start, result.end, _PRESIDIO_KINDS[result.entity_type]) for result in results]


@functools.cache
def _presidio() -> Any:
    """An analyzer with a blank spaCy pipeline, so without a model to fetch, and without the list of domains that
    tldextract would fetch for each e-mail address: it takes the one it brings along."""
    try:
        spacy = importlib.import_module("spacy")
        tldextract: Any = importlib.import_module("tldextract")
        analyzer = importlib.import_module("presidio_analyzer")
        engines = importlib.import_module("presidio_analyzer.nlp_engine")
    except ImportError as error:
        raise UserError(f"{error.name} is not installed (pii). pip install 'minga[pii]'") from None
    engine = engines.SpacyNlpEngine()
    engine.nlp = {"en": spacy.blank("en")}
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    registry = analyzer.RecognizerRegistry()
    registry.load_predefined_recognizers()
    return analyzer.AnalyzerEngine(nlp_engine=engine, registry=registry, supported_languages=["en"])
