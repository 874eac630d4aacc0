"""The report page in a real browser: drawn, quiet, filtered, dark, narrow, printed."""

import json
import re

import pytest

from loraq_sim.reporting.page import html_report
from loraq_sim.reporting.report_data import error_in_images
from loraq_sim.results.front import mark_front

PLOTS = (
    *("front", "layers", "kinds", "costs", "roofline", "accumulators", "methods", "mixed"),
    "trust",
)


@pytest.fixture(scope="module")
def data(gathered):
    return gathered(methods=("loraq", "svdquant"))


@pytest.fixture(scope="module")
def page_text(data):
    return html_report(data)


@pytest.fixture(scope="module")
def desktop(open_page, page_text):
    return open_page(page_text)


def points_of(page):
    return page.evaluate(
        "document.querySelector('#front-plot').data.find(t => t.name === 'cases').x.length"
    )


def drawn_points(page):
    """Markers in the picture itself, whatever the data say."""
    return page.locator("#front-plot .scatterlayer .trace:last-child .points path").count()


def chip(page, text):
    return page.locator("#front-tools .chip", has_text=re.compile(f"^{re.escape(text)}$"))


def color_of(page, selector, name):
    return page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}")


def brightness(color):
    """Sum of red, green and blue of a CSS color, 0 to 765."""
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def test_every_plot_is_drawn_and_nothing_is_logged_or_requested(desktop, tmp_path):
    for name in PLOTS:
        assert desktop.locator(f"#{name}-plot svg.main-svg").count() >= 1, name
        drawn = (".points path", ".bars path", ".hm image")
        marks = ", ".join(f"#{name}-plot {mark}" for mark in drawn)
        assert desktop.locator(marks).count() >= 1, name
    desktop.screenshot(path=tmp_path / "desktop.png", full_page=True)
    assert desktop.trouble == []
    assert (tmp_path / "desktop.png").stat().st_size > 50_000


def test_the_plot_shows_every_case_and_its_front_is_the_one_marked(desktop, data):
    totals = data.totals_of("aie2")
    assert points_of(desktop) == drawn_points(desktop) == len(totals)
    for cost in ("weight_bytes", "energy_j", "dram_bytes", "latency_s"):
        desktop.locator("#front-tools select").first.select_option(cost)
        found = desktop.evaluate("edgeOf(frontPoints()).map(point => point.label)")
        assert sorted(found) == sorted(r["label"] for r in totals if cost in r["fronts"])


def test_filters_change_the_number_of_points(desktop):
    everything = points_of(desktop)
    chip(desktop, "W4A8").first.click()
    without = points_of(desktop)
    assert without < everything
    assert drawn_points(desktop) == without
    assert f"{without} of {everything} cases shown" in desktop.inner_text("#front-caption")
    chip(desktop, "svdquant").click()
    assert points_of(desktop) < without
    chip(desktop, "svdquant").click()
    chip(desktop, "W4A8").first.click()
    assert points_of(desktop) == everything


def test_filters_work_from_the_keyboard(desktop):
    everything = points_of(desktop)
    chip(desktop, "loraq").locator("input").focus()
    desktop.keyboard.press("Space")
    assert points_of(desktop) < everything
    desktop.keyboard.press("Space")
    assert points_of(desktop) == everything


def test_cost_axis_accelerator_and_all_accelerators_can_be_chosen(desktop):
    one = points_of(desktop)
    desktop.locator("#front-tools select").first.select_option("energy_j")
    assert "Energy" in desktop.text_content("#front-plot .xtitle")
    assert "aie2" in desktop.inner_text("#costs-caption")
    desktop.locator("#contexts .chip", has_text="h100").click()
    assert "h100" in desktop.inner_text("#costs-caption")
    assert desktop.locator(".view:visible caption", has_text="on h100").count() >= 1
    assert desktop.locator(".view:visible caption", has_text="on aie2").count() == 0
    chip(desktop, "all accelerators").click()
    assert points_of(desktop) == 2 * one
    chip(desktop, "all accelerators").click()
    desktop.locator("#contexts .chip", has_text="aie2").click()
    desktop.locator("#front-tools select").first.select_option("latency_s")
    assert points_of(desktop) == one
    assert desktop.trouble == []


