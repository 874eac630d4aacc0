"use strict";
// Error against cost: filters, the front of what is visible, limits.

const COST_KEYS = ["latency_s", "weight_bytes", "energy_j", "dram_bytes"].filter((key) => D.columns[key].known);
const ERROR_KEYS = ["output_error", "weight_error"].filter((key) => D.columns[key].known);
const front = {
  cost: COST_KEYS[0], error: D.error, all: false, isLog: false, bars: true,
  isChosen: false, hidden: new Map(D.facets.map((facet) => [facet.key, new Set()])), limits: new Map(),
};

function frontPoints() {
  return D.points.filter((point) =>
    (front.all || point.context === context()) &&
    point[front.cost] !== null && point[front.error] > 0 &&
    D.facets.every((facet) => !front.hidden.get(facet.key).has(point.facets[facet.key])));
}

// Lower left edge, from the cheapest on; equal points stand on it together.
function edgeOf(points) {
  const ordered = [...points].sort((a, b) => a[front.cost] - b[front.cost] || a[front.error] - b[front.error]);
  const edge = [];
  for (const point of ordered) {
    const last = edge.at(-1);
    if (!last || point[front.error] < last[front.error] ||
        (point[front.error] === last[front.error] && point[front.cost] === last[front.cost])) edge.push(point);
  }
  return edge;
}

function withinLimits(point) {
  for (const [key, most] of front.limits) if (point[key] === null || point[key] > most) return false;
  return true;
}

const isAnswer = (point) => D.answers[point.context] === point.label;

function describePoint(point) {
  const lines = [`<b>${plain(point.label)}</b>${front.all ? ` on ${plain(point.context)}` : ""}`];
  for (const key of [...ERROR_KEYS, "sqnr_db", "bits_per_weight", ...COST_KEYS])
    if (point[key] !== null && D.columns[key].known)
      lines.push(`${D.columns[key].heading}: ${plain(withUnit(key, point[key], point.context))}`);
  if (point.rank) lines.push(`Rank ${point.rank}`);
  if (isAnswer(point)) lines.push("What to build");
  return lines.join("<br>");
}

function frontName() { return front.all ? undefined : context(); }

function drawFront() {
  const points = frontPoints();
  const [, xSize] = unitOf(front.cost, frontName());
  const [, ySize] = unitOf(front.error, frontName());
  const x = (point) => point[front.cost] / xSize;
  const y = (point) => point[front.error] / ySize;
  const groups = D.contexts.map((name) => points.filter((point) => point.context === name)).filter((group) => group.length);
  const edges = groups.map(edgeOf);
  const onEdge = new Set(edges.flat());
  const isLog = front.isLog || front.all;
  const box = points.length ? ranges(points.map(x), points.map(y), isLog) : { x: [0, 1], y: [0.1, 1] };
  const traces = [];
  edges.forEach((edge, i) => {
    const xs = [x(edge[0]), ...edge.map(x), box.x[1]];
    const ys = [box.y[1], ...edge.map(y), y(edge.at(-1))];
    traces.push({ x: xs, y: ys, mode: "lines", line: { shape: "hv", color: rootStyle("--muted"), width: 1.4, dash: ["solid", "dash", "dot", "dashdot"][i % 4] }, hoverinfo: "skip" });
  });
  front.areBarsWide = false;
  if (front.bars && front.cost === "latency_s") traces.push(...barTraces([...onEdge], x, y, box.x));
  const ordered = [...points].sort((a, b) => onEdge.has(a) - onEdge.has(b) || isAnswer(a) - isAnswer(b));
  traces.push({
    x: ordered.map(x), y: ordered.map(y), mode: "markers", hoverinfo: "text", hovertext: ordered.map(describePoint), name: "cases",
    marker: {
      color: ordered.map((point) => tone(D.looks.main[point.facets.main])),
      symbol: ordered.map((point) => D.looks.branch[point.branchKey]),
      size: ordered.map((point) => (isAnswer(point) ? 16 : onEdge.has(point) ? 12 : 9)),
      opacity: ordered.map((point) => (!withinLimits(point) ? 0.12 : onEdge.has(point) || isAnswer(point) ? 1 : 0.55)),
      line: { color: rootStyle("--paper"), width: 1.2 },
    },
    cliponaxis: false,
  });
  const width = widthOf("front-plot");
  const height = width > 640 ? 500 : 400;
  const frame = { left: 62, right: 14, top: 12, bottom: 56, width, height };
  const notes = placeNotes([...onEdge].sort((a, b) => isAnswer(b) - isAnswer(a)), points, x, y, box, isLog, frame);
  draw("front-plot", traces, {
    height, margin: { l: frame.left, r: frame.right, t: frame.top, b: frame.bottom }, annotations: notes,
    xaxis: axis({ title: axisTitle(front.cost, frontName()), automargin: false, ...(isLog ? logAxis(...box.x) : { range: box.x, nticks: width > 640 ? 9 : 5 }) }),
    yaxis: axis({ title: axisTitle(front.error, frontName()), automargin: false, ...logAxis(...box.y) }),
  });
  tellFront(points, onEdge);
  tellLimits();
}

