"use strict";
// Heat map of layers against cases, and errors by layer kind.

const heat = { quantity: 0 };

keep("layers", () => (heat.quantity ? String(heat.quantity) : ""), (text) => { const at = Number(text); if (Number.isInteger(at) && at >= 0) heat.quantity = at; });

function drawHeat() {
  const layers = D.layers[context()];
  const quantity = layers.quantities[Math.min(heat.quantity, layers.quantities.length - 1)];
  if (!quantity) return;
  const isCount = quantity.key === "overflow_count";
  const isBits = quantity.key === "safe_acc_bits";
  const isFraction = !isCount && !isBits;
  const scaled = (value) => {
    if (value === null) return null;
    if (isBits) return value;
    return isCount ? Math.log10(1 + value) : value > 0 ? Math.log10(value) : null;
  };
  const values = valuesOf(layers, quantity);
  const z = values.map((line) => line.map(scaled));
  const wide = widthOf("layers-plot") > 640;
  const told = values.map((line, i) => line.map((value, j) => tellCell(layers, quantity, value, i, j)));
  const labels = layers.labels.map((label) => {
    const text = plain(shorten(label, wide ? 40 : 22));
    return D.answers[context()] === label ? `<b>${text}</b>` : text;
  });
  const flat = z.flat().filter((value) => value !== null);
  const thick = layers.names.length <= (wide ? 40 : 12);
  const traces = [{
    type: "heatmap", z, hoverinfo: "text", text: told, colorscale: "Cividis", reversescale: true, xgap: thick ? 1 : 0, ygap: 1,
    colorbar: {
      thickness: 11, outlinewidth: 0, x: 1.01, xpad: 4, ...colorTicks(flat, isFraction, isCount), tickfont: { size: 11, color: rootStyle("--muted") },
    },
  }];
  if (layers.failed.length)
    traces.push({
      x: layers.failed.map(([, j]) => j), y: layers.failed.map(([i]) => i), mode: "markers", hoverinfo: "text",
      hovertext: layers.failed.map(([i, j]) => `${plain(layers.names[j])}<br>${plain(layers.labels[i])}<br>failed`),
      marker: { symbol: "x-thin", size: 7, line: { color: rootStyle("--muted"), width: 1.2 } },
    });
  const many = layers.labels.length > 45;
  // Turned names are a line high, and stand side by side where the names of cases leave room.
  const room = widthOf("layers-plot") - 90 - 6.5 * Math.max(...layers.labels.map((label) => Math.min(label.length, wide ? 40 : 22)));
  const every = Math.max(1, Math.ceil(layers.names.length / Math.max(2, Math.floor(room / 19))));
  const ticks = layers.names.map((_, j) => j).filter((j) => j % every === 0);
  draw("layers-plot", traces, {
    height: Math.max(260, layers.labels.length * (many ? 12 : wide ? 19 : 17) + 150),
    xaxis: axis({ tickvals: ticks, ticktext: ticks.map((j) => plain(shorten(layers.names[j], 24))), tickangle: -60, range: [-0.5, layers.names.length - 0.5], tickfont: { size: wide ? 10 : 9 }, showgrid: false }),
    yaxis: axis({ tickvals: layers.labels.map((_, i) => i), ticktext: labels, range: [layers.labels.length - 0.5, -0.5], tickfont: { size: many || !wide ? 9 : 11.5 }, showgrid: false }),
  });
  const note = layers.prefix ? ` Names begin with ${layers.prefix}` : "";
  const failed = layers.failed.length ? ` Crosses: ${layers.failed.length} failed.` : "";
  byId("layers-caption").textContent = `${quantity.heading[0].toUpperCase()}${quantity.heading.slice(1)} on ${context()}, ${layers.names.length} layers, ${layers.labels.length} cases. Bold: what to build.${failed}${note}`;
}

