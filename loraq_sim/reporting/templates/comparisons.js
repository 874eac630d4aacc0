"use strict";
// Methods at equal bytes, mixed allocations, cost model against measurement.

const SERIES_SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];

function seriesLook(index) {
  return { color: tone(D.looks.series[index % D.looks.series.length]), symbol: SERIES_SYMBOLS[index % SERIES_SYMBOLS.length] };
}

function drawMethods() {
  const own = D.methods.filter((item) => item.context === context());
  const place = byId("methods-plot");
  if (!own.length) { if (place.data) Plotly.purge(place); return; }
  const methods = [...new Set(D.methods.flatMap((item) => item.cases.map((found) => found.method)))].sort();
  const [, size] = unitOf(D.error, context());
  const wide = widthOf("methods-plot") > 640;
  const lines = own.map((item, i) => {
    const values = item.cases.map((found) => found.error / size);
    return { x: [Math.min(...values), Math.max(...values)], y: [i, i], mode: "lines", line: { color: rootStyle("--line"), width: 3 }, hoverinfo: "skip", showlegend: false };
  });
  const dots = methods.map((method, index) => {
    const found = own.flatMap((item, i) => item.cases.filter((one) => one.method === method).map((one) => ({ ...one, i, name: item.name })));
    return {
      name: plain(method), x: found.map((one) => one.error / size), y: found.map((one) => one.i), mode: "markers", marker: { ...seriesLook(index), size: 11 },
      hoverinfo: "text", hovertext: found.map((one) => `<b>${plain(one.label)}</b><br>${one.name}<br>${D.columns[D.error].heading}: ${withUnit(D.error, one.error, context())}`),
    };
  });
  const values = own.flatMap((item) => item.cases.map((one) => one.error / size)).filter((value) => value > 0);
  draw("methods-plot", [...lines, ...dots], {
    showlegend: true, height: Math.max(220, own.length * 34 + 110), margin: { l: 8, r: 16, t: 8, b: 48 },
    xaxis: axis({ title: axisTitle(D.error, context()), ...logAxis(Math.min(...values) * 0.9, Math.max(...values) * 1.1) }),
    yaxis: axis({ tickvals: own.map((_, i) => i), ticktext: own.map((item) => (wide ? item.name : item.name.replace(" bits per weight", " bit"))), range: [own.length - 0.5, -0.5], showgrid: false }),
  });
}

const mixed = { cost: "latency_s" };

function buildMixedTools(own, item) {
  const tools = byId("mixed-tools");
  if (own.length < 2) { tools.replaceChildren(); return; }
  tools.replaceChildren(select("Cost", own.map((one) => [one.cost, D.columns[one.cost].heading]), item.cost, (value) => { mixed.cost = value; drawMixed(); }));
}

function drawMixed() {
  const own = D.mixed.filter((item) => item.context === context());
  const place = byId("mixed-plot");
  const item = own.find((one) => one.cost === mixed.cost) || own[0];
  buildMixedTools(own, item);
  if (!item) { if (place.data) Plotly.purge(place); byId("mixed-caption").textContent = `No allocation for ${context()}: it takes two splits or more.`; return; }
  const [, xSize] = unitOf(item.cost, context());
  const [, ySize] = unitOf(D.error, context());
  const frontier = item.frontier.filter((point) => point.error > 0);
  const uniform = item.uniform.filter((point) => point.error > 0 && point.cost !== null);
  const tell = (kind) => (point) => `<b>${kind}</b>${point.name ? `: ${plain(point.name)}` : ""}<br>${D.columns[item.cost].heading}: ${withUnit(item.cost, point.cost, context())}<br>${D.columns[D.error].heading}: ${withUnit(D.error, point.error, context())}`;
  const all = [...frontier, ...uniform].map((point) => point.error / ySize);
  const wide = widthOf("mixed-plot") > 640;
  draw("mixed-plot", [
    { name: "a split for each layer", x: frontier.map((point) => point.cost / xSize), y: frontier.map((point) => point.error / ySize), mode: "lines+markers", line: { color: tone(D.looks.series[0]), width: 2, shape: "hv" }, marker: { size: 5, color: tone(D.looks.series[0]) }, hoverinfo: "text", hovertext: frontier.map(tell("Mixed")) },
    { name: "one split for all layers", x: uniform.map((point) => point.cost / xSize), y: uniform.map((point) => point.error / ySize), mode: "markers", marker: { size: 10, symbol: "square", color: tone(D.looks.series[1]), line: { color: rootStyle("--paper"), width: 1 } }, hoverinfo: "text", hovertext: uniform.map(tell("Uniform")) },
  ], {
    showlegend: true, height: heightOf("mixed-plot", 440, 360), margin: { l: 62, r: 14, t: 8, b: 56 },
    xaxis: axis({ title: axisTitle(item.cost, context()), nticks: wide ? 9 : 5 }),
    yaxis: axis({ title: axisTitle(D.error, context()), ...logAxis(Math.min(...all) * 0.88, Math.max(...all) * 1.12) }),
  });
  byId("mixed-caption").textContent = `${frontier.length} allocations on ${context()}, against ${uniform.length} uniform splits.`;
}

function drawTrust() {
  const rows = D.validation;
  const devices = [...new Set(rows.map((row) => row.device))];
  const times = rows.flatMap((row) => [row.measured_ms, row.predicted_ms]);
  const ends = [Math.min(...times) * 0.6, Math.max(...times) * 1.7];
  const line = (factor, dash) => ({ x: ends, y: ends.map((end) => end * factor), mode: "lines", line: { color: rootStyle("--muted"), width: 1, dash }, hoverinfo: "skip", showlegend: false });
  const wide = widthOf("trust-plot") > 640;
  draw("trust-plot", [line(1, "solid"), line(1.15, "dash"), line(1 / 1.15, "dash"), ...devices.map((device, index) => {
    const own = rows.filter((row) => row.device === device);
    return {
      name: plain(device), x: own.map((row) => row.measured_ms), y: own.map((row) => row.predicted_ms), mode: "markers", marker: { ...seriesLook(index), size: 9, opacity: 0.85 },
      hoverinfo: "text", hovertext: own.map((row) => `<b>${plain(row.device)}</b>, ${plain(row.kernel)}<br>${row.m} × ${row.k} × ${row.n}<br>measured ${digits(row.measured_ms)} ms, predicted ${digits(row.predicted_ms)} ms (${row.predicted_ms > row.measured_ms ? "+" : "−"}${percent(Math.abs(row.predicted_ms / row.measured_ms - 1))})`),
    };
  })], {
    showlegend: true, height: heightOf("trust-plot", 520, 400), margin: { l: 66, r: 14, t: 8, b: 56 },
    xaxis: axis({ title: "Measured time (ms)", ...logAxis(...ends) }), yaxis: axis({ title: "Predicted time (ms)", ...logAxis(...ends) }),
  });
}

function buildComparisons() {
  if (byId("methods-plot")) page.plots.set("methods", drawMethods);
  if (byId("mixed-plot")) page.plots.set("mixed", drawMixed);
  if (byId("trust-plot")) page.plots.set("trust", drawTrust);
}