function ranges(xs, ys, isLog) {
  const spread = (values, below, above) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const span = Math.log(high / low) || 0.4;
    return [low * Math.exp(-below * span), high * Math.exp(above * span)];
  };
  const y = spread(ys, 0.14, 0.1);
  if (isLog && Math.min(...xs) > 0) return { x: spread(xs, 0.1, 0.08), y };
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const span = high - low || Math.abs(high) * 0.2 || 1;
  return { x: [Math.max(low - 0.14 * span, low >= 0 ? 0 : -Infinity), high + 0.08 * span], y };
}

// The true latency is taken to lie between p / (1 + w) and p / (1 - w). Bars wider than half the
// plot say the same at every point: one of them is enough.
function barTraces(points, x, y, range) {
  let known = points.filter((point) => D.uncertainty[point.context] !== undefined);
  if (!known.length) return [];
  const bound = (point) => Math.min(D.uncertainty[point.context].bound, 0.99);
  const above = (point) => (x(point) * bound(point)) / (1 - bound(point));
  const below = (point) => (x(point) * bound(point)) / (1 + bound(point));
  front.areBarsWide = !front.isLog && !front.all && Math.max(...known.map(above)) > 0.25 * (range[1] - range[0]);
  if (front.areBarsWide) known = known.filter(isAnswer);
  return [{
    x: known.map(x), y: known.map(y), mode: "markers", marker: { size: 0.1, opacity: 0 }, hoverinfo: "skip",
    error_x: { type: "data", symmetric: false, array: known.map(above), arrayminus: known.map(below), color: rootStyle("--accent"), thickness: 1.2, width: 4 },
  }];
}

// Labels of the front: the first of eight places that covers no point, no label and stays inside.
function placeNotes(labelled, points, x, y, box, isLog, frame) {
  const inner = { width: frame.width - frame.left - frame.right, height: frame.height - frame.top - frame.bottom };
  const part = (value, [low, high], log) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
  const pixel = (point) => [part(x(point), box.x, isLog) * inner.width, (1 - part(y(point), box.y, true)) * inner.height];
  const taken = points.map((point) => { const [px, py] = pixel(point); return [px - 8, py - 8, px + 8, py + 8]; });
  const overlaps = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const notes = [];
  const stacks = new Map();
  for (const point of labelled) {
    const place = `${x(point)} ${y(point)}`;
    stacks.set(place, [...(stacks.get(place) || []), point]);
  }
  for (const [point, ...others] of stacks.values()) {
    const name = front.all ? `${point.label} (${point.context})` : point.label;
    const text = shorten(name, frame.width > 640 ? 44 : 26) + (others.length ? ` (+${others.length} equal)` : "");
    const [width, height] = [text.length * 6.6 + 4, 15];
    const [px, py] = pixel(point);
    const places = [
      [-10, 8, "right", "top"], [10, -8, "left", "bottom"], [0, 11, "center", "top"], [12, 0, "left", "middle"],
      [-12, 0, "right", "middle"], [10, 8, "left", "top"], [-10, -8, "right", "bottom"], [0, -11, "center", "bottom"],
      [-10, 26, "right", "top"], [10, 26, "left", "top"], [10, -26, "left", "bottom"], [-10, -26, "right", "bottom"],
    ];
    for (const [dx, dy, xanchor, yanchor] of places) {
      const left = px + dx - { left: 0, center: width / 2, right: width }[xanchor];
      const top = py + dy - { top: 0, middle: height / 2, bottom: height }[yanchor];
      const area = [left, top, left + width, top + height];
      if (left < 0 || area[2] > inner.width + 8 || top < 0 || area[3] > inner.height) continue;
      if (taken.some((other) => overlaps(area, other))) continue;
      taken.push(area);
      notes.push({
        x: isLog ? Math.log10(x(point)) : x(point), y: Math.log10(y(point)), text: isAnswer(point) ? `<b>${plain(text)}</b>` : plain(text),
        showarrow: false, xanchor, yanchor, xshift: dx, yshift: -dy, font: { size: 11.5, color: rootStyle("--ink") }, borderpad: 0,
      });
      break;
    }
  }
  return notes;
}

