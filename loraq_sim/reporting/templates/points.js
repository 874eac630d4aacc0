"use strict";
// A point of the front: on another machine, in numbers and images, and as lines to copy.

const whatIf = { at: new Map(), acc: null };

// Where the reader has put the controls of a machine; its own values unless told otherwise.
function placesOn(name) {
  const grid = D.grids[name];
  if (!grid) return [];
  if (!whatIf.at.has(name)) whatIf.at.set(name, grid.controls.map((control) => control.base));
  return whatIf.at.get(name);
}

const isAnotherMachine = () => Boolean(D.grids[context()]) && placesOn(context()).some((at, i) => at !== D.grids[context()].controls[i].base);

const gridIndex = (name) => D.grids[name].controls.reduce((index, control, i) => index * control.values.length + placesOn(name)[i], 0);

// The point as it is on the machine that the controls say; costs of the grid, never in between.
function onMachine(point) {
  const grid = D.grids[point.context];
  if (!grid || placesOn(point.context).every((at, i) => at === grid.controls[i].base)) return point;
  const at = grid.labels.indexOf(point.label);
  const index = gridIndex(point.context);
  const costs = Object.fromEntries(["latency_s", "energy_j", "dram_bytes"].map((key) => [key, at < 0 ? null : grid[key][index][at]]));
  return { ...point, ...costs, utilization: null, asIs: point };
}

const holdsSums = (point) => whatIf.acc === null || point.safe_acc_bits === null || point.safe_acc_bits <= whatIf.acc;

function buildWhatIf() {
  const form = byId("what-if");
  if (!form) return;
  const grid = D.grids[context()];
  const tools = form.querySelector(".tools");
  tools.replaceChildren();
  form.hidden = !grid;
  if (!grid) return;
  grid.controls.forEach((control, i) => {
    const made = control.values.map((value, at) => chip(value, { type: "radio", name: `what-if-${i}`, checked: placesOn(context())[i] === at }, () => { placesOn(context())[i] = at; drawFront(); }));
    const group = chips(control.name, made);
    group.dataset.control = control.name;
    tools.append(group);
  });
  const needed = [...new Set(D.points.filter((point) => point.context === context() && point.safe_acc_bits !== null).map((point) => point.safe_acc_bits))].sort((a, b) => a - b);
  if (needed.length) {
    const options = [["", "as emulated"], ...needed.map((bits) => [String(bits), `${bits} bits`])];
    const box = select("accumulator", options, whatIf.acc === null ? "" : String(whatIf.acc), (value) => { whatIf.acc = value ? Number(value) : null; drawFront(); });
    box.dataset.control = "accumulator";
    tools.append(box);
  }
  tools.append(element("button", { type: "button", textContent: "As it is", onclick: () => { whatIf.at.delete(context()); whatIf.acc = null; buildWhatIf(); drawFront(); } }));
}

function tellWhatIf() {
  const place = byId("what-if-answer");
  const grid = D.grids[context()];
  if (!place || !grid) return;
  const own = D.points.filter((point) => point.context === context());
  const sentences = [];
  if (isAnotherMachine()) {
    const words = grid.controls.map((control, i) => (control.name === "columns" ? `${control.values[placesOn(context())[i]]} columns` : `${control.name === "clock" ? "" : "DRAM of "}${control.values[placesOn(context())[i]]}`));
    const label = grid.answers[gridIndex(context())];
    const point = own.map(onMachine).find((one) => one.label === label);
    if (point) {
      const before = point.asIs || point;
      const costs = ["latency_s", "energy_j"].filter((key) => point[key] !== null).map((key) => `${withUnit(key, point[key], context())} instead of ${withUnit(key, before[key], context())}`);
      const same = label === D.answers[context()];
      sentences.push(`With ${words.join(", ")}: ${same ? "still build" : "build"} ${label}, ${costs.join(" and ")}.`);
    }
    sentences.push("Estimated for this very machine, all else as it is; errors do not change. Gray: the front as it is.");
  } else sentences.push("Costs at each setting are estimates of the cost model for that very machine; nothing lies between the settings.");
  if (whatIf.acc !== null) {
    const over = own.filter((point) => !holdsSums(point));
    const answer = isAnotherMachine() ? grid.answers[gridIndex(context())] : D.answers[context()];
    sentences.push(over.length ? `Sums of ${over.length} of ${own.length} cases do not fit ${whatIf.acc} bits on this input${over.some((point) => point.label === answer) ? `, those of ${answer} among them` : ""}; their errors there are not known, so they leave the front.` : `All sums fit ${whatIf.acc} bits on this input.`);
  }
  place.textContent = sentences.join(" ");
}

