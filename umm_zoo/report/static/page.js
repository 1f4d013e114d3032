// Curves, sample slider, full-size images, copying. No library, no network.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const make = (name, attributes, parent) => {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
};
const short = value => {
  const size = Math.abs(value);
  if (value && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(size >= 1e4 ? 6 : 4)));
};

/** Round places of an axis: at most `most` of them within [low, high]. */
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  return found;
}

class Chart {
  constructor(place, chart) {
    this.place = place;
    this.series = chart.series.map((own, i) => ({...own, colour: `var(--c${i % 8})`, dash: i > 7 ? "5 3" : "none", shown: true}));
    this.xs = null;                       // the part that is zoomed into
    this.log = false;
    const header = document.createElement("header");
    const title = document.createElement("h3");
    title.textContent = chart.title;
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.textContent = "log";
    this.button.title = "logarithmic scale";
    this.button.onclick = () => { this.log = !this.log; this.draw(); };
    header.append(title, this.button);
    this.svg = make("svg", {role: "img", "aria-label": chart.title});
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    this.legend = document.createElement("div");
    this.legend.className = "legend";
    place.append(header, this.svg, this.tip, this.legend);
    this.legend.hidden = this.series.length < 2;
    for (const own of this.series) {
      const key = document.createElement("button");
      key.type = "button";
      const dot = document.createElement("i");
      dot.style.background = own.colour;
      key.append(dot, own.name);
      key.onclick = () => { own.shown = !own.shown; this.draw(); };
      own.key = key;
      this.legend.append(key);
    }
    this.svg.onpointermove = event => this.hover(event);
    this.svg.onpointerleave = () => { this.tip.hidden = true; this.cursor?.remove(); };
    this.svg.onpointerdown = event => { if (event.pointerType === "mouse") this.from = this.at(event); };
    window.addEventListener("pointerup", event => this.release(event));
    this.svg.ondblclick = () => { this.xs = null; this.draw(); };
    new ResizeObserver(() => this.draw()).observe(place);
  }

