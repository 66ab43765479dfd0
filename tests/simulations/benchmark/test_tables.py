"""Numbers against hand values: intervals, tables, verdicts."""

import csv
import io
import json
from typing import Any

import pytest

from simulations.benchmark.aims import Aim, aims_of
from simulations.benchmark.paired import paired
from simulations.benchmark.tables import (
    MODE_WORDS,
    Number,
    Summary,
    csv_text,
    downstream_measure,
    numbers_of,
    summarise,
    t_interval,
    tables_of,
    wilson,
)
from simulations.downstream.settings import PRETRAINED


def result(method: str = "meduet", seed: int = 0, **changes: Any) -> dict[str, Any]:
    probes = {"scans": 30.0, "patients": 10.0, "site_from_content": 0.4, "chance_site": 0.25}
    row = {"task": "segmentation", "mode": "frozen", "labels": "10%", "test": "seen", "metric": "dice",
           "value": 0.7, "low": 0.65, "high": 0.74, "patients": 12, "draws": 20,
           "resamples": [0.7, 0.71, 0.69], "first_draws": 1, "first_value": 0.6,
           "first_resamples": [0.6, 0.61, 0.59]}  # fmt: skip
    return {
        "key": "k", "data": "phantoms", "method": method, "seed": seed, "measures": {"seen": probes},
        "downstream": [row], "seconds": {"total": 3.0}, **changes,
    }  # fmt: skip


def test_the_t_interval_of_three_seeds_is_students() -> None:
    mean, half = t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-6)  # t(.975, 2 degrees of freedom)


