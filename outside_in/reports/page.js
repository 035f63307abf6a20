// Builds the page from the JSON in #data, whose form `Page` in page.py gives. `page_drawing.js` draws the charts.

const SWITCHES = { // their titles, and what each value is called
  x: ["x axis", { steps: "steps", tokens: "tokens", seconds: "time" }],
  xs: ["x scale", { linear: "linear", log: "log" }],
  y: ["y scale", { auto: "automatic", linear: "linear", log: "log" }],
};
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const drawings = []; // functions that draw, again whenever a switch or the width changes
const drawAll = () => drawings.forEach((draw) => draw());

// ---- what the reader has chosen stands in the address, so that it outlives reloading

const chosen = { x: data.x, xs: "linear", y: "auto", hidden: new Set(), open: new Set() };
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  if (name === "hidden" || name === "open") chosen[name] = new Set(value.split(",").filter(Boolean));
  else if (Object.hasOwn(SWITCHES, name) && Object.hasOwn(SWITCHES[name][1], value)) chosen[name] = value;
}

function choose(name, value, isIn) { // a switch, or whether a value is in a set
  if (isIn === undefined) chosen[name] = value;
  else if (isIn) chosen[name].add(value);
  else chosen[name].delete(value);
  const texts = Object.entries(chosen).map(([key, of]) => [key, of instanceof Set ? [...of].join(",") : of]);
  history.replaceState(null, "", `#${new URLSearchParams(texts)}`);
}

// ---- parts of the page

function section(title, note, ...parts) {
  page.append(make("section", {}, make("h2", {}, `${title} `, make("small", {}, note)), ...parts));
}

function folded(title, ...parts) {
  const details = make("details", {}, make("summary", {}, title), ...parts);
  details.open = chosen.open.has(title);
  details.addEventListener("toggle", () => choose("open", title, details.open));
  page.append(details);
}

const date = (seconds) => new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

function addHead() {
  const written = make("span", { class: "faint" });
  const tell = () => {
    const minutes = Math.floor((Date.now() / 1000 - data.written) / 60);
    written.textContent = ` · written ${date(data.written)}${minutes > 0 ? `, ${number(minutes)} min ago` : ""}`;
  };
  tell();
  setInterval(tell, 20_000);
  const tiles = data.tiles.map(([name, value, note]) => {
    const shown = typeof value === "number" ? number(value) : value ?? "–";
    return make("div", { title: `${name} ${value}` }, name, make("b", {}, shown), make("span", { class: "faint" }, note));
  });
  document.title = data.title;
  page.append(make("h1", {}, data.title), make("p", { id: "status" }, data.status, written));
  page.append(make("div", { class: "tiles" }, ...tiles));
}

function addSwitches() {
  const bar = make("form", { class: "switches" });
  for (const [name, [title, options]] of Object.entries(SWITCHES)) {
    const inputs = Object.entries(options).map(([value, text]) => {
      const input = make("input", { type: "radio", name, value });
      input.checked = chosen[name] === value;
      input.addEventListener("change", () => {
        choose(name, value);
        drawAll();
      });
      return make("label", {}, input, text);
    });
    bar.append(make("fieldset", {}, make("legend", {}, title), ...inputs));
  }
  page.append(bar);
}

function addRuns() { // each can be hidden, and stands out while the pointer is on its name
  const labels = data.runs.map((name, i) => {
    const run = String(i), input = make("input", { type: "checkbox", name: "run", value: run });
    input.checked = !chosen.hidden.has(run);
    input.addEventListener("change", () => {
      choose("hidden", run, !input.checked);
      drawAll();
    });
    const label = make("label", {}, input, swatch({ color: i, kind: "" }), name);
    const fade = (isOn) => {
      for (const line of document.querySelectorAll("[data-run]")) line.classList.toggle("away", isOn && line.dataset.run !== run);
    };
    label.addEventListener("pointerenter", () => fade(true));
    label.addEventListener("pointerleave", () => fade(false));
    return label;
  });
  page.append(make("div", { class: "key" }, ...labels));
}

function addChart(chart) {
  const holder = make("div", { class: "drawing" });
  const lines = data.runs.length > 1 ? [] : chart.lines.filter((line) => line.x.length);
  const levels = chart.levels.map((level) => ({ kind: "level", name: `${level.name} ${number(level.value)}` }));
  const key = [...lines, ...levels].map((line) => make("span", {}, swatch(line), line.name));
  section(chart.title, chart.unit + (chart.right ? `; right: ${chart.right.unit}` : ""), make("div", { class: "key" }, ...key), holder);
  drawings.push(() => drawChart(chart, holder));
}

function addHeatMap(map) {
  const holder = make("div", { class: "drawing" }), values = map.values.flat().filter((value) => value > 0);
  const ramp = make("span", { class: "ramp", style: `background: linear-gradient(90deg, ${VIRIDIS})` });
  const key = values.length ? [number(lowest(values)), ramp, number(highest(values)), ", logarithmic; gray: 0 or not finite"] : [];
  section(map.title, "by layer", make("div", { class: "key" }, make("span", {}, ...key)), holder);
  drawings.push(() => drawHeatMap(map, holder));
}

function addTable({ title, note, columns, rows, folded: isFolded }) {
  const isNumber = (value) => typeof value === "number" || /^-?[\d.,:]+(e[-+]?\d+)?$/.test(value);
  const classes = columns.map((_, i) => {
    const values = rows.map((row) => row[i]).filter((value) => value !== null && value !== "–");
    return values.length && values.every(isNumber) ? "number" : values[0]?.time ? "date" : "text";
  });
  const cell = (tag, text, i) => make(tag, { class: classes[i] }, text);
  const show = (value) => {
    if (typeof value === "number") return number(value);
    return value?.time ? date(value.time) : typeof value === "string" ? value : "–";
  };
  const head = make("tr", {}, ...columns.map((text, i) => cell("th", text, i)));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) => cell("td", show(value), i))));
  const whole = make("div", { class: "wide" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
  if (isFolded) folded(title, whole);
  else section(title, note, whole);
}

function addSamples(samples) {
  const texts = ([step, lines]) => [
    make("p", { class: "faint" }, `step ${number(step)}`),
    ...lines.map((text) => make("p", { class: "sample" }, text)),
  ];
  section("Samples", "of the newest checkpoint", ...texts(samples.at(-1)));
  folded("Samples as they developed", ...samples.flatMap(texts));
}

addHead();
if (data.charts.length) addSwitches();
if (data.runs.length > 1) addRuns();
data.charts.forEach(addChart);
data.heat_maps.forEach(addHeatMap);
data.tables.forEach(addTable);
if (data.samples.length) addSamples(data.samples);
drawAll();

let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnWidth) drawAll(); // a phone's address bar changes only the height
  drawnWidth = innerWidth;
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => (details.open = true)));
if (data.reload_seconds) setInterval(() => document.hidden || location.reload(), 1000 * data.reload_seconds);