function keepWhatIf() {
  keep("machine", () => D.contexts.filter((name) => D.grids[name] && placesOn(name).some((at, i) => at !== D.grids[name].controls[i].base)).map((name) => `${D.contexts.indexOf(name)}:${placesOn(name).join(".")}`).join(","), (text) => {
    for (const one of text.split(",")) {
      const [index, places] = one.split(":");
      const name = D.contexts[Number(index)];
      const read = (places || "").split(".").map(Number);
      const grid = D.grids[name];
      if (grid && read.length === grid.controls.length && read.every((at, i) => Number.isInteger(at) && at >= 0 && at < grid.controls[i].values.length)) whatIf.at.set(name, read);
    }
  });
  keep("acc", () => (whatIf.acc === null ? "" : String(whatIf.acc)), (text) => {
    if (D.points.some((point) => point.safe_acc_bits === Number(text))) whatIf.acc = Number(text);
  });
}

const picked = { context: null, label: null };

function pick(where, label) {
  picked.context = where;
  picked.label = label;
  tellPicked();
  saveState();
}

function followClicks(id, act) {
  const place = byId(id);
  place.removeAllListeners?.("plotly_click");
  place.on?.("plotly_click", (event) => { const { customdata } = event.points[0]; if (customdata) act(customdata); });
}

