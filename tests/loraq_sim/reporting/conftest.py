import math
import os
import shutil

import pytest

from loraq_sim.machine import cost_split
from loraq_sim.results.rows import COLUMN_NAMES
from loraq_sim.split import parse_split

SPLITS = ("W4A4", "W4A8", "W8A8", "W4A4+W8A8r16", "W4A8+W8A8r16", "W4A4+W16A16r8", "W4A4+W4A4r32")
SHAPES = {"self_q": (1152, 1152), "ffn_up": (4608, 1152), "ffn_down": (1152, 4608)}
TOKENS = 512


def invented_error(layer, split, method):
    """Some error that falls with bits and rank and differs between layers and methods."""
    bits = min(int(part) for part in split.main.replace("A", " ").replace("W", "").split())
    gain = math.log2(2 + (split.rank or 0)) * (0.12 if method == "loraq" else 0.09)
    return 2.0**-bits * (2.5 + math.sin(layer)) * (1.3 - gain)


def invented_row(index, text, accelerator, method):
    import hwmodels

    kind = list(SHAPES)[index % len(SHAPES)]
    n, k = SHAPES[kind]
    split = parse_split(text)
    work, cost = cost_split(TOKENS, n, k, split, hwmodels.load_accelerator(accelerator))
    rank = work.rank
    error = invented_error(index, split, method)
    return dict.fromkeys(COLUMN_NAMES) | {
        **{"layer": f"blocks.{index // len(SHAPES)}.{kind}", "kind": kind, "group": ""},
        **{"m": TOKENS, "n": n, "k": k, "tokens": 64, "calls_per_step": 1 + index % 2},
        **{"split": text, "method": method if rank else "rtn", "preset": "fast"},
        **{"accelerator": accelerator, "rank": rank, "weight_bytes": cost.weight_bytes},
        **{"bits_per_weight": 8 * cost.weight_bytes / (n * k), "weight_error": error / 2},
        **{"output_error": error, "sqnr_db": -20 * math.log10(error), "output_rms": 1.0},
        **{"overflow_count": 0, "safe_acc_bits": 12 + index % 5, "guaranteed_acc_bits": 20},
        **{"latency_s": cost.latency_s, "cycles": cost.cycles, "energy_j": cost.energy_j},
        **{"dram_bytes": cost.dram_bytes, "utilization": cost.utilization, "bound": cost.bound},
        **{"status": "ok", "message": "", "seconds": 0.1, "seed": 0, "pareto": False},
        **{"dump": "model.pt", "family": "int", "group_size": 64, "token_limit": 64},
        **{"acc_bits": 32, "overflow": "wrap", "products_per_add": 8, "accumulators": 1},
        "options": "",
    }


@pytest.fixture(scope="session")
def invented_rows():
    """Rows of a sweep that never ran: true costs, invented errors."""
    templates = {}

    def template(kind, *case):
        if (kind, *case) not in templates:
            templates[kind, *case] = invented_row(kind, *case)
        return templates[kind, *case]

    def make(n_layers=6, splits=SPLITS, accelerators=("aie2", "h100"), methods=("loraq",)):
        rows = []
        for index in range(n_layers):
            for text in splits:
                for accelerator in accelerators:
                    for method in methods if "+" in text else ("rtn",):
                        row = template(index % len(SHAPES), text, accelerator, method)
                        error = invented_error(index, parse_split(text), method)
                        name = f"blocks.{index // len(SHAPES)}.{row['kind']}"
                        own = {"layer": name, "output_error": error, "weight_error": error / 2}
                        rows.append(row | own | {"sqnr_db": -20 * math.log10(error)})
        return rows

    return make


@pytest.fixture(scope="session")
def gathered(invented_rows):
    """`ReportData` of invented rows, or of the rows given."""
    from loraq_sim.reporting.gather import gather

    def make(rows=None, runs=(), **options):
        title = options.pop("title", None)
        return gather(invented_rows(**options) if rows is None else rows, runs, title=title)

    return make


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    asked = os.environ.get("LORAQ_SIM_CHROMIUM")
    return asked or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium; tests that need one skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium found; install one or name it in LORAQ_SIM_CHROMIUM")
    with playwright.sync_playwright() as driver:
        # The sandbox needs rights that containers do not give to root.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_page(chromium, tmp_path_factory):
    """Open HTML text as a file; what the page logs or requests is kept on ``page.trouble``.

    Loading takes a second, so tests share a page where they can and leave it as they found it.
    """
    opened = []

    def open_it(text, **options):
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(text, encoding="utf-8")
        page = chromium.new_page(**{"viewport": {"width": 1280, "height": 900}} | options)
        opened.append(page)
        page.set_default_timeout(60_000)
        page.trouble = []
        page.on("console", lambda said: page.trouble.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: page.trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (page.trouble.append("dialog"), dialog.dismiss()))
        page.on(
            "request",
            lambda asked: (
                None
                if asked.url.startswith(("file:", "data:", "blob:"))
                else page.trouble.append(f"request: {asked.url}")
            ),
        )
        page.goto(path.as_uri())
        # A function would be evaluated, which the policy of the page forbids.
        page.wait_for_selector("html[data-ready='true']", state="attached")
        return page

    yield open_it
    for page in opened:
        page.close()
