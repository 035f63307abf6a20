"use strict";
// Scales, charts and heat maps as SVG and canvas. `data` is the page's JSON, `chosen` what the reader has chosen; `page.js`
// sets both. All text comes in as text, never as HTML.

const X_NAMES = { steps: "global step", tokens: "training tokens", seconds: "of training steps, compiling included" };
const TIME_UNITS = [[86400, "days"], [3600, "hours"], [60, "minutes"], [1, "seconds"]];
const LOG_FROM = 8; // ratio of the largest to the smallest value above which a log scale reads better
const NUM_COLORS = 6; // --c0 to --c5 of page.css
const DASHES = ["", "7 3", "2 3", "9 3 2 3"]; // of lines that share a color
const MAX_DOTS = 200; // of validation; more of them hide what is behind
const TOP = 8, BOTTOM = 38; // margins of a chart
const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
const SVG_TAGS = ["svg", "path", "line", "text", "circle"];

// ---- elements and numbers

function make(tag, attributes = {}, ...children) {
  const svg = "http://www.w3.org/2000/svg";
  const element = SVG_TAGS.includes(tag) ? document.createElementNS(svg, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value, digits = 5) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e15)) return value.toExponential(digits - 2).replace(/\.?0+e/, "e");
  return value.toLocaleString("en-US", Number.isInteger(value) ? {} : { maximumSignificantDigits: digits });
}

function short(value) {
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= unit) return number(value / unit, 4) + name;
  return number(value, 4);
}

function clock(seconds) {
  const [hours, ...rest] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  return [hours, ...rest.map((part) => String(part).padStart(2, "0"))].join(":");
}

function ramp(share) { // the color between those of VIRIDIS
  const at = share * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const parts = [1, 3, 5].map((start) => {
    const [from, to] = [VIRIDIS[i], VIRIDIS[i + 1]].map((text) => parseInt(text.slice(start, start + 2), 16));
    return Math.round(from + (at - i) * (to - from));
  });
  return `rgb(${parts})`;
}

const lowest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const highest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

// ---- scales

function nearest(values, wanted) { // the index, where values ascend
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle;
    else high = middle;
  }
  return wanted - values[low] <= values[high] - wanted ? low : high;
}

function position(step, run) { // of a step on the chosen axis; between the clock's steps in proportion
  if (chosen.x === "steps") return step;
  const { steps, [chosen.x]: values } = data.clocks[run];
  if (steps.length < 2) return values[0];
  const before = steps.findLastIndex((other) => other <= step), i = Math.min(Math.max(before, 0), steps.length - 2);
  return values[i] + ((step - steps[i]) / (steps[i + 1] - steps[i])) * (values[i + 1] - values[i]);
}

function linearTicks(low, high, count) {
  const least = (high - low) / count, power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= least) * power, ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low), every = Math.ceil(decades / 8), ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const factor of decades < 2.5 ? [1, 2, 5] : [1])
      if (power % every === 0) ticks.push(+`${factor}e${power}`);
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 1 ? inside : [low, high].map((value) => +value.toPrecision(3));
}

function scale(low, high, isLog, from, to, count, unit = 1) { // ticks are round numbers of units
  if (low === high) {
    const half = Math.abs(low) / 2 || 0.5;
    [low, high] = isLog ? [low / 2, high * 2] : [low - half, high + half];
  }
  const f = isLog ? (value) => Math.log(Math.max(value, low)) : (value) => value; // log: 0 stands at the lower edge
  const at = (value) => from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
  const ticks = (isLog ? logTicks : linearTicks)(low / unit, high / unit, count);
  return { at, low, high, ticks: ticks.map((tick) => ({ value: tick * unit, shown: tick })) };
}

function across(low, high, left, right) { // the horizontal scale, with its name and the text of a tick
  const isLog = chosen.xs === "log" && low > 0, isTime = chosen.x === "seconds";
  const [unit, name] = isTime ? TIME_UNITS.find(([seconds]) => high > 2 * seconds) || [1, "seconds"] : [1, ""];
  const xs = scale(low, high, isLog, left, right, Math.max(3, (right - left) / 90), unit);
  const text = chosen.x === "tokens" ? short : number;
  const ticks = chosen.x === "steps" ? xs.ticks.filter((tick) => Number.isInteger(tick.shown)) : xs.ticks;
  return { ...xs, ticks, left, right, name: `${name} ${X_NAMES[chosen.x]}`.trim(), text: (tick) => text(tick.shown) };
}