function tellFront(points, onEdge) {
  const all = D.points.filter((point) => front.all || point.context === context()).length;
  const sentences = [`${points.length} of ${all} case${all === 1 ? "" : "s"} shown, ${onEdge.size} on the front${front.all ? "s" : ""}.`];
  const known = D.uncertainty[context()];
  if (front.bars && front.cost === "latency_s" && !front.all && known !== undefined)
    sentences.push(`${front.areBarsWide ? "Blue bar" : "Bars"}: how far the latency model may be off, ${percent(known.bound)} (${known.seen})${front.areBarsWide ? "; the same at every point and wide against the differences here" : ""}.`);
  byId("front-caption").textContent = sentences.join(" ");
}

function tellLimits() {
  const place = byId("limits-answer");
  if (!front.limits.size) { place.textContent = "Enter what the whole model may cost at most in a denoising step."; return; }
  const fitting = frontPoints().filter((point) => point.context === context() && withinLimits(point));
  if (!fitting.length) { place.textContent = "No visible case keeps these limits."; return; }
  const best = fitting.reduce((a, b) => (b[front.error] < a[front.error] ? b : a));
  const costs = COST_KEYS.filter((key) => best[key] !== null).map((key) => `${D.columns[key].heading.toLowerCase()} ${withUnit(key, best[key], best.context)}`);
  place.replaceChildren(element("strong", { textContent: best.label }),
    ` has the least ${D.columns[front.error].heading.toLowerCase()} of ${fitting.length} that fit: ${withUnit(front.error, best[front.error], best.context)}, ${costs.join(", ")}.`);
}

function buildLimits() {
  const fields = byId("limits").querySelector(".fields");
  fields.replaceChildren();
  front.limits.clear();
  for (const key of [...COST_KEYS, front.error]) {
    const [symbol, size] = unitOf(key, context());
    const input = element("input", { type: "number", min: 0, step: "any", inputMode: "decimal", placeholder: "no limit" });
    input.dataset.key = key;
    input.addEventListener("input", () => {
      const value = Number.parseFloat(input.value);
      if (Number.isFinite(value)) front.limits.set(key, value * size); else front.limits.delete(key);
      drawFront();
    });
    fields.append(element("label", {}, `${D.columns[key].heading}${symbol ? `, ${symbol}` : ""}`, input));
  }
}

function buildFront() {
  const tools = byId("front-tools");
  const costBox = select("Cost", COST_KEYS.map((key) => [key, D.columns[key].heading]), front.cost, (value) => { front.cost = value; front.isChosen = true; drawFront(); });
  // Until the reader chooses, the cost is the one the answer was read from.
  page.plots.set("front cost", () => {
    const told = D.answerCosts[context()];
    if (!front.isChosen && COST_KEYS.includes(told)) { front.cost = told; costBox.box.value = told; }
  });
  tools.append(costBox);
  if (ERROR_KEYS.length > 1)
    tools.append(select("Error", ERROR_KEYS.map((key) => [key, D.columns[key].heading]), front.error, (value) => { front.error = value; buildLimits(); drawFront(); }));
  for (const facet of D.facets) tools.append(facetChips(facet));
  const switches = [];
  if (D.contexts.length > 1) switches.push(chip("all accelerators", { checked: false }, (on) => { front.all = on; drawFront(); }));
  switches.push(chip("logarithmic cost", { checked: false }, (on) => { front.isLog = on; drawFront(); }));
  if (Object.keys(D.uncertainty).length) switches.push(chip("error of the cost model", {}, (on) => { front.bars = on; drawFront(); }));
  const view = chips("View", switches);
  view.classList.add("screen");
  tools.append(view);
  byId("limits").addEventListener("submit", (event) => event.preventDefault());
  buildLimits();
  page.plots.set("front", drawFront);
}

function facetChips(facet) {
  const made = facet.values.map((value) => {
    let mark = null;
    if (facet.key === "main") mark = colorMark(D.looks.main[value]);
    if (facet.key === "branch") mark = symbolMark(D.looks.branch[value === "no branch" ? "none" : value]);
    return chip(value, { mark }, (on) => {
      if (on) front.hidden.get(facet.key).delete(value); else front.hidden.get(facet.key).add(value);
      drawFront();
    });
  });
  const group = chips(facet.heading, made);
  group.dataset.facet = facet.key;
  return group;
}
