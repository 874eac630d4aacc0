"""Tables for people are scaled; text for programs keeps every value as it is."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from loraq_sim.errors import InputError
from loraq_sim.reporting.tables import (
    TABLE_FORMATS,
    front_table,
    json_text,
    result_table,
    totals_table,
)


def make_row(split="W4A4", **changes):
    row = {
        "split": split,
        "method": "loraq",
        "accelerator": "aie2",
        "rank": 0,
        "bits_per_weight": 4.25,
        "output_error": 0.1921,
        "sqnr_db": 14.33,
        "latency_s": 0.0412,
        "energy_j": 0.0824,
        "dram_bytes": 510_000_000,
        "bound": "compute",
        "status": "ok",
        "message": "",
        "pareto": True,
    }
    return row | changes


@pytest.fixture
def rows():
    return [
        make_row("W4A8", output_error=0.1312, latency_s=0.0589, pareto=False),
        make_row(),
        make_row("W4A4+W8A8r64", rank=64, output_error=0.1121, latency_s=0.0486),
    ]


def test_markdown_scales_values_and_puts_units_into_headings(rows):
    lines = totals_table(rows).to_markdown().splitlines()
    assert lines[0] == (
        "| front | split | rank | bits per weight | output error (%) | SQNR (dB) "
        "| latency (ms) | energy (mJ) | DRAM traffic (MiB) | bound |"
    )
    assert lines[1].startswith("| --- | --- | ---: |")
    assert lines[2] == "| * | W4A4 | 0 | 4.25 | 19.2 | 14.3 | 41.2 | 82.4 | 486 | compute |"


def test_trade_off_tables_read_from_fast_to_slow(rows):
    splits = [row["split"] for row in totals_table(rows).rows]
    assert splits == ["W4A4", "W4A4+W8A8r64", "W4A8"]


def test_front_table_shows_no_front_mark(rows):
    headings = [column.heading for column in front_table(rows[1:]).columns]
    assert "front" not in headings
    assert headings[0] == "split"


def test_settings_are_shown_only_where_rows_differ(rows):
    assert "accelerator" not in [c.key for c in totals_table(rows).columns]
    two = [*rows, make_row(accelerator="a100")]
    assert "accelerator" in [c.key for c in totals_table(two).columns]


def test_method_is_no_news_when_only_branchless_splits_differ_in_it(rows):
    rows[0]["method"] = rows[1]["method"] = "rtn"
    assert "method" not in [c.key for c in totals_table(rows).columns]
    two = [*rows, rows[2] | {"method": "svdquant"}]
    assert "method" in [c.key for c in totals_table(two).columns]


def test_table_without_a_front_row_has_no_mark_column(rows):
    table = totals_table([row | {"pareto": False} for row in rows])
    assert "pareto" not in [c.key for c in table.columns]
    assert "Pareto front" not in table.to_text()


def test_missing_number_shows_as_a_hyphen(rows):
    rows[0].update(output_error=None, latency_s=float("nan"))
    last = totals_table(rows).to_markdown().splitlines()[-1]
    assert last.split(" | ")[4] == "-"
    assert last.split(" | ")[6] == "-"


def test_failure_is_explained_below_the_terminal_table(rows):
    rows[0].update(status="failed", output_error=None, message="NaN in weights of layer a[0]")
    text = totals_table(rows).to_text()
    assert "W4A8: failed: NaN in weights of layer a[0]" in text
    assert "* on the Pareto front" in text


def test_message_of_all_rows_is_printed_once(rows):
    remark = "1 of 20 layers missing"
    text = totals_table([row | {"message": remark} for row in rows]).to_text()
    assert f"all rows: {remark}" in text
    assert text.count(remark) == 1


def test_terminal_table_fits_eighty_columns(rows):
    lines = totals_table(rows).to_text().splitlines()
    assert max(len(line) for line in lines) <= 80


def test_piped_table_is_never_cut():
    name = "transformer_blocks.0.attn1.to_out.0." * 6
    assert name in result_table([{"layer": name, "latency_s": 1.0}]).to_text()


def test_sentences_wrap_and_lose_no_word():
    source = "measured on the board by hand, " * 12
    text = result_table([{"key": "clock_hz", "source": source, "unit": "Hz"}]).to_text()
    assert max(len(line) for line in text.splitlines()) < 90
    assert text.count("measured") == 12


def test_layer_name_with_brackets_is_not_taken_for_markup():
    assert "blocks[bold]" in result_table([{"layer": "blocks[bold]"}]).to_text()


def test_pipe_in_a_cell_does_not_break_markdown():
    assert "| a\\|b |" in result_table([{"layer": "a|b"}]).to_markdown()


def test_csv_keeps_plain_names_full_precision_and_every_column(rows):
    rows[0]["latency_s"] = 0.1 + 0.2
    rows[0]["sqnr_db"] = None
    text = totals_table(rows).to_csv()
    back = list(csv.DictReader(io.StringIO(text)))
    assert list(back[0]) == list(rows[0])
    slow = next(row for row in back if row["split"] == "W4A8")
    assert float(slow["latency_s"]) == 0.1 + 0.2
    assert slow["sqnr_db"] == ""


def test_csv_without_rows_still_has_a_header():
    assert result_table([], ["split", "rank"]).to_csv() == "split,rank\n"


def test_json_of_a_table_is_its_rows(rows):
    assert json.loads(totals_table(rows[:1]).to_json()) == rows[:1]


def reject_constant(name):
    raise AssertionError(f"{name} is not valid JSON")


def test_json_is_strictly_valid_for_numpy_and_non_finite_values():
    value = {
        "nan": math.nan,
        "inf": np.float32(np.inf),
        "int": np.int64(3),
        "flag": np.bool_(True),
        "array": np.arange(3, dtype=np.int8),
        "path": Path("a") / "b",
        "frame": pd.DataFrame({"x": [1.5, None]}),
        "na": pd.NA,
        4: (1, {"x": None}),
    }
    back = json.loads(json_text(value), parse_constant=reject_constant)
    assert back == {
        "nan": None,
        "inf": None,
        "int": 3,
        "flag": True,
        "array": [0, 1, 2],
        "path": "a/b",
        "frame": [{"x": 1.5}, {"x": None}],
        "na": None,
        "4": [1, {"x": None}],
    }


def test_json_says_which_value_has_no_form():
    with pytest.raises(TypeError, match="object value .* has no JSON form"):
        json_text({"x": object()})


def test_json_keeps_floats_exact():
    assert json.loads(json_text([0.1 + 0.2, 1e-300])) == [0.1 + 0.2, 1e-300]


def test_data_frame_and_rows_give_the_same_table(rows):
    assert totals_table(pd.DataFrame(rows)).to_markdown() == totals_table(rows).to_markdown()


def test_front_mark_read_back_from_a_store_as_an_integer_counts(rows):
    text = totals_table([row | {"pareto": int(row["pareto"])} for row in rows]).to_markdown()
    assert text == totals_table(rows).to_markdown()


def test_rank_that_a_data_frame_made_a_float_prints_whole(rows):
    frame = pd.DataFrame([*rows, make_row(rank=None)])
    assert "| 64 |" in totals_table(frame).to_markdown()


@pytest.mark.parametrize("format", TABLE_FORMATS)
def test_every_format_renders_rows_and_no_rows(rows, format):
    assert totals_table(rows).render(format)
    assert totals_table([]).render(format)


def test_unknown_format_names_the_known_ones(rows):
    with pytest.raises(InputError, match=r"unknown format 'jsn'; did you mean 'json'"):
        totals_table(rows).render("jsn")


def test_unknown_column_names_the_nearest(rows):
    with pytest.raises(InputError, match=r"unknown column 'latency'; did you mean 'latency_s'"):
        result_table(rows, ["split", "latency"])


def test_unlisted_columns_are_read_from_their_suffix():
    row = {"layer": "a", "tile_bytes": 2048, "setup_s": 2e-6, "is_fused": True, "cores": 32}
    heading = result_table([row]).to_markdown().splitlines()[0]
    assert heading == "| layer | tile (KiB) | setup (us) | is fused | cores |"


def drawn(table, width):
    """Lines of the table on a terminal of so many columns."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table.to_rich(width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def many_columns():
    layers = ("blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.0.ff.net.0.proj")
    return [
        make_row(
            split,
            layer=layer,
            latency_s=1e-6 * (17 + 1234 * i),
            energy_j=1e-6 * (3 + i),
            output_error=0.1 / (i + 1),
            acc_bits=16 + 8 * (i % 2),
            accelerator=("aie2", "a100")[i % 2],
            point=("knee", "least error")[i % 2],
            latency_low_s=1e-6,
            latency_high_s=9e-3,
            pareto=None,
        )
        for i, (layer, split) in enumerate(
            (layer, split) for layer in layers for split in ("W4A4", "W4A4+W8A8@fp16r32")
        )
    ]


