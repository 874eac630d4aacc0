"""The verdict on hand-made and on random totals: what it says is true of the rows."""

import math
import random

import numpy as np
import pandas as pd
import pytest

from loraq_sim.results.choice import latency_accuracy
from loraq_sim.results.verdict import verdict_of

AIE2 = latency_accuracy("aie2")[0]


def total(split, error, latency, weights, accelerator="aie2", **more):
    known = None if latency is None else latency
    return {
        **{"dump": "m.pt", "split": split, "accelerator": accelerator, "method": "loraq"},
        **{"output_error": error, "weight_error": 0.1, "latency_s": known},
        **{"weight_bytes": weights, "bits_per_weight": 4.5, "seed": 0, "status": "ok"},
        **{"energy_j": None if latency is None else 2 * latency, "dram_bytes": 3 * weights},
    } | more


MIB = 2**20
TIED = [
    total("W4A4", 0.15, 1.00e-3, 1.0 * MIB),
    total("W4A4+W8A8r16", 0.07, 1.02e-3, 1.2 * MIB),
    total("W8A8", 0.01, 1.05e-3, 2.0 * MIB),
]
APART = [
    total("W4A4", 0.20, 1.0e-3, 1.0e6),
    total("W4A4+W8A8r16", 0.05, 1.2e-3, 1.1e6),
    total("W4A4+W8A8r64", 0.04, 2.0e-3, 1.5e6),
    total("W8A8", 0.03, 4.0e-3, 2.0e6),
]


def test_tied_latencies_leave_it_to_the_error_and_the_bytes_would_change_it():
    verdict = verdict_of(TIED)
    assert (verdict.split, verdict.headline) == ("W8A8", "Build W8A8 on aie2")
    assert verdict.ties == ("W4A4+W8A8r16", "W4A4")
    assert "The latencies of all 3 splits lie within 7.3 %" in verdict.why
    assert (
        "W8A8 wins unless latency must stay below 1.05 ms, weight memory below 2.00 MiB, energy "
        "below 2.10 mJ or DRAM traffic below 6.00 MiB (then W4A4+W8A8r16 with 7.00 % output error)."
    ) in verdict.text.split("\n")
    bytes_limit = [c for c in verdict.would_change if c.column == "weight_bytes"]
    assert [(c.below, c.down_to, c.split) for c in bytes_limit] == [
        (2.0 * MIB, 1.2 * MIB, "W4A4+W8A8r16"),
        (1.2 * MIB, 1.0 * MIB, "W4A4"),
    ]


def test_latencies_apart_are_weighed_against_the_error():
    verdict = verdict_of(APART)
    assert verdict.label == "W4A4+W8A8r16"
    assert verdict.is_fit
    assert "W4A4 has the least latency; the choice has 4.0× less error than W4A4" in verdict.why
    assert "for +20 % latency and +10 % weight memory" in verdict.why
    assert "Least error of all: W8A8 cuts the error of W4A4+W8A8r16 by 40 %" in verdict.why
    assert verdict.ties == ()
    assert verdict.on["aie2"] is not None
    assert str(verdict) == verdict.text


def test_a_frame_gives_the_same_verdict():
    assert verdict_of(pd.DataFrame(APART)).text == verdict_of(APART).text


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        ([], "No split could be evaluated"),
        ([total("W4A4", None, 1.0, 1, status="failed")], "No split could be evaluated on aie2"),
        ([total("W4A4", 0.1, 1.0, 1)], "Build W4A4 on aie2"),
        (
            [total("W4A4", 0.31, 1.0, 1)],
            "No split is fit to build on aie2: the best trade, W4A4, has 31.0 % output error",
        ),
        (
            [total("W4A4", math.inf, 1.0, 1, status="overflow")],
            "No split is fit to build on aie2: every output is infinite or NaN",
        ),
        (
            [total("W4A4", None, 1.0, 1, status="overflow"), total("W8A8", 0.1, 2.0, 2)],
            "Build W8A8 on aie2",
        ),
    ],
)
def test_headlines(rows, headline):
    verdict = verdict_of(rows)
    assert verdict.headline == headline
    assert verdict.text.split("\n")[0] == headline
    assert verdict.is_fit == headline.startswith("Build")