def test_wilsons_interval_is_that_of_the_textbook_and_stays_within_0_and_1() -> None:
    low, high = wilson(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = wilson(1.0, 20)
    assert low == pytest.approx(0.8389, abs=1e-4) and high == pytest.approx(1.0)


def test_several_seeds_give_mean_and_interval_and_one_seed_that_of_the_patients() -> None:
    numbers = numbers_of([result(seed=s) for s in (0, 1, 2)])
    for seed, number in enumerate(n for n in numbers if n.measure == "seen.site_from_content"):
        assert (number.low, number.high) == pytest.approx(wilson(0.4, 10))
        assert number.seed == seed
    measure = downstream_measure("segmentation", "dice", "seen", "frozen", "10%")
    assert measure == "downstream.segmentation.dice.seen.frozen.10%"
    values = (0.6, 0.7, 0.8)
    summary = summarise([Number("phantoms", "meduet", s, measure, v, 0.0, 1.0) for s, v in enumerate(values)])
    ours = summary["phantoms", "meduet", measure]
    assert (ours.value, ours.seeds) == (pytest.approx(0.7), 3)
    assert ours.high == pytest.approx(0.7 + 4.302653 * 0.1 / 3**0.5)
    alone = summarise(numbers_of([result()]))["phantoms", "meduet", measure]
    assert (alone.value, alone.low, alone.high, alone.seeds) == (0.7, 0.65, 0.74, 1)
    assert str(alone) == "0.700 [0.650, 0.740]" and str(Summary(0.5, None, None, 1)) == "0.500"


def test_the_long_table_has_a_row_per_number_and_none_for_failed_cells() -> None:
    failed = {"key": "k", "data": "phantoms", "method": "alone", "seed": 0, "error": "ValueError: no"}
    rows = list(csv.DictReader(io.StringIO(csv_text(numbers_of([result(), failed])))))
    assert {row["method"] for row in rows} == {"meduet"}
    assert {row["measure"] for row in rows} >= {"seen.site_from_content", "seen.patients", "seconds.total"}
    assert json.loads(next(r["value"] for r in rows if r["measure"] == "seen.chance_site")) == 0.25


def test_a_failed_method_stands_in_the_table_with_its_error() -> None:
    summaries = summarise(numbers_of([result()]))
    titles = {"meduet": "FedMeDUET", "alone": "each site alone"}
    probes, downstream = tables_of(
        "phantoms", titles, summaries, {("phantoms", "alone"): "ValueError: a | b"}
    )
    assert probes.rows[0] == ("FedMeDUET", str(summaries["phantoms", "meduet", "seen.site_from_content"]))
    assert probes.rows[1] == ("each site alone", "failed: ValueError: a / b")
    assert "chance: site 0.250" in probes.title
    assert downstream.header == ("method", "seen, labels of 10%", "not above")
    assert downstream.rows == (
        ("FedMeDUET", "0.700 [0.650, 0.740]", ""), ("each site alone", "failed: ValueError: a / b", ""),
    )  # fmt: skip
    assert probes.markdown().splitlines()[2:4] == [
        "| method | site from content, fresh people |",
        "| --- | --- |",
    ]


def verdicts(aims: list[Aim]) -> dict[str, bool | None]:
    return {aim.text: aim.met for aim in aims}


def measured(method: str, measure: str, value: float, low: float, high: float) -> tuple[Any, Summary]:
    return ("phantoms", method, measure), Summary(value, low, high, 1)


def test_verdicts_follow_the_bounds_and_nothing_is_met_that_was_not_measured() -> None:
    summaries = dict(
        measured("meduet", f"seen.{name}", value, value - 0.01, value + 0.01)
        for name, value in {
            "site_from_content": 0.30, "site_from_content_mlp": 0.36, "chance_site": 0.25,
            "patient_from_content": 0.95, "chance_patient": 0.02, "patient_from_style": 0.1,
            "style_gap_closed": 0.6, "counterfactual_psnr": 24.0, "counterfactual_psnr_histogram": 20.5,
        }.items()
    )  # fmt: skip
    found = verdicts(aims_of(["phantoms"], summaries))
    assert found["site from pooled content, linear probe: chance + 5 points at most"] is True
    assert found["site from pooled content, MLP probe: chance + 10 points at most"] is False
    assert found["patient from pooled content across styles: 95%"] is True
    assert found["patient from style: 5 times chance at most"] is True
    assert found["site from style: 95%"] is None
    assert found["swap fidelity: at least that of pooled MeDUET"] is None
    assert found["swap 3 dB nearer to the truth than histogram matching"] is True
    summaries |= dict([measured("pooled", "seen.style_gap_closed", 0.7, 0.6, 0.8)])
    assert (
        verdicts(aims_of(["phantoms"], summaries))["swap fidelity: at least that of pooled MeDUET"] is False
    )


def test_site_and_patient_are_judged_on_the_content_code_where_there_is_one() -> None:
    summaries = dict(
        measured("meduet", f"seen.{name}", value, value, value)
        for name, value in {
            "site_from_content": 0.9, "site_from_code": 0.30, "site_from_code_mlp": 0.36, "chance_site": 0.25,
            "patient_from_content": 0.2, "patient_from_code": 0.96,
        }.items()
    )  # fmt: skip
    found = verdicts(aims_of(["phantoms"], summaries))
    assert found["site from the content code, linear probe: chance + 5 points at most"] is True
    assert found["site from the content code, MLP probe: chance + 10 points at most"] is False
    assert found["patient from the content code across styles: 95%"] is True


def test_a_bound_that_no_share_can_exceed_is_no_aim_met() -> None:
    summaries = dict(
        measured("meduet", f"seen.{name}", value, value, value)
        for name, value in {"patient_from_style": 1.0, "chance_patient": 0.25}.items()
    )
    found = verdicts(aims_of(["phantoms"], summaries))
    assert found["patient from style: 5 times chance at most"] is None


@pytest.mark.parametrize(("rival_high", "expected"), [(0.69, True), (0.71, False)])
def test_above_means_that_intervals_do_not_touch(rival_high: float, expected: bool) -> None:
    def measure(test: str, mode: str = "frozen") -> str:
        return downstream_measure("segmentation", "dice", test, mode, "10%")

    summaries = dict(
        [
            measured("meduet", measure("held_out"), 0.75, 0.70, 0.8),
            measured("fedavg_mae", measure("held_out"), 0.6, 0.5, 0.65),
            measured("alone", measure("held_out"), 0.6, 0.5, rival_high),
        ]
    )
    (aim,) = [a for a in aims_of(["phantoms"], summaries) if "held out" in a.text]
    assert aim.met is None, "without the network from scratch nothing is known"
    summaries |= dict([measured("scratch", measure("held_out", "scratch"), 0.5, 0.4, 0.55)])
    (aim,) = [a for a in aims_of(["phantoms"], summaries) if "held out" in a.text]
    assert aim.met is expected and aim.verdict == ("met" if expected else "not met")
    (near,) = [a for a in aims_of(["phantoms"], summaries) if "within 2%" in a.text]
    assert near.met is None


@pytest.mark.parametrize(("pooled", "expected"), [(0.714, True), (0.716, False)])
def test_within_two_percent_is_relative(pooled: float, expected: bool) -> None:
    measure = downstream_measure("segmentation", "dice", "seen", "finetuned", "100%")
    summaries = dict(
        [measured("meduet", measure, 0.70, 0.6, 0.8), measured("pooled", measure, pooled, 0.6, 0.8)]
    )
    (near,) = [a for a in aims_of(["phantoms"], summaries) if "within 2%" in a.text]
    assert near.met is expected


def cell(method: str, mode: str, value: float, seed: int = 0, wobble: float = 0.0) -> dict[str, Any]:
    (row,) = result()["downstream"]
    resamples = [value + wobble * step for step in (-1, 0, 1)]
    own = row | {
        "mode": mode,
        "value": value,
        "low": resamples[0],
        "high": resamples[-1],
        "resamples": resamples,
    }
    return result(method, seed, downstream=[own])


TITLES = {"meduet": "FedMeDUET", "random": "random encoder", "scratch": "no pretraining"}


def test_every_yardstick_stands_in_the_table_of_a_pretrained_method_which_names_those_it_is_not_above() -> (
    None
):
    results = [
        cell("meduet", "frozen", 0.65, wobble=0.01), cell("random", "frozen", 0.66, wobble=0.01),
        cell("scratch", "label_map", 0.60, wobble=0.01),
    ]  # fmt: skip
    compared = paired("phantoms", results, TITLES)
    assert {(one.rival, one.above) for one in compared} == {("label_map", True), ("random", False)}
    (table,) = [
        t
        for t in tables_of("phantoms", TITLES, summarise(numbers_of(results)), {}, compared)
        if "segmentation" in t.title
    ]
    assert [row[0] for row in table.rows] == [
        "FedMeDUET", "mean training label (reads no scan)", "random encoder, read in the same way",
    ]  # fmt: skip
    assert table.rows[0][-1] == "random encoder, read in the same way: 10%"


def test_differences_of_several_seeds_have_the_t_interval_of_the_seeds() -> None:
    results = [
        cell(method, mode, value + seed / 10, seed)
        for seed in (0, 1, 2)
        for method, mode, value in (("meduet", "frozen", 0.65 + seed / 100), ("scratch", "ridge", 0.6))
    ]
    (one,) = paired("phantoms", results, TITLES)
    mean, half = t_interval([0.05, 0.06, 0.07])
    assert (one.difference, one.low) == (pytest.approx(mean), pytest.approx(mean - half))


def test_an_aim_is_withdrawn_where_what_reads_no_scan_is_not_below_ours() -> None:
    measure = downstream_measure("segmentation", "dice", "seen", "finetuned", "100%")
    summaries = dict(measured(method, measure, 0.70, 0.6, 0.8) for method in ("meduet", "pooled"))
    (near,) = [a for a in aims_of(["phantoms"], summaries, {("phantoms", measure)}) if "within 2%" in a.text]
    assert (near.verdict, near.met) == ("withdrawn", None) and "reads no scan" in near.found


def test_a_network_at_its_start_is_called_so_in_its_row() -> None:
    probes = {"patients": 10.0, "site_from_content": 0.4, "hidden_error": 0.89, "hidden_error_ridge": 0.4,
              "fitted_patients_per_site": 24.0, "fresh_patients_per_site": 9.0}  # fmt: skip
    summaries = summarise(numbers_of([result(measures={"seen": probes}, downstream=[])]))
    (table,) = tables_of("phantoms", {"meduet": "FedMeDUET"}, summaries, {})
    assert table.rows[0][:3] == ("FedMeDUET (network at its start)", "0.890", "0.400")
    assert table.title.endswith("at the smallest hospital 24 people fitted on and 9 fresh people")


def test_every_way_to_read_a_pretrained_encoder_has_words() -> None:
    assert set(PRETRAINED) == set(MODE_WORDS)
