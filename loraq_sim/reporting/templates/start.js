"use strict";
// Unpack the plotting library, build the controls, draw, and follow theme, width and printer.

async function unpacked(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  byId(id).remove();
  return new Response(stream).text();
}

async function unpackLibrary() {
  document.head.append(element("script", { textContent: await unpacked("library") }));
}

function showContext() {
  for (const view of document.querySelectorAll(".view")) view.hidden = Number(view.dataset.view) !== page.context;
}

function buildContexts() {
  const place = byId("contexts");
  showContext();
  if (D.contexts.length < 2) return;
  place.hidden = false;
  D.contexts.forEach((name, index) => place.append(chip(name, { type: "radio", name: "context", checked: index === page.context }, () => {
    page.context = index;
    showContext();
    buildLimits();
    buildWhatIf();
    redrawAll();
  })));
}

function buildTheme() {
  const button = byId("theme");
  const say = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-pressed", String(isDark())); };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; say(); redrawAll(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { say(); redrawAll(); });
  say();
}

function followPrinter() {
  const turn = (on) => {
    if (page.printing === on) return;
    page.printing = on;
    document.documentElement.toggleAttribute("data-printing", on);
    redrawAll();
  };
  addEventListener("beforeprint", () => turn(true));
  addEventListener("afterprint", () => turn(false));
  matchMedia("print").addEventListener("change", (event) => turn(event.matches));
}

function followWidth() {
  let width = innerWidth;
  let timer = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redrawAll, 120);
  });
}

async function start() {
  keep("on", () => (page.context ? context() : ""), (name) => { page.context = Math.max(0, D.contexts.indexOf(name)); });
  document.documentElement.dataset.scripts = "true";
  buildContexts();
  buildTheme();
  if (!("DecompressionStream" in window)) return;
  await unpackLibrary();
  if (byId("packed-layers")) D.layers = JSON.parse(await unpacked("packed-layers"));
  buildFront();
  buildPoints();
  buildLayers();
  buildCosts();
  buildAccumulators();
  buildComparisons();
  redrawAll();
  page.isReady = true;
  saveState();
  followPrinter();
  followWidth();
  followAddress();
  document.documentElement.dataset.ready = "true";
}

start();
