"use strict";
// Error against cost: filters, the front of what is visible, limits.

const COST_KEYS = ["latency_s", "weight_bytes", "energy_j", "dram_bytes"].filter((key) => D.columns[key].known);
const ERROR_KEYS = ["output_error", "weight_error"].filter((key) => D.columns[key].known);
const front = {
  cost: COST_KEYS[0], error: D.error, all: false, isLog: false, bars: true,
  isChosen: false, hidden: new Map(D.facets.map((facet) => [facet.key, new Set()])), limits: new Map(),
};

keep("cost", () => (front.isChosen ? front.cost : ""), (key) => { if (COST_KEYS.includes(key)) { front.cost = key; front.isChosen = true; } });
keep("error", () => (front.error === D.error ? "" : front.error), (key) => { if (ERROR_KEYS.includes(key)) front.error = key; });
for (const [key, name, usual] of [["all", "all", false], ["log", "isLog", false], ["bars", "bars", true]])
  keep(key, () => (front[name] === usual ? "" : String(front[name])), (text) => { front[name] = text === "true"; });
for (const facet of D.facets)
  keep(`hide.${facet.key}`, () => JSON.stringify([...front.hidden.get(facet.key)]).replace(/^\[\]$/, ""), (text) => {
    try { for (const value of JSON.parse(text)) if (facet.values.includes(value)) front.hidden.get(facet.key).add(value); } catch { /* Not ours. */ }
  });