  /** Points of a series that can be shown on this scale. */
  points(own) {
    return own.points.filter(([x, y]) => (!this.log || y > 0) && (!this.xs || (x >= this.xs[0] && x <= this.xs[1])));
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    this.svg.replaceChildren();
    this.button.setAttribute("aria-pressed", this.log);
    this.button.hidden = !this.series.some(own => own.points.some(([, y]) => y > 0));
    const shown = this.series.filter(own => own.shown);
    this.series.forEach(own => own.key.setAttribute("aria-pressed", own.shown));
    const all = shown.flatMap(own => this.points(own));
    if (!all.length) { make("text", {x: 10, y: 20}, this.svg).textContent = "nothing to show on this scale"; this.to = null; return; }
    const scale = y => this.log ? Math.log10(y) : y;
    let [x0, x1] = this.xs ?? [Math.min(...all.map(p => p[0])), Math.max(...all.map(p => p[0]))];
    let [y0, y1] = [Math.min(...all.map(p => scale(p[1]))), Math.max(...all.map(p => scale(p[1])))];
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    const room = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
    y0 -= room; y1 += room;
    const left = 52, right = 10, top = 8, bottom = 20;
    this.to = {
      x: x => left + (x - x0) / (x1 - x0) * (width - left - right),
      y: y => height - bottom - (scale(y) - y0) / (y1 - y0) * (height - top - bottom),
      back: px => x0 + (Math.min(Math.max(px, left), width - right) - left) / (width - left - right) * (x1 - x0),
    };
    for (const at of ticks(y0, y1, 5)) {
      const y = height - bottom - (at - y0) / (y1 - y0) * (height - top - bottom);
      make("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}, this.svg);
      make("text", {x: left - 6, y: y + 4, "text-anchor": "end"}, this.svg).textContent = short(this.log ? 10 ** at : at);
    }
    for (const at of ticks(x0, x1, Math.max(2, Math.floor(width / 90)))) {
      const x = this.to.x(at);
      make("text", {x, y: height - 5, "text-anchor": x > width - 30 ? "end" : "middle"}, this.svg).textContent = short(at);
    }
    for (const own of shown) {
      const points = this.points(own), style = `stroke: ${own.colour}; stroke-dasharray: ${own.dash}`;
      make("polyline", {class: "series", style, points: points.map(([x, y]) => `${this.to.x(x).toFixed(1)},${this.to.y(y).toFixed(1)}`).join(" ")}, this.svg);
      if (points.length < 40) for (const [x, y] of points) make("circle", {cx: this.to.x(x), cy: this.to.y(y), r: 2.4, style: `fill: ${own.colour}`}, this.svg);
    }
  }

  at(event) { return event.clientX - this.svg.getBoundingClientRect().left; }

  hover(event) {
    if (!this.to) return;
    const px = this.at(event), x = this.to.back(px);
    this.cursor?.remove();
    if (this.from !== undefined) {
      this.cursor = make("rect", {class: "zoom", x: Math.min(px, this.from), y: 0, width: Math.abs(px - this.from), height: this.svg.clientHeight}, this.svg);
      return;
    }
    const lines = [];
    let nearest = null;
    for (const own of this.series.filter(own => own.shown)) {
      const points = this.points(own);
      if (!points.length) continue;
      const point = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      if (nearest === null || Math.abs(point[0] - x) < Math.abs(nearest - x)) nearest = point[0];
      lines.push([own, point]);
    }
    this.tip.replaceChildren();
    if (nearest === null) { this.tip.hidden = true; return; }
    const head = document.createElement("b");
    head.textContent = `step ${nearest}`;
    this.tip.append(head);
    for (const [own, [at, y]] of lines) {
      const line = document.createElement("div");
      line.textContent = `${own.name}: ${short(y)}${at === nearest ? "" : ` (step ${at})`}`;
      line.style.color = own.colour;
      this.tip.append(line);
    }
    this.tip.hidden = false;
    this.tip.style.left = `${Math.min(px + 12, this.svg.clientWidth - this.tip.offsetWidth)}px`;
    this.tip.style.top = "2.2rem";
    this.cursor = make("line", {class: "grid", x1: this.to.x(nearest), x2: this.to.x(nearest), y1: 0, y2: this.svg.clientHeight - 20}, this.svg);
  }

  release(event) {
    if (this.from === undefined) return;
    const from = this.from, to = this.at(event);
    this.from = undefined;
    this.cursor?.remove();
    if (this.to && Math.abs(to - from) > 5) this.xs = [this.to.back(Math.min(from, to)), this.to.back(Math.max(from, to))];
    this.draw();
  }
}

const stored = document.getElementById("charts");
if (stored) {
  const charts = JSON.parse(stored.textContent);
  document.querySelectorAll("[data-chart]").forEach(place => new Chart(place, charts[place.dataset.chart]));
}

document.querySelectorAll(".samples").forEach(place => {
  const images = [...place.querySelectorAll("img")], slider = place.querySelector("input"), label = place.querySelector("output");
  const show = () => {
    images.forEach((image, i) => { image.hidden = i !== Number(slider.value); });
    label.textContent = images[slider.value].alt;
  };
  if (slider) { slider.oninput = show; show(); }
});

const dialog = document.createElement("dialog");
const whole = document.createElement("img");
dialog.append(whole);
dialog.onclick = () => dialog.close();
document.body.append(dialog);
document.querySelectorAll(".samples img").forEach(image => {
  image.onclick = () => { whole.src = image.src; whole.alt = image.alt; dialog.showModal(); };
});

document.querySelectorAll("[data-copy]").forEach(button => {
  button.onclick = async () => {
    const area = document.createElement("textarea");
    area.value = button.dataset.copy;
    document.body.append(area);
    area.select();
    document.execCommand("copy");                              // works in pages opened from the disk too
    area.remove();
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
});
