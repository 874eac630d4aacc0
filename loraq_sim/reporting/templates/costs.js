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
    xaxis: axis({ title: D.columns[costs.quantity].heading + (symbol ? ` (${symbol})` : ""), range: [0, longest / (1 - 95 / Math.max(widthOf("costs-plot") - (wide ? 190 : 110), 200))], nticks: wide ? 9 : 4 }),
    yaxis: axis({ tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => plain(shapeName(row, wide))), range: [rows.length - 0.5, -0.5], showgrid: false, tickfont: { size: wide ? 11.5 : 9 } }),
    annotations: rows.map((row, i) => ({ x: total(row) / size, y: i, text: BOUNDS[row.bound] || plain(row.bound || ""), showarrow: false, xanchor: "left", xshift: 5, font: { size: 11, color: rootStyle("--muted") } })),
  });
  tellCosts(rows, total, all);
  drawRoofline(own);
  saveState();
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

function namesOf(all) {
  const kinds = [...new Set(all)];
  return kinds.length > 2 ? `${kinds[0]} and ${kinds.length - 1} more` : kinds.join(", ");
}

// Operations a second against operations a byte; a multiply-accumulate is two.
function drawRoofline(own) {
  const sum = (parts) => Object.values(parts).reduce((total, value) => total + value, 0);
  const rows = own.map((row) => ({ ...row, seconds: sum(row.costs.latency_s), bytes: sum(row.costs.dram_bytes) })).filter((row) => row.seconds > 0 && row.bytes > 0);
  if (!rows.length) { if (byId("roofline-plot").data) Plotly.purge(byId("roofline-plot")); return; }
  const x = (row) => (2 * row.macs) / row.bytes;
  const y = (row) => (2 * row.macs) / row.seconds / 1e12;
  const bandwidth = D.bandwidths[context()];
  const peaks = [...new Set(rows.map((row) => Number(((2 * row.peak) / 1e12).toPrecision(3))))];
  const top = Math.max(...peaks);
  const knee = bandwidth ? (top * 1e12) / bandwidth : null;
  const xs = [...rows.map(x), ...(knee ? [knee] : [])];
  const box = { x: [Math.min(...xs) / 1.6, Math.max(...xs) * 1.6], y: [Math.min(...rows.map(y)) / 2.2, top * 1.7] };
  const width = widthOf("roofline-plot");
  const frame = { left: 72, right: 14, top: 12, bottom: 56, width, height: heightOf("roofline-plot", 420, 360) };
  const segments = peaks.map((peak) => [[box.x[0], peak], [box.x[1], peak]]);
  const slope = bandwidth ? [[box.x[0], (box.x[0] * bandwidth) / 1e12], [knee, top]] : null;
  const traces = peaks.map((peak) => ({ x: [bandwidth ? (peak * 1e12) / bandwidth : box.x[0], box.x[1]], y: [peak, peak], mode: "lines", line: { color: rootStyle("--muted"), width: 1.4 }, hoverinfo: "text", hovertext: `MAC array: ${digits(peak)} TOPS` }));
  if (slope) {
    traces.push({ x: slope.map(([at]) => at), y: slope.map(([, at]) => at), mode: "lines", line: { color: rootStyle("--muted"), width: 1.4 }, hoverinfo: "text", hovertext: `DRAM: ${digits(bandwidth / 1e9)} GB/s` });
    segments.push(slope);
  }
  const kinds = [...new Set(rows.map((row) => row.kind))];
  const time = rows.reduce((total, row) => total + row.seconds * row.calls, 0);
  traces.push({
    x: rows.map(x), y: rows.map(y), mode: "markers", hoverinfo: "text",
    hovertext: rows.map((row) => `<b>${plain(row.kind || "layer")}</b> ${row.m} × ${row.k} × ${row.n}, ${row.n_layers} layer${row.n_layers === 1 ? "" : "s"}<br>${digits(y(row))} TOPS of ${digits((2 * row.peak) / 1e12)} (${percent(row.macs / row.seconds / row.peak)})<br>${digits(x(row))} operations a byte<br>limited by ${BOUNDS[row.bound] || plain(row.bound || "")}<br>${percent((row.seconds * row.calls) / time)} of the model's latency`),
    marker: { size: rows.map((row) => 9 + 16 * Math.sqrt((row.seconds * row.calls) / time)), opacity: 0.8, color: rows.map((row) => tone(D.looks.series[kinds.indexOf(row.kind) % D.looks.series.length])), line: { color: rootStyle("--paper"), width: 1 } },
  });
  // Layers of one shape lie on each other: one label for all of them.
  const stacks = new Map();
  for (const row of rows) { const key = `${x(row).toPrecision(4)} ${y(row).toPrecision(4)}`; stacks.set(key, [...(stacks.get(key) || []), row]); }
  const named = [...stacks.values()].map((own) => ({ ...own[0], name: namesOf(own.map((row) => row.kind || "layer")) }));
  const notes = placeNotes(named.slice(0, 10), rows, placer(x, y, box, true, true, frame), segments, (row) => row.name, () => false);
  // Roofs so near each other that their texts would meet get one.
  const groups = [];
  for (const peak of [...peaks].sort((a, b) => b - a)) {
    if (groups.length && groups.at(-1).at(-1) / peak < 1.25) groups.at(-1).push(peak); else groups.push([peak]);
  }
  for (const [highest, ...others] of groups) notes.push({ x: Math.log10(box.x[1]), y: Math.log10(highest), text: others.length ? `${digits(others.at(-1))} to ${digits(highest)} TOPS` : `${digits(highest)} TOPS`, showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 11, color: rootStyle("--muted") } });
  if (slope) notes.push({ x: Math.log10(Math.sqrt(box.x[0] * knee)), y: Math.log10(Math.sqrt(slope[0][1] * top)), text: `${digits(bandwidth / 1e9)} GB/s`, showarrow: false, xanchor: "right", yanchor: "bottom", xshift: -6, font: { size: 11, color: rootStyle("--muted") } });
  draw("roofline-plot", traces, {
    height: frame.height, margin: { l: frame.left, r: frame.right, t: frame.top, b: frame.bottom }, annotations: notes,
    xaxis: axis({ title: "Operations per byte of DRAM traffic", automargin: false, ...logAxis(...box.x) }), yaxis: axis({ title: "Operations per second (TOPS)", automargin: false, ...logAxis(...box.y) }),
  });
  const layers = rows.reduce((total, row) => total + row.n_layers, 0);
  byId("roofline-caption").textContent = `${costs.label} on ${context()}: ${layers} layers of ${rows.length} kinds and shapes, area of a point as its share of the latency. All together get ${digits(rows.reduce((total, row) => total + 2 * row.macs * row.calls, 0) / time / 1e12)} TOPS done. DRAM at its nominal bandwidth; the ceiling is that of the modes the layers run in.`;
}

keep("split", () => (costs.label && costs.label !== D.answers[context()] ? costs.label : ""), (label) => { costs.label = label; costs.named = context(); });

function buildCosts() {
  if (byId("costs-plot")) page.plots.set("costs", drawCosts);
}