def test_limits_name_the_best_case_that_keeps_them(desktop, data):
    totals = data.totals_of("aie2")
    middle = sorted(row["weight_bytes"] for row in totals)[len(totals) // 2]
    size = desktop.evaluate("D.columns.weight_bytes.units.aie2[1]")
    # The page holds five digits, so the limit keeps a distance from every value.
    desktop.locator("#limits input[data-key=weight_bytes]").fill(str(middle / size * 1.001))
    best = min(
        (row for row in totals if row["weight_bytes"] <= middle * 1.001),
        key=lambda row: row["output_error"],
    )
    assert desktop.inner_text("#limits-answer strong") == best["label"]
    desktop.locator("#limits input[data-key=latency_s]").fill("0.0000001")
    assert "No visible case" in desktop.inner_text("#limits-answer")
    for key in ("latency_s", "weight_bytes"):
        desktop.locator(f"#limits input[data-key={key}]").fill("")
    assert desktop.inner_text("#limits-answer").startswith("Enter what")


def what_if(page, text):
    group = page.locator("#what-if [data-control=columns]")
    return group.locator(".chip", has_text=re.compile(f"^{text}$"))


def test_another_machine_moves_the_front_to_the_costs_of_its_grid(desktop, data):
    grid = data.grids["aie2"]
    what_if(desktop, "8").click()
    assert desktop.locator("#what-if-answer").inner_text().startswith("With 8 columns: ")
    assert grid["answers"][1] in desktop.inner_text("#what-if-answer")
    shown = desktop.evaluate("Object.fromEntries(frontPoints().map(p => [p.label, p.latency_s]))")
    expected = dict(zip(grid["labels"], grid["latency_s"][1], strict=True))
    # The page holds five digits.
    assert shown == pytest.approx(expected, rel=1e-4)
    error = {row["label"]: row["output_error"] for row in data.totals_of("aie2")}
    there = [{"label": k, "e": error[k], "t": t} for k, t in expected.items()]
    front = {row["label"] for row in mark_front(there, ("e", "t"), by=()) if row["pareto"]}
    assert set(desktop.evaluate("edgeOf(frontPoints()).map(p => p.label)")) == front
    needed = max(row["safe_acc_bits"] for row in data.totals_of("aie2"))
    assert desktop.locator("#what-if select option").last.inner_text() == f"{needed} bits"
    desktop.locator("#what-if button").click()
    before = {row["label"]: row["latency_s"] for row in data.totals_of("aie2")}
    found = desktop.evaluate("Object.fromEntries(frontPoints().map(p => [p.label, p.latency_s]))")
    assert found == pytest.approx(before, rel=1e-4)


def test_an_error_in_images_reads_alike_in_page_and_python(desktop):
    for error in (0.1, 0.026, 0.9):
        said = desktop.evaluate(f"inImages({error})")
        told = error_in_images(error)
        assert said.partition(" is ")[2] == told.partition(" is ")[2]
    assert desktop.trouble == []


def test_the_address_restores_what_was_chosen(page_text, open_page):
    page = open_page(page_text)
    page.locator("#contexts .chip", has_text="h100").click()
    page.locator("#front-tools select").first.select_option("energy_j")
    chip(page, "W4A8").first.click()
    page.locator("#limits input[data-key=output_error]").fill("9")
    page.locator("#front-tools .picker select").select_option("W8A8")
    page.locator("nav a[href='#costs']").click()
    address = page.evaluate("location.hash")
    assert address.startswith("#costs?")
    read = "[front.cost, [...front.hidden.get('main')], [...front.limits], picked.label, context()]"
    chosen = page.evaluate(read)
    page.reload()
    page.wait_for_selector("html[data-ready='true']", state="attached")
    assert page.evaluate(read) == chosen
    assert chosen[:2] == ["energy_j", ["W4A8"]]
    assert chosen[3:] == ["W8A8", "h100"]
    assert page.evaluate("location.hash") == address
    assert page.inner_text("#picked h3") == "W8A8 on h100"
    assert page.locator("#picked pre").count() == 3
    assert page.evaluate("scrollY") > 0
    # Not ours: ignored.
    page.evaluate(
        "location.hash = 'x?cost=nan&hide.main=[1&case=}&machine=9:9&acc=x&most.energy_j=-'"
    )
    page.wait_for_selector("html[data-ready='true']", state="attached")
    assert page.trouble == []


def test_a_click_on_a_point_shows_what_to_copy(desktop):
    clicked = "{ points: [{ customdata: ['aie2', 'W4A8'] }] }"
    desktop.evaluate(f"byId('front-plot').emit('plotly_click', {clicked})")
    assert desktop.inner_text("#picked h3") == "W4A8 on aie2"
    assert "loraq-sim sweep --hw aie2" in desktop.inner_text("#picked")
    desktop.locator("#picked button", has_text="Close").click()
    assert desktop.locator("#picked").is_hidden()


def test_heat_map_switches_its_quantity_and_costs_their_case(desktop):
    cells = "JSON.stringify(document.querySelector('#layers-plot').data[0].z)"
    before = desktop.evaluate(cells)
    desktop.locator("#layers-tools select").select_option(label="share of the model's latency")
    assert desktop.evaluate(cells) != before
    assert "latency" in desktop.inner_text("#layers-caption")
    desktop.locator("#costs-tools select").first.select_option("W8A8")
    assert desktop.inner_text("#costs-caption").startswith("W8A8 on aie2")
    assert desktop.trouble == []


def test_parts_add_up_to_the_total_of_the_case(desktop, data):
    label = "W4A4+W8A8r16 (loraq)"
    (total,) = [row for row in data.totals_of("aie2") if row["label"] == label]
    desktop.locator("#costs-tools select").first.select_option(label)
    for cost in ("energy_j", "dram_bytes", "weight_bytes", "latency_s"):
        desktop.locator("#costs-tools select").last.select_option(cost)
        bars = desktop.evaluate("document.querySelector('#costs-plot').data.map(t => t.x).flat()")
        size = desktop.evaluate(f"D.columns['{cost}'].units.aie2[1]")
        # Every part is rounded to five digits.
        assert sum(bars) * size == pytest.approx(total[cost], rel=1e-4)


def test_the_button_turns_the_page_dark_and_its_plots_with_it(desktop, tmp_path):
    ground, ink = color_of(desktop, "body", "backgroundColor"), color_of(desktop, ".xtitle", "fill")
    assert brightness(ground) > 700 > 150 > brightness(ink)
    desktop.locator("#theme").click()
    assert brightness(color_of(desktop, "body", "backgroundColor")) < 150
    assert brightness(color_of(desktop, ".xtitle", "fill")) > 600
    desktop.screenshot(path=tmp_path / "dark.png", full_page=True)
    desktop.locator("#theme").click()
    assert color_of(desktop, ".xtitle", "fill") == ink
    assert desktop.trouble == []


def test_what_a_screen_reader_needs_is_there(desktop):
    levels = desktop.evaluate(
        "[...document.querySelectorAll('main h1,main h2,main h3')].map(h => +h.tagName[1])"
    )
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    for selector, what in (
        ("table:not(:has(caption))", "table without caption"),
        (".plot:not([aria-label])", "plot without a text"),
        ("button:empty", "button without a name"),
        ("th:not([scope])", "heading cell without scope"),
        ("input:not(label input), select:not(label select)", "control without label"),
    ):
        assert desktop.locator(selector).count() == 0, what
    assert desktop.evaluate("document.documentElement.lang") == "en"


# Places of a plot's buttons, and of all that they must not cover.
COVERED = """(() => {
  const found = [];
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const buttons = plot.querySelector(".modebar-group").getBoundingClientRect();
    const drawn = ".legend, .points path, .hm image, .cbbg, .annotation";
    for (const mark of plot.querySelectorAll(drawn)) {
      const box = mark.getBoundingClientRect();
      if (box.width && box.left < buttons.right && buttons.left < box.right &&
          box.top < buttons.bottom && buttons.top < box.bottom) found.push(plot.id);
    }
    const caption = plot.nextElementSibling.getBoundingClientRect();
    if (caption.top < plot.querySelector(".main-svg").getBoundingClientRect().bottom - 1)
      found.push(`${plot.id} runs into its caption`);
  }
  return found;
})()"""


def test_buttons_of_a_plot_cover_nothing_and_no_plot_runs_into_its_caption(desktop):
    assert desktop.evaluate(COVERED) == []


def test_widths_that_no_case_comes_near_are_left_out_and_bars_keep_their_lengths(desktop, data):
    drawn = desktop.evaluate("document.querySelector('#accumulators-plot').data")
    bars, enough, array = drawn[:3]
    cases = sorted(
        (case for case in data.accumulators if case["context"] == "aie2"),
        key=lambda case: (-case["high"], -case["low"]),
    )
    assert bars["x"] == pytest.approx([case["high"] - case["low"] + 0.36 for case in cases])
    ticks = desktop.evaluate("document.querySelector('#accumulators-plot').layout.xaxis")
    shown = dict(zip(ticks["tickvals"], ticks["ticktext"], strict=True))
    assert {shown[at] for at in array["x"]} == {"32"}
    assert {shown[at] for at in enough["x"]} == {"20"}
    # 14 bits, a gap, 20 bits, a gap, 32 bits.
    assert set(array["x"]) == {at + 2 for at in enough["x"]}
    assert "Shaded: widths left out." in desktop.inner_text("#accumulators-caption")


def test_a_phone_in_the_dark_scrolls_down_only_and_paper_is_light(page_text, open_page, tmp_path):
    page = open_page(page_text, viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(COVERED) == []
    # A tablet: images of errors stand side by side, their labels within the page.
    page.set_viewport_size({"width": 820, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 820
    page.set_viewport_size({"width": 360, "height": 740})
    assert brightness(color_of(page, "body", "backgroundColor")) < 150
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    widths = page.evaluate(
        "[...document.querySelectorAll('.plot svg.main-svg')].map(s => s.clientWidth)"
    )
    # A4 and Letter leave 184 mm between the margins, 695 pixels.
    assert 600 < max(widths) <= 695
    assert brightness(color_of(page, "body", "backgroundColor")) == 3 * 255
    assert brightness(color_of(page, ".xtitle", "fill")) < 150
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    page.pdf(path=tmp_path / "paper.pdf", prefer_css_page_size=True)
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
    assert page.trouble == []


def test_without_scripts_all_tables_and_the_answer_can_be_read(page_text, chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page_text, encoding="utf-8")
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.inner_text("h1").startswith("Build ")
    for name in ("aie2", "h100"):
        assert page.locator("caption:visible", has_text=f"on {name}").count() >= 1
    assert page.locator(".waiting:visible").count() == len(PLOTS)
    context.close()


HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "\"'><svg onload=window.hacked=1>",
    "<a href='javascript:window.hacked=1'>click</a><b>bold</b>",
    "{{ 7*7 }} {% raw %} <!-- ]]> \u2028 &lt;i&gt;",
)


def test_names_of_strangers_are_text_and_nothing_else(invented_rows, gathered, open_page):
    text = " ".join(HOSTILE)
    rows = invented_rows(n_layers=len(HOSTILE), methods=("loraq", "svdquant"))
    names = list(dict.fromkeys(row["layer"] for row in rows))
    for row in rows:
        own = HOSTILE[names.index(row["layer"])]
        row |= {"layer": f"{own}.{row['layer']}", "kind": f"{own}{row['kind']}", "overflow": text}
        row |= {"method": f"{HOSTILE[0]}{row['method']}", "dump": f"{text}.pt"}
        if row["accelerator"] == "h100":
            row["accelerator"] = text
    rows[0] |= {"status": "failed", "message": text}
    plan = {"dump": f"{text}.pt", "layers": [text], "splits": [row["split"] for row in rows]}
    runs = [{"run": 1, "command": [text], "plan": plan, "notes": [text], "cpu": text}]
    page = open_page(html_report(gathered(rows, runs, title=text)))
    for place in (1, 0):
        page.locator("#contexts .chip").nth(place).click()
        for plot in ("front", "kinds", "layers"):
            page.locator(f"#{plot}-plot").hover()
        page.locator(".picker select").select_option(index=1)
        assert HOSTILE[0] in page.locator("#picked pre").first.text_content()
    assert page.evaluate("window.hacked") is None
    assert page.trouble == []
    assert page.locator("img[src=x], main a[href^=javascript], main script, main i").count() == 0
    said = page.evaluate("document.querySelector('main').textContent")
    for own in HOSTILE:
        assert own in said


def test_a_changed_script_is_refused_by_the_page_s_own_policy(page_text, open_page):
    spoiled = page_text.replace("</body>", "<script>window.hacked = 1</script></body>")
    page = open_page(spoiled)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in page.trouble)


@pytest.mark.slow
def test_a_whole_model_is_drawn(gathered, open_page):
    splits = ("W4A4", "W4A8", "W8A8", *(f"W4A4+W8A8r{8 * i}" for i in range(1, 11)))
    page = open_page(html_report(gathered(n_layers=280, splits=splits)))
    cells = page.evaluate("document.querySelector('#layers-plot').data[0].z.flat().length")
    assert cells == 280 * 13
    assert page.trouble == []


def test_packed_matrices_are_drawn_like_plain_ones(gathered, open_page, page_text, monkeypatch):
    plain = open_page(page_text)
    monkeypatch.setattr("loraq_sim.reporting.page._MOST_PLAIN", 100)
    text = html_report(gathered(methods=("loraq", "svdquant")))
    assert 'id="packed-layers"' in text
    assert 'id="packed-layers"' not in page_text
    page = open_page(text)
    of = "JSON.stringify(document.querySelector('#layers-plot').data[0].z)"
    assert page.evaluate(of) == plain.evaluate(of)
    assert page.trouble == []


def test_the_data_in_the_page_are_strict_json(page_text):
    (found,) = re.findall(r'id="drawn">(.*?)</script>', page_text)
    assert json.loads(found)["contexts"] == ["aie2", "h100"]
    assert not set("<>&") & set(found)
