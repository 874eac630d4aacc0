"use strict";
// Parts of the cost of each layer shape under one case.

const costs = { quantity: "latency_s", label: null, named: null };
const BOUNDS = { compute: "MAC rate", vector: "vector unit", l1: "L1 bandwidth", l2: "L2 bandwidth", dram: "DRAM bandwidth", dispatch: "dispatch", side: "side unit" };

function costLabels() {
  return [...new Set(D.parts.filter((row) => row.context === context()).map((row) => row.label))];
}

function drawCosts() {
  const labels = costLabels();
  if (!labels.includes(costs.label) || costs.named !== context()) { costs.label = labels.includes(D.answers[context()]) ? D.answers[context()] : labels[0]; costs.named = context(); buildCostTools(); }
  const own = D.parts.filter((row) => row.context === context() && row.label === costs.label);
  const place = byId("costs-plot");
  if (!own.length) { if (place.data) Plotly.purge(place); byId("costs-caption").textContent = `No cost breakdown of ${context()} is at hand.`; return; }
  // Weights are stored once, whatever the calls.
  const times = (row) => (costs.quantity === "weight_bytes" ? row.n_layers : row.calls);
  const total = (row) => Object.values(row.costs[costs.quantity]).reduce((sum, value) => sum + value, 0) * times(row);
  const rows = own.filter((row) => total(row) > 0).sort((a, b) => total(b) - total(a));
  const all = rows.reduce((sum, row) => sum + total(row), 0);
  const [symbol, size] = unitOf(costs.quantity, context());
  const parts = [...new Set(rows.flatMap((row) => Object.keys(row.costs[costs.quantity])))];
  const wide = widthOf("costs-plot") > 640;
  const traces = parts.map((part) => ({
    type: "bar", orientation: "h", name: D.partNames[part] || plain(part),
    x: rows.map((row) => ((row.costs[costs.quantity][part] || 0) * times(row)) / size), y: rows.map((_, i) => i), hoverinfo: "text",
    hovertext: rows.map((row) => tellPart(row, part, times(row), total(row), all)), textposition: "none",
    marker: { color: tone(D.looks.parts[part]), line: { width: 0.5, color: rootStyle("--paper") } },
  }));
  const longest = Math.max(...rows.map(total)) / size;
  draw("costs-plot", traces, {
    barmode: "stack", bargap: 0.28, showlegend: true, height: Math.max(240, rows.length * 30 + 130), margin: { l: 8, r: 12, t: 8, b: 48 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
    xaxis: axis({ title: D.columns[costs.quantity].heading + (symbol ? ` (${symbol})` : ""), range: [0, longest * (wide ? 1.16 : 1.32)], nticks: wide ? 9 : 4 }),
    yaxis: axis({ tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => plain(shapeName(row, wide))), range: [rows.length - 0.5, -0.5], showgrid: false, tickfont: { size: wide ? 11.5 : 9 } }),
    annotations: rows.map((row, i) => ({ x: total(row) / size, y: i, text: BOUNDS[row.bound] || plain(row.bound || ""), showarrow: false, xanchor: "left", xshift: 5, font: { size: 11, color: rootStyle("--muted") } })),
  });
  tellCosts(rows, total, all);
}

function shapeName(row, wide) {
  const times = row.n_layers > 1 ? ` ×${row.n_layers}` : "";
  return wide ? `${shorten(row.kind || "layer", 20)} ${row.k}→${row.n}${times}` : `${shorten(row.kind || "layer", 12)}${times}`;
}

function tellPart(row, part, times, total, all) {
  const value = row.costs[costs.quantity][part] || 0;
  return `<b>${plain(row.kind || "layer")}</b> ${row.m} × ${row.k} × ${row.n}, ${row.n_layers} layer${row.n_layers === 1 ? "" : "s"}${row.rank ? `, rank ${row.rank}` : ""}` +
    `<br>${D.partNames[part] || plain(part)}: ${withUnit(costs.quantity, value * times, context())} (${percent((value * times) / total)} of this shape, ${percent((value * times) / all)} of the model)` +
    `<br>limited by ${BOUNDS[row.bound] || plain(row.bound || "")}`;
}

function tellCosts(rows, total, all) {
  const times = (row) => (costs.quantity === "weight_bytes" ? row.n_layers : row.calls);
  const sums = {};
  const bounds = {};
  for (const row of rows) {
    bounds[row.bound] = (bounds[row.bound] || 0) + row.n_layers;
    for (const [part, value] of Object.entries(row.costs[costs.quantity])) sums[part] = (sums[part] || 0) + value * times(row);
  }
  const [part, value] = Object.entries(sums).sort((a, b) => b[1] - a[1])[0];
  const layers = Object.values(bounds).reduce((a, b) => a + b, 0);
  const limits = Object.entries(bounds).sort((a, b) => b[1] - a[1]).map(([name, count]) => `${count} of ${layers} by ${BOUNDS[name] || name}`);
  byId("costs-caption").textContent = `${costs.label} on ${context()}: ${D.columns[costs.quantity].heading.toLowerCase()} ${withUnit(costs.quantity, all, context())}, the largest part ${D.partNames[part] || part} with ${percent(value / all)}. Layers limited: ${limits.join(", ")}.`;
}

function buildCostTools() {
  const tools = byId("costs-tools");
  const keys = COST_KEYS.filter((key) => D.parts.some((row) => Object.keys(row.costs[key]).length));
  tools.replaceChildren(
    select("Case", costLabels().map((label) => [label, label]), costs.label, (value) => { costs.label = value; drawCosts(); }),
    select("Quantity", keys.map((key) => [key, D.columns[key].heading]), costs.quantity, (value) => { costs.quantity = value; drawCosts(); }));
}

function buildCosts() {
  if (byId("costs-plot")) page.plots.set("costs", drawCosts);
}
