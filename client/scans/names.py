"""What names are called in this field: a date, a visit, a contrast, a group, an id.

Knows words, not files: BIDS, nnU-Net, BraTS, ADNI, OASIS and hospitals' own habits. A word that could be two
things (`T1` the contrast, `T1` the first patient) is settled by its neighbours (`client/scans/patients.py`).

Sources: BIDS specification 1.10, entities; nnU-Net v2, dataset_format.md; BraTS 2018-2023 file names.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

Kind = Literal["date", "visit", "contrast", "site", "group", "container", "uid", "id"]

_MONTH = r"(?:jan|feb|mar|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez)[a-z]{0,6}"
_TIME = r"(?:[T_ .-]?[0-2]\d[:_.h-]?[0-5]\d(?:[:_.m-]?[0-5]\d)?(?:\.\d+)?s?Z?)?"
_YEAR, _MM, _DD = r"(?:19[3-9]|20[0-6])\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_DATE = re.compile(
    rf"(?<![0-9A-Za-z])(?:"
    rf"{_YEAR}([-_.]){_MM}\1{_DD}{_TIME}"  # 2019-03-04, 2006-05-02_12_31_52.0
    rf"|{_YEAR}{_MM}{_DD}{_TIME}"  # 20190304, 20190304_123152
    rf"|\d?\d([-_.])\d?\d\2{_YEAR}{_TIME}"  # 04.03.2019, 3-4-2019
    rf"|{_DD}{_MM}{_YEAR}"  # 04032019
    rf"|\d?\d[-_. ]?{_MONTH}[-_. ]?{_YEAR}|{_YEAR}[-_. ]?{_MONTH}[-_. ]?\d?\d"  # 04Mar2019, 2019-Mar-04
    rf"|{_MONTH}[-_. ]?{_YEAR}|(?<!-){_YEAR}-{_MM}(?!-)"  # Mar2019, 2019-03
    rf")(?![0-9A-Za-z])",
    re.IGNORECASE,
)
_LONE_DATE = re.compile(rf"{_YEAR}([-_.]{_MM})?")
"""A date only where it is a folder's whole name: 2019, 2019_03."""
YEAR = re.compile(_YEAR)
_SHORT_DATE = re.compile(rf"(?:\d\d{_MM}{_DD}|{_DD}{_MM}\d\d)")  # 190304, 040319
_VISIT_WORDS = (
    "ses|sess|session|visit|vis|tp|timepoint|time|t0|scan|exam|examination|study|mr|mri|acq|week|wk|month|months"
    "|mo|mon|year|years|yr|day|days|fu|fup|followup|follow-up|follow|up|bl|base|baseline|screening"
    "|screen|scr|sc|pre|post|preop|postop|pretreatment|posttreatment|pretx|posttx|presurgery|postsurgery|intraop"
    "|prae|before|after|test|retest|re|rescan|repeat|rep|run|initial|init|entry|exit|first|second|third|fourth"
    "|last|final|end|endpoint|acute|subacute|chronic|nadir|progression|recurrence|relapse|wave|round|rx|tx|rt"
    "|treatment|surgery|op|therapy|chemo|verlauf|vorher|nachher|ausgang"
)
_VISIT = re.compile(
    rf"(?:(?:{_VISIT_WORDS})[-_. ]*)+(?:\d{{0,4}}|[a-d]|i{{1,3}}|one|two|three)"
    r"|[vy]\d{0,2}|[mw]\d{0,3}|d\d{0,4}",
    re.IGNORECASE,
)
_NUMBERED_VISIT = re.compile(r"\d{1,3}[-_. ]?(?:months?|mo|m|weeks?|wk|w|years?|yr?|days?|d|st|nd|rd|th)"
                             r"[-_. ]?(?:followup|fu|visit|scan)?", re.IGNORECASE)  # fmt: skip