@pytest.mark.parametrize("width", [40, 44, 60, 80, 100, 132, 200])
def test_a_terminal_cuts_no_number_and_is_told_what_it_leaves_out(width):
    rows = [
        {k: v for k, v in row.items() if k not in ("message", "pareto")} for row in many_columns()
    ]
    table = result_table(rows, title="Front")
    lines = drawn(table, width)
    assert all(len(line) <= width for line in lines)
    assert not any("\u2026" in line for line in lines)
    wide = table.to_text().splitlines()
    numbers = [line.split() for line in lines if "W4A4" in line]
    whole = [line.split() for line in wide if "W4A4" in line]
    assert len(numbers) == len(whole) == 6
    for shown, everything in zip(numbers, whole, strict=True):
        digits = [word for word in shown if word[0].isdigit()]
        assert digits
        assert set(digits) <= set(everything)
    said = " ".join(lines)
    for column in table.columns:
        words = column.heading.split()
        assert all(word in said for word in words), column.key


def test_what_rows_share_and_how_their_names_begin_is_said_once():
    lines = drawn(result_table(many_columns()), 90)
    text = " ".join(" ".join(lines).split())
    assert "in all rows: method loraq" in text
    assert "layers begin with blocks.0." in text
    assert sum("...attn.to_q" in line for line in lines) == 2
    for kept in ("output", "latency", "split"):
        assert any(kept in line for line in lines[:6])