function frontPoints() {
  return D.points.map(onMachine).filter((point) =>
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
  const edges = groups.map((group) => edgeOf(group.filter(holdsSums))).filter((edge) => edge.length);
  const onEdge = new Set(edges.flat());
  const isLog = front.isLog || front.all;
  // The axis holds both machines, so that a front is seen to move.
  const shown = points.flatMap((point) => (point.asIs ? [point, point.asIs] : [point]));
  const box = shown.length ? ranges(shown.map(x), shown.map(y), isLog) : { x: [0, 1], y: [0.1, 1] };
  const traces = [];
  const step = (edge, line) => ({ x: [x(edge[0]), ...edge.map(x), box.x[1]], y: [box.y[1], ...edge.map(y), y(edge.at(-1))], mode: "lines", line: { shape: "hv", ...line }, hoverinfo: "skip" });
  if (isAnotherMachine() && !front.all) {
    const still = edgeOf(frontPoints().map((point) => point.asIs || point));
    traces.push(step(still, { color: rootStyle("--line"), width: 3 }));
  }
  edges.forEach((edge, i) => traces.push(step(edge, { color: rootStyle("--muted"), width: 1.4, dash: ["solid", "dash", "dot", "dashdot"][i % 4] })));
  front.areBarsWide = false;
  const bars = front.bars ? [...(front.cost === "latency_s" ? barTraces([...onEdge], x, y, box.x) : []), ...seedBars(points, x, y)] : [];
  traces.push(...bars);
  const ordered = [...points].sort((a, b) => onEdge.has(a) - onEdge.has(b) || isAnswer(a) - isAnswer(b));
  traces.push({
    x: ordered.map(x), y: ordered.map(y), mode: "markers", hoverinfo: "text", hovertext: ordered.map(describePoint), name: "cases",
    customdata: ordered.map((point) => [point.context, point.label]),
    marker: {
      color: ordered.map((point) => tone(D.looks.main[point.facets.main])),
      symbol: ordered.map((point) => (holdsSums(point) ? D.looks.branch[point.branchKey] : "x-thin-open")),
      size: ordered.map((point) => (isAnswer(point) ? 16 : onEdge.has(point) ? 12 : 11)),
      opacity: ordered.map((point) => (!withinLimits(point) ? 0.12 : !holdsSums(point) ? 0.7 : onEdge.has(point) || isAnswer(point) ? 1 : 0.7)),
      line: { color: rootStyle("--paper"), width: 1.2 },
    },
    cliponaxis: false,
  });
  const width = widthOf("front-plot");
  const height = heightOf("front-plot", 500, 400);
  const frame = { left: 62, right: 14, top: 12, bottom: 56, width, height };
  const place = placer(x, y, box, isLog, true, frame);
  const lines = edges.map((edge) => [[x(edge[0]), box.y[1]], ...edge.flatMap((point, i) => [[x(point), y(edge[Math.max(i - 1, 0)])], [x(point), y(point)]]), [box.x[1], y(edge.at(-1))]]);
  const notes = placeNotes([...new Set([...onEdge, ...points.filter(isAnswer)])].sort((a, b) => isAnswer(b) - isAnswer(a)), points, place, [...lines.flatMap((line) => line.slice(1).map((end, i) => [line[i], end])), ...bars.flatMap(segmentsOf)], (point) => (front.all ? `${point.label} (${point.context})` : point.label), isAnswer);
  draw("front-plot", traces, {
    height, margin: { l: frame.left, r: frame.right, t: frame.top, b: frame.bottom }, annotations: notes,
    xaxis: axis({ title: axisTitle(front.cost, frontName()), automargin: false, ...(isLog ? logAxis(...box.x) : { range: box.x, nticks: width > 640 ? 9 : 5 }) }),
    yaxis: axis({ title: axisTitle(front.error, frontName()), automargin: false, ...logAxis(...box.y) }),
  });
  followClicks("front-plot", ([where, label]) => pick(where, label));
  tellFront(points, onEdge);
  tellLimits();
  tellWhatIf();
  tellPicked();
  saveState();
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

// Cases that differ in their seed alone: the spread of the error, at the one of the middle.
function seedBars(points, x, y) {
  const alike = new Map();
  for (const point of points) {
    const key = JSON.stringify([point.context, point.branchKey, point.rank, { ...point.facets, seed: "" }]);
    alike.set(key, [...(alike.get(key) || []), point]);
  }
  const several = [...alike.values()].filter((own) => own.length > 1).map((own) => own.sort((a, b) => y(a) - y(b)));
  front.seeds = several.length ? Math.max(...several.map((own) => own.length)) : 0;
  if (!several.length) return [];
  const middle = several.map((own) => own[Math.floor(own.length / 2)]);
  return [{
    x: middle.map(x), y: middle.map(y), mode: "markers", marker: { size: 0.1, opacity: 0 }, hoverinfo: "skip",
    error_y: { type: "data", symmetric: false, array: several.map((own, i) => y(own.at(-1)) - y(middle[i])), arrayminus: several.map((own, i) => y(middle[i]) - y(own[0])), color: rootStyle("--ink"), thickness: 1.2, width: 4 },
  }];
}

// What error bars cover, for labels to keep off.
function segmentsOf(trace) {
  return trace.x.map((at, i) => (trace.error_x
    ? [[at - trace.error_x.arrayminus[i], trace.y[i]], [at + trace.error_x.array[i], trace.y[i]]]
    : [[at, trace.y[i] - trace.error_y.arrayminus[i]], [at, trace.y[i] + trace.error_y.array[i]]]));
}

// From values to pixels inside a frame, and to what Plotly calls the place of a note.
function placer(x, y, box, isLogX, isLogY, frame) {
  const inner = { width: frame.width - frame.left - frame.right, height: frame.height - frame.top - frame.bottom };
  const part = (value, [low, high], log) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
  const pixels = ([px, py]) => [part(px, box.x, isLogX) * inner.width, (1 - part(py, box.y, isLogY)) * inner.height];
  const at = ([px, py]) => ({ x: isLogX ? Math.log10(px) : px, y: isLogY ? Math.log10(py) : py });
  return { x, y, inner, pixels, at, isWide: frame.width > 640 };
}

// Labels of points: the first of some places that covers no point, no label, no line, and stays inside.
function placeNotes(labelled, points, place, segments, nameOf, isStrong) {
  const { x, y, inner, pixels, at } = place;
  const pixel = (point) => pixels([x(point), y(point)]);
  const dots = points.map((point) => { const [px, py] = pixel(point); return [px - 8, py - 8, px + 8, py + 8]; });
  const taken = [...dots];
  for (const [from, to] of segments) {
    const [[ax, ay], [bx, by]] = [pixels(from), pixels(to)];
    // A slope is taken step by step.
    const steps = Math.abs(ax - bx) < 1 || Math.abs(ay - by) < 1 ? 1 : 40;
    for (let i = 0; i < steps; i += 1) {
      const [u, v] = [i / steps, (i + 1) / steps];
      const [px, qx, py, qy] = [ax + u * (bx - ax), ax + v * (bx - ax), ay + u * (by - ay), ay + v * (by - ay)];
      taken.push([Math.min(px, qx) - 1.5, Math.min(py, qy) - 1.5, Math.max(px, qx) + 1.5, Math.max(py, qy) + 1.5]);
    }
  }
  const overlaps = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const notes = [];
  const areas = [];
  const stacks = new Map();
  for (const point of labelled) {
    const key = `${x(point)} ${y(point)}`;
    stacks.set(key, [...(stacks.get(key) || []), point]);
  }
  const places = [
    [-10, 8, "right", "top"], [10, -8, "left", "bottom"], [0, 11, "center", "top"], [12, 0, "left", "middle"],
    [-12, 0, "right", "middle"], [10, 8, "left", "top"], [-10, -8, "right", "bottom"], [0, -11, "center", "bottom"],
    ...[26, 44, 62].flatMap((far) => [[-10, far, "right", "top"], [10, far, "left", "top"], [10, -far, "left", "bottom"], [-10, -far, "right", "bottom"]]),
    ...[40, 80, 120].flatMap((far) => [[far, 36, "left", "top"], [far, -36, "left", "bottom"], [-far, 36, "right", "top"], [-far, -36, "right", "bottom"]]),
    ...[60, 110].flatMap((far) => [[far, 14, "left", "top"], [far, -14, "left", "bottom"], [-far, 14, "right", "top"], [-far, -14, "right", "bottom"]]),
  ];
  for (const [point, ...others] of stacks.values()) {
    const text = shorten(nameOf(point), place.isWide ? 44 : 26) + (others.length ? ` (+${others.length} equal)` : "");
    const strong = isStrong(point);
    const [width, height] = [text.length * (strong ? 7.4 : 6.6) + 4, 15];
    const [px, py] = pixel(point);
    for (const [dx, dy, xanchor, yanchor] of places) {
      const left = px + dx - { left: 0, center: width / 2, right: width }[xanchor];
      const top = py + dy - { top: 0, middle: height / 2, bottom: height }[yanchor];
      const area = [left, top, left + width, top + height];
      if (left < 0 || area[2] > inner.width + 8 || top < 0 || area[3] > inner.height) continue;
      if (taken.some((other) => overlaps(area, other))) continue;
      const isFar = Math.abs(dx) > 12 || Math.abs(dy) > 12;
      // The line from a far label to its point crosses no label, and none is put on it later.
      const leader = isFar ? Array.from({ length: 24 }, (_, i) => [px + (dx * i) / 24 - 1, py + (dy * i) / 24 - 1, px + (dx * i) / 24 + 1, py + (dy * i) / 24 + 1]) : [];
      if (areas.some((other) => leader.some((piece) => overlaps(piece, other)))) continue;
      if (dots.some((dot) => !overlaps(dot, [px - 8, py - 8, px + 8, py + 8]) && leader.some((piece) => overlaps(piece, dot)))) continue;
      taken.push(area, ...leader);
      areas.push(area);
      notes.push({
        ...at([x(point), y(point)]), text: strong ? `<b>${plain(text)}</b>` : plain(text), xanchor, yanchor, borderpad: 0, bgcolor: rootStyle("--paper"),
        font: { size: 11.5, color: rootStyle("--ink") },
        ...(isFar ? { showarrow: true, arrowhead: 0, arrowwidth: 0.8, arrowcolor: rootStyle("--muted"), ax: dx, ay: dy, standoff: 6 } : { showarrow: false, xshift: dx, yshift: -dy }),
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
    sentences.push(`${front.areBarsWide ? "Blue bar" : "Blue bars, on the front"}: how far the latency model may be off, ${percent(known.bound)} (${known.seen})${front.areBarsWide ? "; the same at every point and wide against the differences here" : ""}.`);
  if (front.bars && front.seeds) sentences.push(`Black bars: the spread of the error over ${front.seeds} seeds.`);
  else if (front.bars) sentences.push("Errors have no bars: each case ran with one seed, all of them on the same inputs, which is what makes them compare.");
  const over = points.filter((point) => !holdsSums(point)).length;
  if (over) sentences.push(`Crosses: ${over} case${over === 1 ? "" : "s"} with sums beyond ${whatIf.acc} bits.`);
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
    keep(`most.${key}`, () => (front.limits.has(key) ? front.limits.get(key).toPrecision(6) : ""), (text) => {
      const value = Number.parseFloat(text);
      if (page.isReady || !Number.isFinite(value)) return;
      front.limits.set(key, value);
      input.value = String(Number((value / size).toPrecision(6)));
    });
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
  if (D.contexts.length > 1) switches.push(chip("all accelerators", { checked: front.all }, (on) => { front.all = on; drawFront(); }));
  switches.push(chip("logarithmic cost", { checked: front.isLog }, (on) => { front.isLog = on; drawFront(); }));
  if (Object.keys(D.uncertainty).length || D.facets.some((facet) => facet.key === "seed")) switches.push(chip("error bars", { checked: front.bars }, (on) => { front.bars = on; drawFront(); }));
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
    return chip(value, { mark, checked: !front.hidden.get(facet.key).has(value) }, (on) => {
      if (on) front.hidden.get(facet.key).delete(value); else front.hidden.get(facet.key).add(value);
      drawFront();
    });
  });
  const group = chips(facet.heading, made);
  group.dataset.facet = facet.key;
  return group;
}