_GLUED_VISIT = re.compile(
    r"(?i:(?<=[0-9])[-_.]?(?:ses(?:sion)?[-_]?\d+|visit[-_]?\d*|baseline|follow-?up\d*|re-?test|re-?scan"
    r"|(?:bl|fu|tp|v|pre|post)\d{0,2}))$"
    r"|(?<=[a-z])(?:BL|FU\d*|TP\d+|V\d+|Ses\d+|Visit\d*|Baseline|Follow[uU]p\d*|Pre|Post)$"
)
"""A visit without a separator: `sub-9709Ses2`, `P001v2`, `P001BL`."""

_HYPHEN_VISIT = re.compile(r"-(?:ses|session|visit)-?[A-Za-z0-9]+(?![A-Za-z0-9])", re.IGNORECASE)
"""A visit within words joined by hyphens: `P001-ses-02-T1`."""
_CONTRASTS: dict[str, str] = {
    "t1": "t1 t1w t1n t1wi t1pre mprage mp2rage fspgr irspgr ir-fspgr spgr bravo tfl3d 3dt1",
    "t1ce": "t1ce t1c t1gd t1post t1wce t1cw t1km t1contrast t1+c t1wgd t1-ce t1-gd t1-post",
    "t2": "t2 t2w t2wi",
    "flair": "flair t2f t2flair t2-flair fl tirm",
    "t2star": "t2star t2starw t2s t2* t2starmap",
    "pd": "pd pdw pdt2",
    "ct": "ct ncct cect ldct cbct ctac",
    "dwi": "dwi dti dwib0 trace",
} | {
    word: word
    for word in (
        "adc swi swan mra mrv tof bold asl cbf cbv dsc dce fa qsm t1map t2map t1rho r1map r2starmap unit1"
        " uni inv1 inv2 mtr mton mtoff mt0 mt1 cta pet fdg spect pib av45 water fat inphase outphase opphase"
        " in-phase art ven portal venous arterial delayed hbp cine phase magnitude mag real imag imaginary b0"
        " b1000 sbref epi gre mt pwi perf perfusion ktrans stir dixon"
    ).split()
}
_CONTRAST_OF = {word: contrast for contrast, words in _CONTRASTS.items() for word in words.split()}
_STRONG = frozenset("t1 t1ce t2 flair t2star ct dwi adc swi pet bold".split())
"""Contrasts that no initials of a person or a hospital spell."""
_PLACEHOLDER = re.compile(
    r"(?:anon|anonym|anonymous|anonymous?i[sz]ed|anonymi[sz]ed|anonymi[sz]e|anonymisiert|anonyme|unknown|unkn|none|null"
    r"|na|nan|noname|noid|nobody|name|id|patient|patientid|patientname|subject|xxx+|deidentified|deid|removed"
    r"|redacted|hidden|private|default|empty|blank|unspecified|notspecified|notavailable|notapplicable|unidentified"
    r"|johndoe|janedoe|doe|test|testpatient|dummy|phantom|pseudonym|tbd|temp|missing|noidentity|nopatient|0+|9{3,})",
)
_SITE = re.compile(
    r"(?:site|center|centre|zentrum|hospital|clinic|klinik|scanner|inst|institution|institute|cohort|dataset"
    r"|collection|vendor|siemens|philips|ge|toshiba|canon|hitachi|uih)(?:[-_ ][a-z0-9]{1,12}|\d{0,3}[a-z]?)",
    re.IGNORECASE,
)
_GROUP = re.compile(
    r"(?:train|training|trainset|val|valid|validation|testing|testset|holdout"
    r"|(?:fold|split|part|batch)[-_ ]?\d+|hgg|lgg|gbm|ad|mci|emci|lmci|cn|smc|hc|nc|ms|pd|controls?|healthy"
    r"|patients|cases|normals?|abnormals?|diseased?|males?|females?|adults?|children|paediatric|pediatric|positive|negative"
    r"|benign|malignant|ixi|oasis|adni|labelled|unlabelled|f)",
    re.IGNORECASE,
)
_CONTAINER = re.compile(
    r"(?:images?|images?t[rsv]|scans?|volumes?|data|raw|rawdata|sourcedata|source|nifti|nii|niftis|dicoms?"
    r"|dcm|mri|mr|anat|anatomical|func|functional|fmap|perf|structural|struct|imaging|export|output|input"
    r"|processed|preprocessed|original|orig|pseudonymi[sz]ed|neuro|head|brain|series[-_ ]?\d*|ser[-_ ]?\d+"
    r"|dicomdir|files?|nifti_files|bids)",
    re.IGNORECASE,
)
_UID = re.compile(
    r"\d+(?:\.\d+){4,}|[0-9a-f]{32,64}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE
)
_DESCRIPTOR = re.compile(
    r"(?:sag|sagittal|cor|coronal|ax|axial|tra|trans|transversal|transverse|obl|oblique|[23]d|iso|\d+mm|[1-7](?:\.\d+)?t"
    r"|tse|fse|se|gd|contrast|brain|head|neck|whole|bet|n4|n3|bias|biascorr|biascorrected|corrected|corr|reg"
    r"|registered|rigid|affine|nonlin|mni|mni152|std|standard|native|norm|normali[sz]ed|defaced|deface|raw|preproc"
    r"|preprocessed|proc|resampled|res|cropped|crop|skullstripped|stripped|masked|image|img|vol|volume|nifti"
    r"|mag|ph|pha|e\d|echo\d+|te\d+|ti\d+|fa\d+|run\d*|rec|orig|original|wip|dis[23]d|nd|mpr|avg|mean|ps|psr|sense"
    r"|fs|fatsat|ir|gad|gado|post|pre|neuro|conv|copy|final)",
    re.IGNORECASE,
)
_ENTITY = re.compile(
    r"(?:ses|run|acq|rec|dir|echo|part|space|desc|res|ce|inv|task|chunk|den|label|flip|mt|mod|hemi|split|from|to"
    r"|mode|trc|sample|tracksys|stain|recording|proc|atlas|seg)-[A-Za-z0-9]+"
)
"""Entities of BIDS that do not say who."""
_CHANNEL = re.compile(r"(.+)_(00\d\d)")
_TOKEN = re.compile(r"[^_. +]+")


