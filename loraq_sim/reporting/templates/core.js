"use strict";
// State, words, colors and the one function that draws. All data are in D (see plot_data.py).

const D = JSON.parse(document.getElementById("drawn").textContent);
const page = { context: 0, printing: false, plots: new Map() };

const byId = (id) => document.getElementById(id);
const context = () => D.contexts[page.context];
const rootStyle = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function isDark() {
  if (page.printing) return false;
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Inside the margins of A4 or Letter; the page on screen is wider.
const PAPER_WIDTH = 690;
const widthOf = (id) => (page.printing ? PAPER_WIDTH : byId(id).clientWidth);
// On paper two of them and what is said of them fit on a page.
const heightOf = (id, tall, low) => (page.printing ? 340 : widthOf(id) > 640 ? tall : low);

const tone = (pair) => pair[isDark() ? 1 : 0];

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Plotly reads some markup in texts; names from files must not be read so.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function shorten(text, most) {
  return text.length <= most ? text : `${text.slice(0, Math.ceil(most / 2) - 1)}…${text.slice(1 - Math.floor(most / 2))}`;
}

// Three significant digits, whole digits kept, thousands separated.
function digits(value, count = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e9) return value.toPrecision(count);
  const decimals = Math.max(0, count - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

function unitOf(key, name) {
  const column = D.columns[key];
  return name === undefined ? column.unit : column.units[name];
}

function withUnit(key, value, name) {
  if (value === null || value === undefined) return "not known";
  if (D.columns[key].quantity === "count") return value.toLocaleString("en-US");
  const [symbol, size] = unitOf(key, name);
  return `${digits(value / size)} ${symbol}`.trim();
}

function axisTitle(key, name) {
  const [symbol] = unitOf(key, name);
  return D.columns[key].heading + (symbol ? ` (${symbol})` : "");
}

const percent = (value) => `${digits(100 * value)} %`;

// Round tick values of a logarithmic axis, few enough to read.
function logTicks(low, high) {
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
      for (const step of steps) ticks.push(Number((step * 10 ** power).toPrecision(6)));
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    if (inside.length >= 4) return inside.filter((_, i) => i % Math.ceil(inside.length / 9) === 0);
  }
  return undefined;
}

function logAxis(low, high) {
  const ticks = logTicks(low, high);
  const range = [Math.log10(low), Math.log10(high)];
  if (!ticks) return { type: "log", range, nticks: 6 };
  return { type: "log", range, tickvals: ticks, ticktext: ticks.map((tick) => tick.toLocaleString("en-US", { maximumSignificantDigits: 4 })) };
}

function axis(options = {}) {
  return {
    color: rootStyle("--muted"), gridcolor: rootStyle("--grid"), linecolor: rootStyle("--line"),
    zeroline: false, ticks: "", automargin: true, ...options,
    title: { text: options.title || "", standoff: 10, font: { color: rootStyle("--ink"), size: 13 } },
  };
}

function draw(id, traces, layout) {
  const place = byId(id);
  if (!place) return;
  place.querySelector(".waiting")?.remove();
  const wide = widthOf(id) > 640;
  const base = {
    autosize: true, height: 440, showlegend: false, hovermode: "closest", dragmode: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: rootStyle("--sans"), size: wide ? 12 : 11, color: rootStyle("--ink") },
    margin: { l: 8, r: 12, t: 8, b: 8 },
    hoverlabel: {
      align: "left", bgcolor: rootStyle("--panel"), bordercolor: rootStyle("--muted"),
      font: { color: rootStyle("--ink"), family: rootStyle("--sans"), size: 12 },
    },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal", font: { size: wide ? 12 : 11 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: rootStyle("--muted"), activecolor: rootStyle("--accent") },
  };
  if (page.printing) base.width = PAPER_WIDTH;
  Plotly.react(place, traces, { ...base, ...layout }, {
    displaylogo: false, responsive: !page.printing, scrollZoom: false,
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
    toImageButtonOptions: { filename: id, scale: 2 },
  });
}

function redrawAll() {
  for (const drawing of page.plots.values()) drawing();
}

// What the reader chose, kept in the address behind the section: #front?cost=energy_j&hide.main=W4A4.
// Each thing worth keeping has a writer (empty: as it was) and a reader, which ignores what it does
// not know. Reading happens before controls are built, so that they show it.
const kept = new Map();
const asked = new URLSearchParams(location.hash.split("?").slice(1).join("?"));

function keep(key, write, read) {
  kept.set(key, write);
  if (read && asked.has(key)) read(asked.get(key));
}

function saveState() {
  if (!page.isReady) return;
  const chosen = new URLSearchParams();
  for (const [key, write] of kept) {
    const text = write();
    if (text) chosen.set(key, text);
  }
  const section = location.hash.slice(1).split("?")[0];
  const hash = `${section}${chosen.size ? `?${chosen}` : ""}`;
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", `#${hash}`);
}

function followAddress() {
  const section = location.hash.slice(1).split("?")[0];
  if (location.hash.includes("?") && section) byId(section)?.scrollIntoView();
  addEventListener("hashchange", () => {
    // A link to a section drops the rest; another address is another page.
    if (location.hash.includes("?")) location.reload(); else saveState();
  });
}