def test_errors_above_a_quarter_and_infinite_ones_are_said():
    bad = verdict_of([total("W4A4", 0.31, 1.0, 1), total("W4A8", 0.28, 1.0, 1)])
    assert bad.split == "W4A8"
    assert not bad.is_fit
    assert "28.0 % is above the 25 %" in bad.text
    rows = [total("W4A4", None, 1.0, 1, status="overflow"), total("W8A8", 0.1, 2.0, 2)]
    assert "W4A4: outputs that are infinite or NaN" in verdict_of(rows).text
    clipped = verdict_of([total("W8A8", 0.1, 2.0, 2, clipped_count=1234)])
    assert "1,234 float values of W8A8 are beyond their format" in clipped.text
    limited = verdict_of([*APART, total("W2A4", 0.4, 0.5e-3, 0.5e6)])
    assert "W2A4 with 40.0 % output error, more than 25 %" in str(
        [str(change) for change in limited.would_change]
    )


def test_weights_only_rows_are_ranked_by_the_weight_error_and_bytes():
    rows = [
        total("W4A4", None, None, 1.0e6, weight_error=0.12),
        total("W4A4+W8A8r16", None, None, 1.2e6, weight_error=0.05),
        total("W8A8", None, None, 4.0e6, weight_error=0.045),
    ]
    verdict = verdict_of(rows)
    assert (verdict.error, verdict.cost) == ("weight_error", "weight_bytes")
    assert verdict.split == "W4A4+W8A8r16"
    assert "Ranked by the error of the weights" in verdict.text
    assert "Latencies are not known; weight memory is weighed against the error." in verdict.text
    assert "5.00 % weight error" in verdict.why


def test_costs_that_only_some_have_leave_the_others_out_and_say_so():
    verdict = verdict_of([*APART, total("W6A6", 0.001, None, 10.0)])
    assert verdict.split == "W4A4+W8A8r16"
    assert "1 split without a known latency did not compete." in verdict.text


def test_seeds_are_one_candidate_and_their_spread_a_tie():
    rows = [
        *(
            total("W4A4+W8A8r16", e, 1e-3, 2.0e6, seed=s)
            for s, e in enumerate((0.10, 0.103, 0.099))
        ),
        total("W4A4+W4A4r32", 0.102, 1e-3, 1.0e6),
        total("W4A4", 0.2, 1e-3, 0.5e6),
    ]
    verdict = verdict_of(rows)
    assert verdict.label == "W4A4+W4A4r32"
    assert "W4A4+W8A8r16, which differs in error by no more than the 4.0 % between seeds" in (
        verdict.text
    )
    alone = verdict_of([row for row in rows if row["seed"] == 0])
    assert alone.label == "W4A4+W8A8r16"
    assert verdict_of(rows[:3]).row["output_error"] == 0.10


def test_settings_are_named_where_they_tell_cases_apart():
    rows = [total("W4A4", e, 1e-3, 1e6, acc_bits=b) for e, b in ((0.2, 16), (0.1, 24))]
    verdict = verdict_of(rows)
    assert (verdict.split, verdict.label) == ("W4A4", "W4A4 (acc 24)")


def test_accelerators_that_agree_share_the_headline_and_others_get_one_split_for_all():
    same = [row | {"accelerator": name} for name in ("aie2", "h100") for row in APART]
    verdict = verdict_of(same)
    assert verdict.headline == "Build W4A4+W8A8r16 on aie2 and h100"
    assert (verdict.split, verdict.joint) == ("W4A4+W8A8r16", "")
    assert set(verdict.on) == {"aie2", "h100"}
    gpu = [
        total("W4A4", 0.20, 1.0e-4, 1.0e6, "h100"),
        total("W4A4+W8A8r16", 0.05, 5.0e-4, 1.1e6, "h100"),
        total("W4A4+W8A8r64", 0.04, 6.0e-4, 1.5e6, "h100"),
        total("W8A8", 0.005, 1.5e-4, 2.0e6, "h100"),
    ]
    verdict = verdict_of(APART + gpu)
    assert verdict.headline == "Build W4A4+W8A8r16 on aie2 and W8A8 on h100"
    assert verdict.joint.startswith(f"One split for all of aie2 and h100: {verdict.split}, with")
    assert verdict.split in {row["split"] for row in APART}
    assert verdict.text.split("\n")[1] == verdict.joint
    none = verdict_of([APART[0], *[row for row in gpu if row["split"] == "W8A8"]])
    assert none.split is None
    assert "No split has a result on all of aie2 and h100." in none.text
    wild = [
        row | {"accelerator": "t4", "status": "overflow", "output_error": None} for row in APART
    ]
    assert "No split is fit to build on all of aie2 and t4." in verdict_of(APART + wild).text


