"""Make a published report: its rows, its page and its pictures, by one command.

    python reports/publish.py pixart_sigma_on_aie2

``report.toml`` in the report's folder says what is drawn and swept. One block of the model is
drawn with the statistics of trained layers, weights and inputs (`loraq-sim dump synth`), and swept;
blocks of one model have the same shapes, so each row is written once for every block, and says so.
What is evaluated already is not evaluated again; ``--pages`` only writes page, pictures and README
anew, from the rows of the report.
"""

import argparse
import hashlib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import base64
import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import loraq_sim as lq
from loraq_sim.dumps.synthesize import synthesize_layers
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.reporting.figures import save_figure
from loraq_sim.reporting.gather import gather
from loraq_sim.reporting.page import markdown_report, write_report
from loraq_sim.reporting.report_data import ReportData, answers, image_anchors
from loraq_sim.results.store import ResultStore
from loraq_sim.results.wording import value_text

HERE = Path(__file__).parent
WORK = Path("runs/published")
_INK = "#222222"
_MOST_PIXELS = 1_200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", choices=sorted(p.parent.name for p in HERE.glob("*/report.toml")))
    parser.add_argument("--jobs", type=int, help="worker processes; default: one per CPU")
    parser.add_argument("--out", type=Path, help="folder to write; default: beside this script")
    parser.add_argument("--pages", action="store_true", help="of the rows that the report has")
    asked = parser.parse_args()
    report, out = HERE / asked.report, asked.out or HERE / asked.report
    plan = read_plan(report)
    if not asked.pages:
        sweep(plan, out, jobs=asked.jobs)
    for path in write_pages(plan, out):
        print(f"wrote {path}")


def read_plan(report: Path) -> dict[str, Any]:
    """What the folder's ``report.toml`` says, under the folder's ``name``."""
    text = (report / "report.toml").read_text(encoding="utf-8")
    return tomllib.loads(text) | {"name": report.name}


def sweep(plan: dict[str, Any], out: Path, *, jobs: int | None = None, work: Path = WORK) -> Path:
    """Draw one block in `work`, sweep it, and write its rows, counted, to `out`."""
    drawn = plan["layers"]
    place = work / plan["name"]
    dump = place / f"{drawn['model']}.safetensors"
    if not dump.exists():
        place.mkdir(parents=True, exist_ok=True)
        layers = synthesize_layers(drawn["model"], tokens=drawn["tokens"], seed=drawn["seed"])
        write_layer_dump(dump, layers.select([f"{drawn['block']}{drawn.get('of_block', '*')}"]))
    study = lq.sweep(dump, jobs=jobs, out=place, **plan["sweep"])
    out.mkdir(parents=True, exist_ok=True)
    return _counted(study, plan, out / "results.sqlite")


def write_pages(plan: dict[str, Any], out: Path) -> list[Path]:
    """Write page, pictures and README of the rows in `out`."""
    data = data_of(plan, out)
    written = write_report(data, out / "report.html", with_files=False)
    figures = {
        "front": lq.open_study(out).plot_front(),
        "images": images_figure(data),
    }
    for name, figure in figures.items():
        path = out / f"{name}.png"
        written.append(save_figure(figure, path, most_pixels=_MOST_PIXELS))
    readme = out / "README.md"
    readme.write_text(readme_text(data, plan), encoding="utf-8")
    return [*written, readme]


def verdict_line(study: lq.Study) -> str:
    """The verdict in a line, as the project's README quotes it."""
    verdict = study.verdict()
    row = verdict.row or {}
    error, memory, latency, energy = (
        value_text(key, row[key])
        for key in ("output_error", "weight_bytes", "latency_s", "energy_j")
    )
    return (
        f"**{verdict.headline}**: {error} output error, {memory} of weights, {latency} and "
        f"{energy} a denoising step"
    )


def data_of(plan: dict[str, Any], out: Path) -> ReportData:
    """What the report of the rows in `out` shows."""
    with ResultStore.open(out / "results.sqlite") as opened:
        return gather(opened.possible_rows(), opened.provenance(), title=plan["title"])


def _counted(study: lq.Study, plan: dict[str, Any], path: Path) -> Path:
    """A store with every row once for each block of the model."""
    block = plan["layers"]["block"]
    stem = block.rstrip(".").rpartition(".")[0]
    n = plan["layers"]["blocks"]
    with ResultStore.open(study.path) as opened:
        # Which kernel ran it decides no number.
        facts = {k: v for k, v in opened.provenance()[-1].items() if k not in ("run", "platform")}
    note = f"drawn once, counted for each of {n} blocks"
    rows = {}
    for number in range(n):
        for row in study.rows:
            own = {
                name: str(row[name]).replace(block, f"{stem}.{number}.", 1)
                for name in ("layer", "group")
            }
            case = hashlib.sha256(f"{row['case_id']}/{number}".encode()).hexdigest()
            rows[case] = {**row, **own, "message": f"{row['message']}; {note}", "case_id": case}
    path.unlink(missing_ok=True)
    with ResultStore.open(path, create=True) as store:
        notes = [f"one block was drawn and evaluated: {note}", *facts.get("notes", ())]
        store.begin_run({**facts, "notes": notes})
        store.add_all(rows)
    return path