def test_a_column_without_which_rows_look_alike_is_never_left_out():
    rows = [
        {"split": "W4A4", "kind": kind, "precision": "W4A4", "confidence": "assumed", "calls": 28}
        | {"energy_j": 0.1 * i, "latency_s": 0.01 * i, "dram_bytes": 1000 * i, "macs": 10**9 * i}
        for i, kind in enumerate(("self_q", "self_k", "ffn_up"), start=1)
    ]
    text = " ".join(drawn(result_table(rows), 30))
    assert all(kind in text for kind in ("self_q", "self_k", "ffn_up"))
    assert "in all rows: split W4A4, precision W4A4" in " ".join(text.split())
    # Beside the layer, the kind is no name.
    named = [row | {"layer": f"a.{row['kind']}"} for row in rows]
    assert "kind" in " ".join(drawn(result_table(named), 36)).split("leave out:")[1]


def test_a_narrow_terminal_loses_nothing_of_a_single_row():
    row = {"layer": "a.b", "split": "W4A4", "output_error": 0.0312, "latency_s": 2.5e-3}
    row |= {"kernel": "iron_whole_array", "confidence": "measured", "energy_j": 3.25e-3}
    for width in (36, 50, 64):
        text = " ".join(" ".join(drawn(result_table([row]), width)).split())
        assert "leave out" not in text
        for said in ("3.12", "2.50", "3.25", "iron_whole_array", "measured"):
            assert said in text, (width, said)
    narrow = " ".join(" ".join(drawn(result_table([row]), 36)).split())
    assert "beside the table: " in narrow
    assert "energy 3.25 mJ" in narrow.split("beside the table: ")[1]


