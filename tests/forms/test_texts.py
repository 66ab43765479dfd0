"""JSON, YAML and names from elsewhere: what two readers could take for two things is refused, in one line."""

import json

import pytest
import yaml

from forms.json_text import DEEPEST, canonical, read_json
from forms.names import SITE, Letters
from forms.yaml_text import read_yaml

HARMLESS = {"a": 1, "b": [1.5, -2e-7, True, None, "é\n"], "c": {"d": {}}}


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "NaN",
        '{"a": -Infinity}',
        "[1e999]",
        "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
        '{"a":' * 100_000,
        "1" * 5000,
        "0." + "1" * 5000,
        "[1,",
        "",
        b"\xff\xfe",
        b'"\xed\xa0\x80"',
        " " * 8_000_001,
    ],
    ids=lambda text: f"{text[:12]!r}…",
)
def test_json_that_is_not_one_plain_value_ends_in_one_line(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="Expected JSON") as refused:
        read_json(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_what_is_written_canonically_is_read_back() -> None:
    assert read_json(canonical(HARMLESS)) == HARMLESS
    assert read_json('"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\"[["') == "[" * 36 + '"[['


def test_the_standard_reader_accepts_what_this_one_refuses() -> None:
    assert json.loads('{"a": 1, "a": 2}') == {"a": 2} and json.loads("NaN") != json.loads("NaN")
    with pytest.raises(RecursionError):
        json.loads('{"a":' * 100_000)
    assert yaml.safe_load("a: 010") == {"a": 8} and yaml.safe_load("a: 10\na: 2") == {"a": 2}
    assert yaml.safe_load("a: 1:30") == {"a": 90} and yaml.safe_load("a: no") == {"a": False}


@pytest.mark.parametrize(
    "text",
    [
        "a: 10\na: 2",
        "a: &x [1]\nb: *x",
        "a: &x 1",
        "a: !!str 1",
        "a: !!python/object/apply:os.getcwd []",
        "1: 2",
        "? [a]\n: 2",
        "[" * 50,
        "- " * 50 + "a",
        "a: 2027-02-30",
        "a: \x1b[31m",
        "a: 1\n---\na: 2",
        "a: [",
        b"\xff\xfe\x00",
        "a: " + "x" * 100_001,
    ],
    ids=lambda text: f"{text[:12]!r}…",
)
def test_yaml_that_could_be_read_in_two_ways_ends_in_one_line(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="Expected YAML") as refused:
        read_yaml(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "word", ["010", "0x10", "1_000", "12:30", "yes", "no", "on", ".nan", ".inf", "1e999", "<<"]
)
def test_yaml_words_that_look_like_other_values_stay_words(word: str) -> None:
    assert read_yaml(f"a: {word}") == {"a": word}


def test_yaml_as_people_write_it_is_read() -> None:
    text = "a: 1\nb: [1.5, -2e-7, true, ~]\nc: {d: 'x', e: }\nf: 18:00-06:00\n"
    expected = {"a": 1, "b": [1.5, -2e-7, True, None], "c": {"d": "x", "e": None}, "f": "18:00-06:00"}
    assert read_yaml(text) == expected == read_yaml(text.encode())


@pytest.mark.parametrize(
    "name", ["", "-a", "a b", "a\n", "a\x1b[2K", "a\u202eb", "a\u200b", "[red]a", "á", "a" * 64, "../a", "а"]
)
def test_a_site_has_no_name_that_acts_hides_or_looks_like_another(name: str) -> None:
    with pytest.raises(ValueError, match="site to be 1 to 63 letters"):
        SITE.check(name, "site")


def test_a_name_has_one_spelling() -> None:
    letters = Letters(".*", "anything")
    letters.check("caf\u00e9", "name")
    with pytest.raises(ValueError):
        letters.check("cafe\u0301", "name")