def readable(name: str) -> str:
    """A name from a disk as text: bytes that are not UTF-8 become the Latin-1 letters they can only be, or
    `\\xNN`; composed as Unicode's NFC, so that one name typed on two systems is one name."""
    try:
        raw = os.fsencode(name)
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        latin = all(byte < 0x80 or byte >= 0xC0 for byte in raw)  # letters, in Latin-1 and in Windows-1252
        text = raw.decode("latin-1") if latin else raw.decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return unicodedata.normalize("NFC", text)


def is_placeholder(patient: str) -> bool:
    """Whether an id is what software writes where it took one away: `ANONYMOUS`, `***`, `0000`, nothing."""
    plain = "".join(letter for letter in patient.lower() if letter.isalnum())
    return not plain or _PLACEHOLDER.fullmatch(plain) is not None


def contrast_of(name: str, strong: bool = False) -> str:
    """The contrast that a word says (`t1` of `T1w`), or ""; `strong`: only of words that are nothing else."""
    plain = name.lower().strip("-_")
    contrast = _CONTRAST_OF.get(plain, "")
    return contrast if contrast and (not strong or contrast in _STRONG) else ""


def contrast_in(name: str) -> str:
    """The word of a name, extension left out, that says its contrast: the last one, as written, or ""."""
    pieces = [*_TOKEN.findall(name)]
    words = [word for piece in pieces for word in (piece, *piece.split("-"))]
    contrasts = [word for word in words if contrast_of(word)]
    strong = [word for word in contrasts if contrast_of(word, strong=True)]
    if contrasts and _given_after(words, contrasts[-1]) and contrast_of(contrasts[-1]) == "t1":
        return f"{contrasts[-1]}ce"
    found = strong or contrasts
    return found[-1] if found else ""