function upward(chart, values, height) { // the vertical scale
  const levels = chart.levels.filter((level) => level.scales).map((level) => level.value);
  const all = values.concat(levels), positive = all.filter((value) => value > 0);
  let low = lowest(all), high = highest(all);
  const wanted = chosen.y === "auto" && !chart.zero && high > LOG_FROM * lowest(positive);
  if (positive.length && (chosen.y === "log" || wanted))
    return scale(low > 0 ? low : lowest(positive) / 2, high, true, height - BOTTOM, TOP, height / 55);
  if (chart.zero) low = Math.min(low, 0);
  return scale(low, high + 0.03 * (high - low), false, height - BOTTOM, TOP, height / 55);
}

// ---- what charts and heat maps share

const color = (line) => `var(--c${line.color % NUM_COLORS})`;
const dash = (line) => DASHES[Math.floor(line.color / NUM_COLORS) % DASHES.length];

function swatch(line) { // a piece of a line, for keys
  const svg = make("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
  if (line.kind === "level") svg.append(make("path", { class: "level", d: "M0 6H26" }));
  else if (line.kind === "crosses") svg.append(make("path", { class: "line cross", d: "M9 2l8 8m-8 0l8 -8" }));
  else svg.append(make("path", { class: `line ${line.kind}`, stroke: color(line), "stroke-dasharray": dash(line), d: "M0 6H26" }));
  return svg;
}

function frame(holder, height, xs, rows, label) { // an empty drawing with its axes
  const width = widthOf(holder), svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const line = (x1, y1, x2, y2) => make("line", { class: "grid", x1, y1, x2, y2 });
  const text = (x, y, anchor, content) => make("text", { x, y, "text-anchor": anchor }, content);
  for (const tick of xs.ticks) {
    const x = xs.at(tick.value);
    svg.append(line(x, TOP, x, height - BOTTOM), text(x, height - BOTTOM + 16, "middle", xs.text(tick)));
  }
  for (const { y, left, right } of rows) {
    svg.append(line(xs.left, y, xs.right, y), text(xs.left - 6, y + 4, "end", left));
    if (right) svg.append(text(xs.right + 6, y + 4, "start", right));
  }
  svg.append(text((xs.left + xs.right) / 2, height - 5, "middle", xs.name));
  holder.replaceChildren(svg);
  return svg;
}

const widthOf = (holder) => Math.max(260, holder.clientWidth);

function follow(holder, svg, xs, find) { // shows the values where the pointer is, or where the arrow keys have moved to
  const { width, height } = svg.viewBox.baseVal;
  const pointer = make("line", { class: "pointer", y1: TOP, y2: height - BOTTOM });
  const box = make("div", { class: "values", role: "status" });
  let x = xs.right, y = null; // y only of a pointer
  const show = () => {
    const found = find(x, y), { steps, tokens, seconds } = data.clocks[found.run], i = nearest(steps, found.step);
    pointer.setAttribute("x1", found.x);
    pointer.setAttribute("x2", found.x);
    box.replaceChildren(make("b", {}, `step ${number(found.step)}`), ` · ${short(tokens[i])} tokens · ${clock(seconds[i])}`);
    for (const { line, text } of found.rows) box.append(make("div", {}, ...(line ? [swatch(line)] : []), text));
    svg.append(pointer);
    holder.append(box);
    const left = found.x < width / 2 ? found.x + 12 : found.x - 12 - box.offsetWidth;
    box.style.left = `${Math.max(0, Math.min(left, width - box.offsetWidth))}px`;
  };
  const hide = () => [pointer, box].forEach((element) => element.remove());
  svg.setAttribute("tabindex", 0);
  for (const name of ["pointermove", "pointerdown"]) svg.addEventListener(name, (event) => {
    const area = svg.getBoundingClientRect();
    [x, y] = [event.clientX - area.left, event.clientY - area.top].map((at) => (at * width) / area.width);
    show();
  });
  for (const event of ["pointerleave", "blur"]) svg.addEventListener(event, hide);
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    [x, y] = [Math.max(xs.left, Math.min(xs.right, x + 5 * way)), null];
    show();
  });
}

// ---- a chart

