"use strict";
// Bits the sums needed, could need, and have.

function drawAccumulators() {
  const own = D.accumulators.filter((row) => row.context === context());
  const place = byId("accumulators-plot");
  if (!own.length) { if (place.data) Plotly.purge(place); byId("accumulators-caption").textContent = `No layer of ${context()} has activations.`; return; }
  const rows = [...own].sort((a, b) => b.high - a.high || b.low - a.low);
  const wide = widthOf("accumulators-plot") > 640;
  const at = rows.map((_, i) => i);
  const blue = tone(D.looks.series[0]);
  const orange = tone(D.looks.series[1]);
  const traces = [
    { type: "bar", orientation: "h", name: "needed on this input", base: rows.map((row) => row.low - 0.18), x: rows.map((row) => row.high - row.low + 0.36), y: at, marker: { color: blue }, width: 0.42, hoverinfo: "text", hovertext: rows.map(tellWidths), textposition: "none" },
    { name: "enough for any input", x: rows.map((row) => row.guaranteed), y: at, mode: "markers", marker: { symbol: "diamond-open", size: 9, color: orange, line: { width: 1.8 } }, hoverinfo: "text", hovertext: rows.map(tellWidths) },
    { name: "of the array", x: rows.map((row) => row.array), y: at, mode: "markers", marker: { symbol: "line-ns", size: 15, line: { width: 2.4, color: rootStyle("--ink") } }, hoverinfo: "text", hovertext: rows.map(tellWidths) },
  ];
  const over = rows.filter((row) => row.overflows);
  if (over.length)
    traces.push({ name: "overflowed", x: over.map((row) => row.high + 0.7), y: over.map((row) => rows.indexOf(row)), mode: "markers", marker: { symbol: "x", size: 8, color: orange }, hoverinfo: "text", hovertext: over.map(tellWidths) });
  const best = D.answers[context()];
  draw("accumulators-plot", traces, {
    showlegend: true, height: Math.max(230, rows.length * 21 + 120), margin: { l: 8, r: 12, t: 8, b: 48 },
    xaxis: axis({ title: "Accumulator width (bits)", dtick: wide ? 2 : 4 }),
    yaxis: axis({ tickvals: at, ticktext: rows.map((row) => (row.label === best ? `<b>${plain(shorten(row.label, 40))}</b>` : plain(shorten(row.label, wide ? 40 : 22)))), range: [rows.length - 0.5, -0.5], showgrid: false, tickfont: { size: wide ? 11.5 : 9 } }),
  });
  byId("accumulators-caption").textContent = over.length
    ? `${over.length} of ${rows.length} cases overflow; the most demanding needs ${Math.max(...rows.map((row) => row.high))} bits on this input.`
    : `No case overflows; the most demanding needs ${Math.max(...rows.map((row) => row.high))} bits on this input.`;
}

function tellWidths(row) {
  return `<b>${plain(row.label)}</b><br>needed on this input: ${row.low} to ${row.high} bits<br>most in ${plain(row.layer)}` +
    `<br>enough for any input: ${row.guaranteed ?? "not known"} bits<br>array: ${row.array ?? "?"} bits, ${plain(row.rule || "")}<br>overflows: ${row.overflows.toLocaleString("en-US")}`;
}

function buildAccumulators() {
  if (byId("accumulators-plot")) page.plots.set("accumulators", drawAccumulators);
}
