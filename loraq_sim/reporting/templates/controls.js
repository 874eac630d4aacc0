"use strict";
// Selects, chips and switches. Every one calls `changed` with its new value.

function select(label, options, value, changed) {
  const box = element("select");
  for (const [key, text] of options) box.append(element("option", { value: key, textContent: text }));
  box.value = value;
  box.addEventListener("change", () => changed(box.value));
  const field = element("label", { className: "field" }, label, box);
  field.box = box;
  return field;
}

function chip(text, { type = "checkbox", name = "", checked = true, mark = null } = {}, changed) {
  const input = element("input", { type, name, checked });
  const face = element("span");
  if (mark) face.append(mark);
  face.append(text);
  input.addEventListener("change", () => changed(input.checked));
  return element("label", { className: "chip" }, input, face);
}

function chips(legend, made) {
  return element("fieldset", {}, element("legend", { textContent: legend }), element("div", { className: "chips" }, ...made));
}

const SHAPES = {
  circle: "M6,1A5,5 0 1,1 5.99,1Z", square: "M1.5,1.5H10.5V10.5H1.5Z", diamond: "M6,0.5L11.5,6L6,11.5L0.5,6Z",
  "triangle-up": "M6,1L11.5,10.5H0.5Z", "triangle-down": "M6,11L0.5,1.5H11.5Z", pentagon: "M6,0.7L11.4,4.6L9.3,11H2.7L0.6,4.6Z",
  x: "M3,0.8L6,3.8L9,0.8L11.2,3L8.2,6L11.2,9L9,11.2L6,8.2L3,11.2L0.8,9L3.8,6L0.8,3Z", cross: "M4.2,0.8H7.8V4.2H11.2V7.8H7.8V11.2H4.2V7.8H0.8V4.2H4.2Z",
  "triangle-left": "M1,6L10.5,0.5V11.5Z", "triangle-right": "M11,6L1.5,0.5V11.5Z", hexagon: "M6,0.5L10.8,3.2V8.8L6,11.5L1.2,8.8V3.2Z",
  star: "M6,0.4L7.6,4.2L11.7,4.5L8.6,7.2L9.5,11.2L6,9L2.5,11.2L3.4,7.2L0.3,4.5L4.4,4.2Z",
};

function symbolMark(symbol) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  for (const [key, value] of Object.entries({ viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" })) picture.setAttribute(key, value);
  path.setAttribute("d", SHAPES[symbol] || SHAPES.circle);
  path.setAttribute("fill", "currentColor");
  picture.append(path);
  return picture;
}

function colorMark(pair) {
  const dot = element("span", { className: "dot" });
  const paint = () => { dot.style.background = tone(pair); };
  paint();
  page.plots.set(dot, paint);
  return dot;
}
