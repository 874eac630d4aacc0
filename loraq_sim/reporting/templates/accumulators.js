"use strict";
// Bits the sums needed, could need, and have.

function drawAccumulators() {
  const own = D.accumulators.filter((row) => row.context === context());
  const place = byId("accumulators-plot");
  if (!own.length) { if (place.data) Plotly.purge(place); byId("accumulators-caption").textContent = `No layer of ${context()} has activations.`; return; }
  const rows = [...own].sort((a, b) => b.high - a.high || b.low - a.low);
  const wide = widthOf("accumulators-plot") > 640;
  const at = rows.map((_, i) => i);
  const bits = D.accumulatorAxes[context()];
  const places = new Map(bits.at);
  const placeOf = (number) => (number === null || number === undefined ? null : places.get(number));
  const blue = tone(D.looks.series[0]);
  const orange = tone(D.looks.series[1]);
  const traces = [
    { type: "bar", orientation: "h", name: "needed on this input", base: rows.map((row) => placeOf(row.low) - 0.18), x: rows.map((row) => placeOf(row.high) - placeOf(row.low) + 0.36), y: at, marker: { color: blue }, width: 0.42, hoverinfo: "text", hovertext: rows.map(tellWidths), textposition: "none" },
    { name: "enough for any input", x: rows.map((row) => placeOf(row.guaranteed)), y: at, mode: "markers", marker: { symbol: "diamond-open", size: 9, color: orange, line: { width: 1.8 } }, hoverinfo: "text", hovertext: rows.map(tellWidths) },
    { name: "of the array", x: rows.map((row) => placeOf(row.array)), y: at, mode: "markers", marker: { symbol: "line-ns", size: 15, line: { width: 2.4, color: rootStyle("--ink") } }, hoverinfo: "text", hovertext: rows.map(tellWidths) },
  ];
  const over = rows.filter((row) => row.overflows);
  if (over.length)
    traces.push({ name: "overflowed", x: over.map((row) => placeOf(row.high) + 0.7), y: over.map((row) => rows.indexOf(row)), mode: "markers", marker: { symbol: "x", size: 8, color: orange }, hoverinfo: "text", hovertext: over.map(tellWidths) });
  const best = D.answers[context()];
  const every = Math.ceil(bits.at.length / (wide ? 24 : 10));
  const ticks = bits.at.filter(([number], i) => number % every === 0 || i === bits.at.length - 1);
  draw("accumulators-plot", traces, {
    showlegend: true, height: Math.max(230, rows.length * 21 + 120), margin: { l: 8, r: 12, t: 8, b: 48 },
    xaxis: axis({ title: "Accumulator width (bits)", tickvals: [...ticks.map(([, spot]) => spot), ...bits.breaks], ticktext: [...ticks.map(([number]) => String(number)), ...bits.breaks.map(() => (wide ? "…" : ""))], range: [bits.at[0][1] - 0.8, bits.at.at(-1)[1] + 0.8] }),
    shapes: bits.breaks.map((spot) => ({ type: "rect", x0: spot - 0.4, x1: spot + 0.4, y0: 0, y1: 1, yref: "paper", layer: "below", fillcolor: rootStyle("--shade"), line: { width: 0 } })),
    yaxis: axis({ tickvals: at, ticktext: rows.map((row) => (row.label === best ? `<b>${plain(shorten(row.label, 40))}</b>` : plain(shorten(row.label, wide ? 40 : 22)))), range: [rows.length - 0.5, -0.5], showgrid: false, tickfont: { size: wide ? 11.5 : 9 } }),
  });
  byId("accumulators-caption").textContent = `${over.length ? `${over.length} of ${rows.length} cases overflow` : "No case overflows"}; the most demanding needs ${Math.max(...rows.map((row) => row.high))} bits on this input.${bits.breaks.length ? " Shaded: widths left out." : ""}`;
}

function tellWidths(row) {
  return `<b>${plain(row.label)}</b><br>needed on this input: ${row.low} to ${row.high} bits<br>most in ${plain(row.layer)}` +
    `<br>enough for any input: ${row.guaranteed ?? "not known"} bits<br>array: ${row.array ?? "?"} bits, ${plain(row.rule || "")}<br>overflows: ${row.overflows.toLocaleString("en-US")}`;
}

const arrayName = (row) => `${row.acc_bits} bits, ${row.overflow.replace("_", " ")}, ${row.products_per_add} product${row.products_per_add === 1 ? "" : "s"} an add${row.accumulators > 1 ? `, ${row.accumulators} accumulators` : ""}`;