def images_figure(data: ReportData) -> Figure:
    """Digits of a small model at measured errors, the cases of a report beside them."""
    known = image_anchors()
    (context,) = data.contexts
    cases = sorted(
        (row for row in data.totals_of(context) if row["output_error"] is not None),
        key=lambda row: -row["output_error"],
    )
    anchors = _apart(known["anchors"])
    rows = [
        (a["strip"], f"{a['split']}\n{_percent(a['output_error'])}, {a['psnr_db']:.1f} dB")
        for a in anchors
    ]
    rows.append((known["reference"], "full precision"))
    strips = [np.asarray(Image.open(io.BytesIO(base64.b64decode(strip)))) for strip, _ in rows]
    height, width = strips[0].shape
    pitch = height + 2
    canvas = np.full((len(rows) * pitch, width), 255, dtype=np.uint8)
    for i, strip in enumerate(strips):
        canvas[i * pitch : i * pitch + height] = strip
    figure = Figure(figsize=(9.6, 0.6 * len(rows) + 1.2))
    axes = figure.add_axes((0.22, 0.02, 0.46, 1 - 1.2 / (0.6 * len(rows) + 1.2)))
    axes.imshow(canvas, cmap="gray", interpolation="nearest", aspect="auto")
    axes.axis("off")
    beside: dict[int, list[str]] = {}
    for row in cases:
        away = [abs(np.log(a["output_error"] / row["output_error"])) for a in anchors]
        beyond = " (beyond)" if row["output_error"] > anchors[0]["output_error"] else ""
        text = f"{row['label']}: {_percent(row['output_error'])}{beyond}"
        beside.setdefault(int(np.argmin(away)), []).append(text)
    for i, (_, text) in enumerate(rows):
        y = i * pitch + height / 2 - 0.5
        axes.text(-2, y, text, ha="right", va="center", fontsize=8, color=_INK)
        told = "\n".join(beside.get(i, ()))
        axes.text(width + 1, y, told, ha="left", va="center", fontsize=7.5, color=_INK)
    about = known["about"]
    under = (
        f"Left: splits of {about['model']}, a small trained model, with error and PSNR of "
        f"{about['images']} images.\nRight: {data.title}, where its errors are nearest."
    )
    head = {"x": 0.02, "color": _INK, "va": "top"}
    figure.text(y=0.98, s="What such errors look like", fontsize=13, weight="bold", **head)
    figure.text(y=0.925, s=under, fontsize=8, **head)
    return figure


def _percent(error: float) -> str:
    return value_text("output_error", error).removesuffix(" output error")


def _apart(anchors: Sequence[dict[str, Any]], ratio: float = 1.25) -> list[dict[str, Any]]:
    """Those whose errors are not too near each other to tell their images apart."""
    kept = [anchors[0]]
    for anchor in anchors[1:]:
        if kept[-1]["output_error"] / anchor["output_error"] >= ratio:
            kept.append(anchor)
    return kept


def readme_text(data: ReportData, plan: dict[str, Any]) -> str:
    """The report as GitHub shows it."""
    name = plan["name"]
    drawn, n = plan["layers"], plan["layers"]["blocks"]
    n_kinds = len({row["kind"] for row in data.rows})
    (answer,) = answers(data)
    head = f"""\
# {data.title}: {data.verdict.headline}

![Error against latency and weight memory of {len(data.totals)} splits](front.png)

Open [report.html](report.html) for the whole page: it needs no connection and no installation. The
rows are in `results.sqlite`: `loraq-sim pareto reports/{name}`.

Weights and inputs are **drawn with the statistics of trained layers**, not taken from the
published checkpoint: one layer of each of the {n_kinds} kinds that SVDQuant quantizes, at the true
shapes, with {drawn["tokens"]} input rows. Each row stands for the layers of its kind in all {n}
blocks. One command makes all of it:

```bash
python reports/publish.py {name}
```

![Digits of a small trained model at such errors](images.png)

"""
    text = markdown_report(data)
    body = text[text.index(f"## {answer.context}") :]
    return head + body


if __name__ == "__main__":
    main()