// Lines of equal values are stored as one; a quantity may be another one divided (layer_cells.py).
function valuesOf(layers, quantity) {
  const source = quantity.z ? quantity : layers.quantities.find((item) => item.key === quantity.of);
  const lines = source.z.map((line) => (Array.isArray(line) ? line : layers.names.map(() => line)));
  if (quantity.z) return lines;
  return lines.map((line, i) => line.map((value) => (value === null || !quantity.by[i] ? null : value / quantity.by[i])));
}

function tellCell(layers, quantity, value, i, j) {
  const kind = layers.kinds[j] ? ` (${plain(layers.kinds[j])})` : "";
  const isWhole = quantity.key === "safe_acc_bits" || quantity.key === "overflow_count";
  const shown = value === null ? "no value" : isWhole ? value.toLocaleString("en-US") : percent(value);
  const at = layers.bounds.at[i];
  const bound = layers.bounds.names[Array.isArray(at) ? at[j] : at];
  const limit = quantity.key.startsWith("share:latency") && bound ? `<br>limited by ${plain(bound)}` : "";
  return `<b>${plain(layers.prefix + layers.names[j])}</b>${kind}<br>${plain(layers.labels[i])}<br>${quantity.heading}: ${shown}${limit}`;
}

function colorTicks(values, isFraction, isCount) {
  if (!values.length) return {};
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (isCount) {
    const ticks = [0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9].filter((count) => Math.log10(1 + count) <= high + 1e-9);
    return { tickvals: ticks.map((count) => Math.log10(1 + count)), ticktext: ticks.map((count) => count.toLocaleString("en-US")) };
  }
  if (!isFraction) return { dtick: Math.max(1, Math.ceil((high - low) / 8)) };
  const ticks = logTicks(10 ** low * 100, 10 ** high * 100) || [10 ** low * 100];
  return { tickvals: ticks.map((tick) => Math.log10(tick / 100)), ticktext: ticks.map((tick) => `${tick.toLocaleString("en-US", { maximumSignificantDigits: 3 })} %`) };
}

function drawKinds() {
  const own = D.kinds.filter((row) => row.context === context() && row.error > 0);
  if (!own.length) return;
  const kinds = [...new Set(own.map((row) => row.kind))];
  const best = D.answers[context()];
  const [, size] = unitOf(D.error, context());
  const ordered = [...own].sort((a, b) => (a.label === best) - (b.label === best));
  const values = ordered.map((row) => row.error / size);
  draw("kinds-plot", [{
    x: values, y: ordered.map((row) => kinds.indexOf(row.kind)), mode: "markers", hoverinfo: "text",
    hovertext: ordered.map((row) => `<b>${plain(row.kind)}</b>, ${row.n_layers} layer${row.n_layers === 1 ? "" : "s"}<br>${plain(row.label)}<br>${D.columns[D.error].heading}: ${withUnit(D.error, row.error, context())}`),
    marker: {
      symbol: ordered.map((row) => D.looks.branch[row.branch] + (row.label === best ? "" : "-open")),
      color: ordered.map((row) => tone(D.looks.main[row.main])), size: ordered.map((row) => (row.label === best ? 13 : 9)),
      opacity: ordered.map((row) => (row.label === best ? 1 : 0.8)),
    },
  }], {
    height: Math.max(200, kinds.length * 34 + 80), margin: { l: 8, r: 16, t: 8, b: 48 },
    xaxis: axis({ title: axisTitle(D.error, context()), ...logAxis(Math.min(...values) * 0.85, Math.max(...values) * 1.15) }),
    yaxis: axis({ tickvals: kinds.map((_, i) => i), ticktext: kinds.map((kind) => plain(shorten(kind, 22))), range: [kinds.length - 0.5, -0.5] }),
  });
}

function buildLayers() {
  const tools = byId("layers-tools");
  const build = () => {
    const { quantities } = D.layers[context()];
    tools.replaceChildren(select("Quantity", quantities.map((item, i) => [String(i), item.heading]), String(Math.min(heat.quantity, quantities.length - 1)), (value) => { heat.quantity = Number(value); drawHeat(); saveState(); }));
  };
  page.plots.set("heat tools", build);
  page.plots.set("heat", drawHeat);
  page.plots.set("kinds", drawKinds);
}