def _given_after(words: list[str], contrast: str) -> bool:
    """`T1_post`, `T1w_gd`: a contrast agent named beside a T1."""
    rest = {word.lower() for word in words[words.index(contrast) + 1 :]}
    return bool(rest & {"gd", "gad", "gado", "ce", "km", "post", "contrast", "c"})


@lru_cache(maxsize=200_000)
def kind_of(name: str) -> Kind:
    """What a folder of this name is, asked for the name alone."""
    if _UID.fullmatch(name):
        return "uid"
    if _LONE_DATE.fullmatch(name):
        return "date"
    rest = _DATE.sub("", name)
    if rest != name and not re.search(r"[A-Za-z]|\d{4}", rest):
        return "date"  # and at most a number beside it: 2019-03-04_1
    if _is_visit(name) or (rest != name and _is_visit(rest.strip("-_. "))):
        return "visit"
    if contrast_of(name, strong=True) or _CONTRAST_OF.get(name.lower()):
        return "contrast"
    for kind, pattern in (("container", _CONTAINER), ("site", _SITE), ("group", _GROUP)):
        if pattern.fullmatch(name):
            return kind  # type: ignore[return-value]
    return "contrast" if not _person_like(name) and contrast_in(name) else "id"


def _is_visit(name: str) -> bool:
    return bool(_VISIT.fullmatch(name) or _NUMBERED_VISIT.fullmatch(name))


def _after_an_id(words: list[str]) -> bool:
    return any(not _is_idle(word) and not _CONTAINER.fullmatch(word) for word in words)


def _is_idle(word: str) -> bool:
    """Whether a word at the end of a name is none of the id."""
    return _is_visit(word) or bool(contrast_of(word)) or bool(_DESCRIPTOR.fullmatch(word))


def _person_like(name: str) -> bool:
    """Whether something is left of a name when its contrasts and descriptors go."""
    return any(not (_DESCRIPTOR.fullmatch(word) or contrast_of(word)) and re.search(r"\d", word)
               for word in re.split(r"[-_. +]", name))  # fmt: skip


def shape_of(name: str) -> str:
    """Letters and digits by kind, runs as one: `P001` and `X27` have the shape `a0`."""
    return re.sub(r"0+", "0", re.sub(r"a+", "a", re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "0", name))))


@lru_cache(maxsize=200_000)
def subject_of(part: str) -> str:
    """The BIDS subject that a name begins with (`sub-HUB-001`), its visit cut off; or ""."""
    match = re.match(r"sub-[^_]+", part)
    if match is None:
        return ""
    stem = re.sub(r"\.nii(\.gz)?$", "", match[0], flags=re.IGNORECASE)
    stem = _GLUED_VISIT.sub("", _HYPHEN_VISIT.sub("", stem))
    pieces = _DATE.sub("", stem).split("-")
    while len(pieces) > 2 and (not pieces[-1] or _is_idle(pieces[-1])):
        pieces.pop()
    return "-".join(pieces) if pieces[1:] and pieces[1] else ""