def test_a_table_with_run_times_is_of_one_shape_however_long_they_took():
    def shape(times):
        rows = [
            {"layer": f"a.{i}", "split": "W4A4", "output_error": 0.1 * (i + 1), "seconds": taken}
            for i, taken in enumerate(times)
        ]
        return [len(drawn(result_table(rows), width)) for width in range(24, 60)]

    assert shape((0.0784, 0.0886)) == shape((0.164, 0.861)) == shape((5.65, 3.13))


def test_a_layer_that_all_rows_are_of_is_said_once_where_there_is_no_room():
    rows = [
        {"layer": "transformer_blocks.3.ff.net.2", "step": 40 * i, "rms": 0.2 + 0.01 * i}
        | {"kurtosis": 50.0 + i, "first_step_correlation": 1 - 0.1 * i}
        for i in range(4)
    ]
    text = " ".join(" ".join(drawn(result_table(rows), 50)).split())
    assert "in all rows: layer transformer_blocks.3.ff.net.2" in text
    assert "leave out" not in text
    assert "0.700" in text
    wide = "\n".join(drawn(result_table(rows), 100))
    assert wide.count("transformer_blocks.3.ff.net.2") == len(rows)


def test_which_store_a_row_is_of_stays_even_of_a_single_row():
    row = {"only": "before", "layer": "transformer_blocks.0.attn1.to_q", "split": "W4A4"}
    row |= {"method": "rtn", "accelerator": "aie2"}
    lines = drawn(result_table([row]), 60)
    assert any(line.split()[0] == "before" for line in lines if line.strip())


def test_the_ends_of_a_range_go_together():
    rows = [
        {"split": s, "latency_s": 1e-3, "latency_lo_s": 0.9e-3, "latency_hi_s": 1.1e-3}
        for s in ("W4A4", "W8A8")
    ]
    text = " ".join(" ".join(drawn(result_table(rows, title="A title"), 30)).split())
    assert "latency lo" not in text.split("leave out")[0] or "leave out" not in text
    for width in range(20, 60):
        lines = drawn(result_table(many_columns()), width)
        head = " ".join(lines[: next(i for i, x in enumerate(lines) if "\u2500" in x)])
        assert ("low" in head.split()) == ("high" in head.split())


def test_keys_that_name_their_unit_show_it_as_one():
    row = {"layer": "a", "tree_ge": 5.0, "area_um2": 44.8, "pj_per_mac": 0.1, "node_nm": 7}
    row |= {"random_pj_per_mac": 0.2, "share": 0.25, "macs": 3.2e10, "error": -0.094}
    heading, _, cells = result_table([row]).to_markdown().splitlines()
    assert heading == (
        "| layer | tree (GE) | area (um2) | energy per MAC (pJ) | node (nm) "
        "| random per MAC (pJ) | share (%) | MACs (G) | error (%) |"
    )
    assert cells.endswith("| 25.0 | 32.0 | -9.40 |")


def test_one_row_and_a_table_that_fits_are_shown_as_they_are():
    fitting = result_table([{"split": "W4A4", "rank": 0}, {"split": "W8A8", "rank": 0}])
    assert fitting.within(30) is fitting
    one = result_table(many_columns()[:1], ["split", "latency_s", "energy_j", "cosine"][:3])
    assert one.within(200) is one
    assert "in all rows" not in " ".join(drawn(one, 24))


def test_a_remark_is_as_wide_as_it_needs_to_be_below_a_narrow_table():
    remark = "a sentence that is longer than the narrow table above it"
    text = result_table([{"split": "W4A4", "status": "failed", "message": remark}]).to_text()
    assert remark in text