function drawChart(chart, holder) {
  const width = widthOf(holder), height = width < 500 ? 250 : 330;
  const lines = chart.lines.filter((line) => line.x.length && !chosen.hidden.has(String(line.run)));
  if (!lines.length) return holder.replaceChildren(make("p", { class: "faint" }, "nothing to show"));
  for (const line of lines) line.at = line.x.map((step) => position(step, line.run));
  const [low, high] = [lowest(lines.map((line) => line.at[0])), highest(lines.map((line) => line.at.at(-1)))];
  const xs = across(low, high, 58, width - (chart.right ? 62 : 26));
  const values = lines.filter((line) => line.kind !== "crosses").flatMap((line) => line.y);
  const ys = upward(chart, values.length ? values : [0], height);
  const second = (value) => chart.right && number(value * chart.right.factor, 3) + (chart.right.suffix || "");
  const rows = ys.ticks.map(({ value }) => ({ y: ys.at(value), left: short(value), right: second(value) }));
  const svg = frame(holder, height, xs, rows, `${chart.title} over ${xs.name}`);
  const marks = data.marks.map((mark) => ({ ...mark, x: xs.at(position(mark.step, 0)) }));
  for (const { x } of marks) svg.append(make("path", { class: "mark", d: `M${x} ${TOP}V${height - BOTTOM}` }));
  for (const { value } of chart.levels.filter((level) => level.value >= ys.low && level.value <= ys.high))
    svg.append(make("path", { class: "level", d: `M${xs.left} ${ys.at(value)}H${xs.right}` }));
  for (const line of lines) drawLine(svg, line, xs, ys, height);

  follow(holder, svg, xs, (x) => {
    const found = lines.filter((line) => line.hover).map((line) => ({ line, i: nearest(line.at.map(xs.at), x) }));
    const distance = ({ line, i }) => Math.abs(xs.at(line.at[i]) - x);
    const closest = found.reduce((a, b) => (distance(b) < distance(a) ? b : a)), step = closest.line.x[closest.i];
    const texts = found.map(({ line, i }) => {
      const value = number(line.y[i]) + (chart.right ? ` (${second(line.y[i])} ${chart.right.unit})` : "");
      const where = Math.abs(xs.at(line.at[i]) - x) < 6 ? "" : ` at step ${number(line.x[i])}`;
      return { line, text: line.kind === "crosses" ? line.name + where : `${line.name} ${value}${where}` };
    });
    const near = marks.filter((mark) => Math.abs(mark.x - x) < 6);
    return { step, run: closest.line.run, x: xs.at(closest.line.at[closest.i]), rows: [...texts, ...near] };
  });
}

function drawLine(svg, line, xs, ys, height) {
  if (line.kind === "crosses") {
    const crosses = line.at.map((x) => `M${xs.at(x) - 4} ${height - BOTTOM - 12}l8 8m-8 0l8 -8`);
    return svg.append(make("path", { class: "line cross", d: crosses.join("") }));
  }
  const points = line.at.map((x, i) => [xs.at(x).toFixed(1), ys.at(line.y[i]).toFixed(1)]);
  const looks = { class: `line ${line.kind}`, "data-run": line.run, stroke: color(line), "stroke-dasharray": dash(line) };
  svg.append(make("path", { ...looks, d: `M${points.join("L")}` }));
  if (points.length === 1 || (line.kind === "dots" && points.length <= MAX_DOTS))
    for (const [cx, cy] of points) svg.append(make("circle", { "data-run": line.run, cx, cy, r: 3, fill: color(line) }));
}

// ---- a heat map: rows of layers, columns of steps, the color is the logarithm of the value

function drawHeatMap(map, holder) {
  const width = widthOf(holder), row = Math.max(8, Math.min(18, 420 / map.rows.length)), rowsHeight = row * map.rows.length;
  const left = Math.min(0.45 * width, 20 + 7 * highest(map.rows.map((name) => name.length)));
  const at = map.steps.map((step) => position(step, 0)), xs = across(at[0], at.at(-1), left, width - 26);
  const every = Math.ceil(12 / row); // row that has its name
  const rows = map.rows.map((name, i) => ({ y: TOP + row * (i + 0.5), left: i % every ? "" : name }));
  const svg = frame(holder, TOP + rowsHeight + BOTTOM, xs, rows, `${map.title} by layer over ${xs.name}`);
  const canvas = make("canvas", { width: xs.right - xs.left, height: rowsHeight }), context = canvas.getContext("2d");
  const logs = map.values.flat().filter((value) => value > 0).map(Math.log), low = lowest(logs), high = highest(logs);
  const middles = at.slice(1).map((x, j) => (xs.at(x) + xs.at(at[j])) / 2 - xs.left), edges = [0, ...middles, canvas.width];
  map.values.forEach((values, i) => values.forEach((value, j) => {
    const share = high > low ? (Math.log(value) - low) / (high - low) : 0.5;
    context.fillStyle = value > 0 ? ramp(share) : "#888";
    context.fillRect(Math.floor(edges[j]), i * row, Math.ceil(edges[j + 1] - edges[j]) + 1, row);
  }));
  Object.assign(canvas.style, { left: `${(100 * xs.left) / width}%`, top: `${TOP}px`, width: `${(100 * canvas.width) / width}%` });
  holder.append(canvas);
  follow(holder, svg, xs, (x, y) => {
    const j = nearest(at.map(xs.at), x), texts = map.rows.map((name, i) => ({ text: `${name} ${number(map.values[i][j])}` }));
    const shown = y === null ? texts : texts.slice(Math.max(0, Math.floor((y - TOP) / row))).slice(0, 1); // under the pointer
    return { step: map.steps[j], run: 0, x: xs.at(at[j]), rows: shown };
  });
}