function tellArray(row) {
  return `<b>${plain(arrayName(row))}</b><br>${digits(row.area_ge)} GE per MAC${row.area_mm2 === null ? "" : `, ${digits(row.area_mm2)} mm2 in all`}` +
    `<br>error ${row.error === null ? "not known" : percent(row.error)}<br>overflows: ${(row.overflow_count ?? 0).toLocaleString("en-US")}`;
}

function drawArrays() {
  const own = D.arrays.filter((row) => row.context === context());
  const place = byId("arrays-plot");
  if (!own.length) { for (const id of ["arrays-plot", "arrays-parts-plot"]) if (byId(id).data) Plotly.purge(byId(id)); byId("arrays-caption").textContent = `No grid of arrays on ${context()}.`; return; }
  const lines = new Map();
  for (const row of own) {
    const name = `${row.products_per_add} product${row.products_per_add === 1 ? "" : "s"} an add, ${row.overflow.replace("_", " ")}${row.accumulators > 1 ? `, ${row.accumulators} accumulators` : ""}`;
    lines.set(name, [...(lines.get(name) || []), row]);
  }
  const traces = [...lines].map(([name, rows], i) => {
    const sorted = [...rows].sort((a, b) => a.acc_bits - b.acc_bits);
    const color = tone(D.looks.series[i % D.looks.series.length]);
    return { name: plain(name), x: sorted.map((row) => row.area_ge), y: sorted.map((row) => (row.error > 0 ? row.error * 100 : null)), mode: "lines+markers", line: { color, width: 1.5, dash: rows[0].overflow === "wrap" ? "solid" : "dot" }, marker: { color, size: 8, symbol: sorted.map((row) => (row.overflow_count ? "x" : "circle")) }, hoverinfo: "text", hovertext: sorted.map(tellArray) };
  });
  const best = own.filter((row) => row.is_answer && row.error > 0);
  if (best.length)
    traces.push({ name: "verdict", x: best.map((row) => row.area_ge), y: best.map((row) => row.error * 100), mode: "markers", marker: { symbol: "circle-open", size: 17, color: rootStyle("--ink"), line: { width: 2 } }, hoverinfo: "text", hovertext: best.map(tellArray) });
  draw("arrays-plot", traces, {
    showlegend: true, height: 420, margin: { l: 56, r: 12, t: 8, b: 48 },
    xaxis: axis({ title: "Area (GE per MAC)" }), yaxis: axis({ title: "Error (%)", type: "log" }),
  });
  const free = own.filter((row) => row.overflow_count === 0);
  byId("arrays-caption").textContent = free.length
    ? `${free.length} of ${own.length} arrays hold every sum of these layers (circles; crosses overflow); the smallest of them has ${arrayName([...free].sort((a, b) => a.area_ge - b.area_ge)[0])}.`
    : `All ${own.length} arrays overflow on these layers.`;
  drawArrayParts(own);
}

function drawArrayParts(own) {
  const rows = own.filter((row) => Object.keys(row.parts).length).sort((a, b) => a.products_per_add - b.products_per_add || b.acc_bits - a.acc_bits || (a.overflow < b.overflow ? 1 : -1));
  const parts = [...new Set(rows.flatMap((row) => Object.keys(row.parts)))];
  const wide = widthOf("arrays-parts-plot") > 640;
  draw("arrays-parts-plot", parts.map((part, i) => ({
    type: "bar", orientation: "h", name: plain(part), x: rows.map((row) => row.parts[part] || 0), y: rows.map((_, at) => at),
    marker: { color: tone(D.looks.series[i % D.looks.series.length]) }, hoverinfo: "text", hovertext: rows.map((row) => `<b>${plain(arrayName(row))}</b><br>${plain(part)}: ${digits(row.parts[part] || 0)} GE`), textposition: "none",
  })), {
    barmode: "stack", bargap: 0.28, showlegend: true, height: Math.max(240, rows.length * 18 + 130), margin: { l: 8, r: 12, t: 8, b: 48 },
    xaxis: axis({ title: "Area (GE per MAC)" }),
    yaxis: axis({ tickvals: rows.map((_, at) => at), ticktext: rows.map((row) => plain(shorten(arrayName(row), wide ? 48 : 24))), range: [rows.length - 0.5, -0.5], showgrid: false, tickfont: { size: wide ? 11 : 8 } }),
  });
}

function buildAccumulators() {
  if (byId("accumulators-plot")) page.plots.set("accumulators", drawAccumulators);
  if (byId("arrays-plot")) page.plots.set("arrays", drawArrays);
}