function copyBlock(name, text) {
  const block = element("pre", { textContent: text, tabIndex: 0 });
  const button = element("button", { type: "button", textContent: "Copy" });
  button.addEventListener("click", async () => {
    let done = true;
    try { await navigator.clipboard.writeText(text); } catch {
      getSelection().selectAllChildren(block);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return element("div", { className: "copy" }, element("p", {}, element("strong", { textContent: name }), button), block);
}

// The line of `points.error_in_images`.
function inImages(error) {
  if (!D.anchors || !(error > 0)) return "";
  const { slope, intercept, spread, low, high } = D.anchors.line;
  if (error < low || error > high) return "";
  return `${percent(error)} is about ${(intercept + slope * Math.log10(error)).toFixed(0)} dB (± ${spread.toFixed(0)}) on ${D.anchors.about.model}`;
}

function tellPicked() {
  const place = byId("picked");
  const found = D.points.find((point) => point.context === picked.context && point.label === picked.label);
  place.hidden = !found;
  place.replaceChildren();
  if (!found) return;
  const point = onMachine(found);
  const facts = element("dl", { className: "figures" });
  for (const key of [...ERROR_KEYS, "sqnr_db", "bits_per_weight", ...COST_KEYS, "safe_acc_bits"])
    if (point[key] !== null && point[key] !== undefined && D.columns[key].known)
      facts.append(element("div", {}, element("dt", { textContent: D.columns[key].heading }), element("dd", { textContent: withUnit(key, point[key], point.context) })));
  const close = element("button", { type: "button", textContent: "Close", onclick: () => pick(null, null) });
  place.append(element("div", { className: "head" }, element("h3", { textContent: D.contexts.length > 1 ? `${point.label} on ${point.context}` : point.label }), close), facts);
  const told = inImages(point.output_error);
  if (told) {
    const near = D.anchors.anchors.reduce((a, b) => (Math.abs(Math.log(b.output_error / point.output_error)) < Math.abs(Math.log(a.output_error / point.output_error)) ? b : a));
    place.append(element("p", { textContent: `${told[0].toUpperCase()}${told.slice(1)}, a small model: here in ${near.split}, at ${percent(near.output_error)} error and ${near.psnr_db.toFixed(1)} dB; below it full precision.` }));
    for (const name of [near.split, "full precision"]) {
      const strip = document.querySelector(`#images img[alt="Digits under ${name}"]`);
      if (strip) place.append(element("img", { className: "strip", alt: strip.alt, width: 256, height: 32, src: strip.src }));
    }
  }
  const texts = D.cases[point.context]?.[point.label];
  if (!texts) { place.append(element("p", { textContent: "The page holds no commands for this case: there are too many." })); return; }
  if (point.asIs) place.append(element("p", { textContent: "The command is for the machine as it is; loraq-sim cost --vary prices others." }));
  for (const [key, name] of [["command", "This case again"], ["recipe", "Its split as a recipe"], ["vectors", "Vectors of the layer with the widest sums"]])
    if (texts[key]) place.append(copyBlock(name, texts[key]));
}

function buildPicker() {
  const own = D.points.filter((point) => point.context === context());
  const options = [["", "a point of the plot"], ...own.map((point) => [point.label, point.label])];
  const box = select("Look at", options, own.some((point) => point.label === picked.label) ? picked.label : "", (label) => pick(label ? context() : null, label || null));
  box.classList.add("picker");
  byId("front-tools").querySelector(".picker")?.remove();
  byId("front-tools").append(box);
}

function buildPoints() {
  keepWhatIf();
  keep("case", () => (picked.label === null ? "" : JSON.stringify([D.contexts.indexOf(picked.context), picked.label])), (text) => {
    try { const [index, label] = JSON.parse(text); if (D.points.some((point) => point.context === D.contexts[index] && point.label === label)) Object.assign(picked, { context: D.contexts[index], label }); } catch { /* Not ours. */ }
  });
  buildWhatIf();
  page.plots.set("picker", buildPicker);
  if (byId("before-plot")) page.plots.set("before", drawBefore);
}

// Each case before and now: a line from one to the other.
function drawBefore() {
  const name = context();
  const cost = COST_KEYS.includes(front.cost) ? front.cost : COST_KEYS[0];
  const usable = (point) => point.context === name && point[cost] !== null && point[D.error] > 0;
  const earlier = new Map(D.before.filter(usable).map((point) => [point.label, point]));
  const pairs = D.points.filter((point) => usable(point) && earlier.has(point.label)).map((point) => [earlier.get(point.label), point]);
  const place = byId("before-plot");
  if (!pairs.length) { if (place.data) Plotly.purge(place); byId("before-caption").textContent = `No case of ${name} is in both stores.`; return; }
  const [, xSize] = unitOf(cost, name);
  const [, ySize] = unitOf(D.error, name);
  const x = (point) => point[cost] / xSize;
  const y = (point) => point[D.error] / ySize;
  const all = pairs.flat();
  const box = ranges(all.map(x), all.map(y), false);
  const tell = (when) => (point) => `<b>${plain(point.label)}</b> ${when}<br>${D.columns[D.error].heading}: ${withUnit(D.error, point[D.error], name)}<br>${D.columns[cost].heading}: ${withUnit(cost, point[cost], name)}`;
  const moved = pairs.filter(([a, b]) => Math.abs(x(a) / x(b) - 1) > 1e-4 || Math.abs(y(a) / y(b) - 1) > 1e-4);
  const width = widthOf("before-plot");
  const frame = { left: 62, right: 14, top: 40, bottom: 56, width, height: 420 };
  const notes = placeNotes(moved.map(([, b]) => b).slice(0, 14), all, placer(x, y, box, false, true, frame), pairs.map(([a, b]) => [[x(a), y(a)], [x(b), y(b)]]), (point) => point.label, isAnswer);
  draw("before-plot", [
    { x: pairs.flatMap(([a, b]) => [x(a), x(b), null]), y: pairs.flatMap(([a, b]) => [y(a), y(b), null]), mode: "lines", line: { color: rootStyle("--muted"), width: 1.2 }, hoverinfo: "skip", showlegend: false },
    { name: "before", x: pairs.map(([a]) => x(a)), y: pairs.map(([a]) => y(a)), mode: "markers", marker: { size: 9, symbol: "circle-open", color: tone(D.looks.series[6]), line: { width: 1.8 } }, hoverinfo: "text", hovertext: pairs.map(([a]) => tell("before")(a)) },
    { name: "now", x: pairs.map(([, b]) => x(b)), y: pairs.map(([, b]) => y(b)), mode: "markers", marker: { size: 9, color: tone(D.looks.series[0]) }, hoverinfo: "text", hovertext: pairs.map(([, b]) => tell("now")(b)) },
  ], {
    showlegend: true, height: frame.height, margin: { l: frame.left, r: frame.right, t: frame.top, b: frame.bottom }, annotations: notes,
    xaxis: axis({ title: axisTitle(cost, name), automargin: false, range: box.x, nticks: width > 640 ? 9 : 5 }), yaxis: axis({ title: axisTitle(D.error, name), automargin: false, ...logAxis(...box.y) }),
  });
  byId("before-caption").textContent = `${pairs.length} cases are in both stores, ${moved.length} of them moved.`;
}
