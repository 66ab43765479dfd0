"""Sums of few patients are not sums: from whom they may leave, and the sentence of a site that lets them.

The sum of a patient's vector times itself, over fewer patients than the vector is wide, spans their vectors
and nothing else: whoever holds another copy of a scan can tell whether it is among them, and what was
measured of that patient. Far more patients than numbers blur that, so such sums leave only above
`PATIENTS_PER_NUMBER` times the width. A mean spans nobody, but leans towards each of its patients: whoever
holds a scan and knows what is usual can guess whether it is among them, the better the more numbers the mean
has and the fewer patients are behind it (an advantage of about the square root of numbers over patients, in
standard deviations). So means leave from one patient per number, where that advantage is at most one. Fewer
patients: where site.yaml says that these may leave, in the words of `EXACT_SUMS_CONSENT`. Does not do:
promise that larger sums tell nothing; they are not noised.
"""

PATIENTS_PER_NUMBER = 10
"""Patients for each number of a vector whose products are summed."""
PATIENTS_PER_MEAN = 1
"""Patients for each number of a vector that is summed itself."""
EXACT_SUMS_CONSENT = (
    "We release exact sums over few of our patients, from which it can be told whether a known scan is among "
    "them and what was measured of that patient, to the coordinating centre."
)
"""What site.yaml must say, in these words, before sums over fewer patients leave."""


class TooFewForSums(ValueError):
    """Too few patients for sums, and the site has not agreed to let these leave."""


def check_sentence(sentence: str) -> None:
    """Raise `ValueError` unless site.yaml's `allow_exact_sums` is empty or the sentence."""
    if sentence not in ("", EXACT_SUMS_CONSENT):
        raise ValueError(
            f"Expected allow_exact_sums to be left out, or to be, word for word: {EXACT_SUMS_CONSENT!r}; got "
            f"{sentence[:60]!r}."
        )


def fewest_patients(width: int) -> int:
    """Fewest patients behind sums of products of vectors of this width."""
    return PATIENTS_PER_NUMBER * width


def fewest_for_means(numbers: int) -> int:
    """Fewest patients behind a mean of so many numbers."""
    return PATIENTS_PER_MEAN * numbers


def check_sums(patients: int, width: int, agreed: bool) -> None:
    """Raise `TooFewForSums` where products of vectors of `width` numbers may not be summed over so few
    patients; `agreed`: the site lets them leave all the same."""
    if not agreed and patients < fewest_patients(width):
        raise TooFewForSums(
            f"Expected at least {fewest_patients(width)} patients behind sums of products of {width} "
            f"numbers; got {patients}. site.yaml may agree to fewer (allow_exact_sums). Nothing is told."
        )


def check_means(patients: int, numbers: int, agreed: bool) -> None:
    """Raise `TooFewForSums` where a mean of so many numbers may not leave over so few patients; `agreed`: the
    site lets it leave all the same."""
    if not agreed and patients < fewest_for_means(numbers):
        raise TooFewForSums(
            f"Expected at least {fewest_for_means(numbers)} patients behind a mean of {numbers} numbers; got "
            f"{patients}. site.yaml may agree to fewer (allow_exact_sums). Nothing is told."
        )