@lru_cache(maxsize=200_000)
def person_in(name: str, short_dates: bool = False) -> str:
    """What is left of a name (extension left out) when dates, visits, contrasts and descriptors go.

    "" when nothing is. `short_dates`: whether six digits are a date here, where they do not come first.
    """
    text = _HYPHEN_VISIT.sub("", _DATE.sub("", name))
    tokens = list(_TOKEN.finditer(text))
    words = [match[0] for match in tokens]
    kept = [
        not (
            _ENTITY.fullmatch(word)
            or (short_dates and _after_an_id(words[:place]) and _SHORT_DATE.fullmatch(word))
        )
        for place, word in enumerate(words)
    ]
    kept = [keep and bool(word.strip("-")) for keep, word in zip(kept, words, strict=True)]
    _strip(words, kept, range(len(words) - 1, -1, -1))
    _strip(words, kept, range(len(words)), leading=True)
    inner = [i for i, keep in enumerate(kept) if keep]
    for index in inner[1:]:  # a visit or a strong contrast between an id and what follows
        if _is_visit(words[index]) or contrast_of(words[index], strong=True):
            kept[index] = False
    parts = [(match, word) for match, word, keep in zip(tokens, words, kept, strict=True) if keep]
    joined = ""
    for number, (match, word) in enumerate(parts):
        joined += (text[match.start() - 1] if number else "") + _within(word, last=number == len(parts) - 1)
    return _GLUED_VISIT.sub("", joined).strip("-_. ")


def _strip(words: list[str], kept: list[bool], order: Iterable[int], leading: bool = False) -> None:
    """Drop what is no id from one end of a name, inwards, until a word that may be one."""
    for index in order:
        word = words[index]
        if not kept[index]:
            continue
        if leading:
            idle = bool(contrast_of(word, strong=True)) or bool(_CONTAINER.fullmatch(word))
        else:
            idle = _is_idle(word) or all(_is_idle(piece) for piece in word.split("-") if piece)
        if not idle:
            return
        kept[index] = False


def _within(word: str, last: bool) -> str:
    """One word of an id, its own hyphenated tail of visits and contrasts cut off."""
    pieces = word.strip("-").split("-")
    while last and len(pieces) > 1 and (not pieces[-1] or _is_idle(pieces[-1])):
        pieces.pop()
    return "-".join(pieces)


@lru_cache(maxsize=200_000)
def visit_in(name: str, short_dates: bool = False) -> str:
    """The dates and visits that a name holds, as written, joined by spaces; "" when it holds none."""
    if kind_of(name) in ("date", "visit"):
        return name
    visits = [match[0] for match in _DATE.finditer(name)]
    visits += [match[0].strip("-") for match in _HYPHEN_VISIT.finditer(name)]
    for word in _TOKEN.findall(_DATE.sub("", name)):
        if word.startswith(("ses-", "visit-")) or (short_dates and _SHORT_DATE.fullmatch(word)):
            visits.append(word)
        elif not _ENTITY.fullmatch(word):
            visits += [piece for piece in word.split("-") if _is_visit(piece) and not contrast_of(piece)]
    glued = _GLUED_VISIT.search(name.partition("_")[0])
    return " ".join([*visits, *([glued[0]] if glued else [])])


def channels_of(stems: Iterable[str]) -> dict[str, tuple[str, str]]:
    """nnU-Net's channels: for each of these names that ends in one, what comes before it, and the channel.

    Four digits are a channel where some file has channel 0000 and what comes before tells cases apart; else
    they are numbers (IMG_0000, IMG_0001, …).
    """
    found = {stem: (match[1], match[2]) for stem in stems if (match := _CHANNEL.fullmatch(stem))}
    before = {start for start, _ in found.values()}
    several = len(before) > 1 or any(re.search(r"\d", start) for start in before)
    return found if several and any(channel == "0000" for _, channel in found.values()) else {}


def alike(patient: str) -> str:
    """A name without case, punctuation, leading zeros and visit: what two spellings of one patient share."""
    plain = person_in(_GLUED_VISIT.sub("", patient)) or patient
    letters = re.sub(r"[\W_]", "", plain.casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"^sub(?=[a-z0-9])", "", letters))


def all_short_dates(names: Iterable[str]) -> bool:
    """Whether six digits are a date in all of these names where they stand alone, and there are any."""
    tokens = [word for name in names for word in re.split(r"[-_. +]", name) if re.fullmatch(r"\d{6}", word)]
    return bool(tokens) and all(_SHORT_DATE.fullmatch(token) for token in tokens)