def test_layers_without_a_result_are_said():
    rows = [row | {"n_layers": 18, "n_missing": 2} for row in APART]
    assert verdict_of(rows).notes == ("2 of 20 layers missing: no number here counts them.",)
    assert verdict_of(rows).text.endswith("\n2 of 20 layers missing: no number here counts them.")
    whole = [row | {"n_layers": 20, "n_missing": 0} for row in APART]
    assert "missing" not in verdict_of(whole).text


def random_totals(rng):
    count = rng.randint(1, 14)
    base = rng.choice([1e-5, 1e-3, 0.4])
    return [
        total(
            f"W4A4+W8A8r{i}",
            rng.choice([0.3, 0.5, math.inf, round(rng.uniform(0.002, 0.25), 4)]),
            base * rng.choice([1.0, 1.04, 1.2, round(rng.uniform(1, 4), 3)]),
            rng.choice([1e6, 2e6, rng.randint(10**5, 10**7)]),
            energy_j=rng.choice([None, rng.uniform(1, 3)]),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_what_would_change_it_does(seed):
    rows = random_totals(random.Random(seed))
    verdict = verdict_of(rows)
    for change in verdict.would_change:
        middle = np.nextafter(change.below, 0)
        for limit in (change.down_to, middle, (change.down_to + middle) / 2):
            within = [r for r in rows if r[change.column] is not None and r[change.column] <= limit]
            assert verdict_of(within).split == change.split, (change, limit)
        # The limit in words is one, too.
        words = str(change).split(" must stay below ")[1].split(":")[0]
        number, unit = words.split()
        size = {"%": 1e-2, "s": 1, "ms": 1e-3, "µs": 1e-6, "J": 1, "mJ": 1e-3}
        size |= {"B": 1, "KiB": 2**10, "MiB": 2**20}
        value = float(number.replace(",", "")) * size[unit]
        assert change.down_to < value <= change.below * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_better_beyond_ties(seed):
    rows = random_totals(random.Random(1000 + seed))
    verdict = verdict_of(rows)
    finite = [r for r in rows if math.isfinite(r["output_error"])]
    assert (verdict.row is None) == (not finite)
    if verdict.row is None:
        return
    best = verdict.row
    assert verdict.is_fit == any(r["output_error"] <= 0.25 for r in finite)
    for row in finite:
        tied = row["latency_s"] <= best["latency_s"] * (1 + AIE2)
        assert not (tied and row["output_error"] < best["output_error"])
        faster = row["latency_s"] * (1 + AIE2) < best["latency_s"]
        assert not (faster and row["output_error"] <= best["output_error"])


def test_the_plain_form_has_everything_json_needs():
    import json

    plain = json.loads(json.dumps(verdict_of(APART).as_dict()))
    assert plain["split"] == "W4A4+W8A8r16"
    assert plain["text"] == verdict_of(APART).text
    assert plain["would_change"][0]["text"] in map(str, verdict_of(APART).would_change)
    both = [row | {"accelerator": name} for name in ("aie2", "h100") for row in APART]
    assert set(verdict_of(both).as_dict()["on"]) == {"aie2", "h100"}


@pytest.mark.parametrize("column", ["output_error", "latency_s", "weight_bytes", "energy_j"])
@pytest.mark.parametrize("value", [None, math.inf, -math.inf, math.nan, -1.0, 0.0])
def test_values_no_release_wrote_are_left_out(column, value):
    odd = TIED[0] | {column: value}
    for rows in ([odd], [odd, TIED[1]], [odd, APART[0] | {"accelerator": "h100"}]):
        verdict = verdict_of(rows)
        assert verdict.headline
        verdict.as_dict()
    if column == "output_error" and value == -1.0:
        assert verdict_of([odd, TIED[1]]).split == TIED[1]["split"]


def test_a_split_that_loses_for_the_rounding_of_p_says_so_with_the_cure():
    rows = [
        total("W4A4", 0.10, 1.0e-3, 1e6, activation_error_share=0.8),
        total(
            *("W4A4+W4A4r16", 0.153, 1.0e-3, 1.1e6),
            **{"p_error_share": 0.87, "wide_p_error": 0.055, "p_format": "int4/g64/fp16"},
        ),
        total(
            *("W4A4+W8A8r16", 0.08, 1.0e-3, 1.3e6),
            **{"p_error_share": 0.02, "wide_p_error": 0.079, "p_format": "int8/g64/fp16"},
            activation_error_share=0.9,
        ),
    ]
    verdict = verdict_of(rows)
    assert verdict.split == "W4A4+W8A8r16"
    assert verdict.notes == (
        "W4A4+W4A4r16 loses because P rounded to 4 bits causes 87 % of its squared error; a 16-bit "
        "P gives 5.50 %, and W4A4 without a branch 10.0 %.",
        "90 % of the squared error of W4A4+W8A8r16 is rounding the activations of its main branch.",
    )
    assert all(note in verdict.text for note in verdict.notes)
    # A few percent are reason enough where they make a branch that helps one that harms.
    rows[1] |= {"output_error": 0.105, "p_error_share": 0.3, "wide_p_error": 0.09}
    assert "W4A4+W4A4r16 loses because P rounded to 4 bits causes 30 %" in verdict_of(rows).text
    # Where a wide P would not help, it is no reason.
    rows[1]["wide_p_error"] = 0.10
    assert "loses because" not in verdict_of(rows).text


def test_batch_guidance_and_memory_are_stated():
    facts = {"m_source": "model at 1024 px, 2 samples per call (guidance included)"}
    facts |= {"peak_activation_bytes": 3 * MIB, "fits_in": "dram"}
    why = verdict_of([total("W4A4", 0.1, 1e-3, 1.5 * MIB, **facts)]).why
    assert "1.50 MiB of weights" in why
    assert "at most 3.00 MiB of activations at once" in why
    assert "(the largest working set of a layer fits in DRAM)" in why
    assert "; rows per call: model at 1024 px, 2 samples per call (guidance included)." in why


ARRAYS = [
    total("W8A8", error, 1e-3, MIB, acc_bits=bits, overflow=rule, products_per_add=count,
          accumulators=1, area_ge=area, overflow_count=over)
    for bits, rule, count, area, error, over in (
        (32, "wrap", 1, 1000.0, 0.01, 0),
        (20, "wrap", 1, 840.0, 0.01, 0),
        (19, "wrap", 1, 820.0, 0.90, 40),
        (19, "saturate", 1, 850.0, 0.02, 40),
        (32, "wrap", 8, 700.0, 0.01, 0),
        (20, "wrap", 8, 690.0, 0.01, 0),
    )
]  # fmt: skip


def test_of_arrays_the_smallest_without_overflow_stands_for_the_split():
    # The order in which rows come is no reason.
    for rows in (ARRAYS, ARRAYS[::-1]):
        verdict = verdict_of(rows)
        assert (verdict.row["acc_bits"], verdict.row["products_per_add"]) == (20, 8)
        assert (verdict.area, verdict.objectives[-1]) == ("area_ge", "area_ge")
        (said,) = [note for note in verdict.notes if note.startswith("Arrays of")]
        assert said == (
            "Arrays of W8A8 at equal throughput: 20 bits (wrap) takes 16 % less area than 32 with "
            "one product an add, no add overflows on these layers (19 bits (saturate): 2.00 % "
            "output error for no less area); with eight products an add 20 bits (wrap) for 32 buys "
            "nothing (1.4 % of the area). The smallest without overflow has 20 bits (wrap), eight "
            "products an add and 690 GE a MAC."
        )


def test_where_all_arrays_overflow_the_least_error_stands_for_the_split():
    rows = [row | {"overflow_count": 7} for row in ARRAYS]
    verdict = verdict_of([row | {"output_error": 0.1 + row["area_ge"] / 1e4} for row in rows])
    assert verdict.row["area_ge"] == 690.0
    assert "with one product an add all overflow" in verdict.text


def test_arrays_without_areas_are_judged_as_before():
    verdict = verdict_of([row | {"area_ge": None} for row in ARRAYS])
    assert verdict.area == ""
    assert not [note for note in verdict.notes if note.startswith("Arrays of")]
    assert verdict.row["output_error"] == 0.01
