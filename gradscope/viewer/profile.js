// The gradient along the depth of the network, at one step and over all of them.

import { labelledRows, powerTicks } from "./axes.js";
import { elided, number, power } from "./format.js";
import { quantiles } from "./pool.js";
import { nearest } from "./step.js";
import { Surface, cross, element, write } from "./surface.js";

const [LEFT, RIGHT, TOP, BOTTOM] = [58, 14, 12, 92];
const HEIGHT = 330;
const LABEL = 17;
const BAND = [0.1, 0.5, 0.9];

/**
 * Draw the curve in `host`, with a slider for the step.
 *
 * `grid` is what `heatmap` takes, with the layers in the order of depth; `range` as there.
 */
export function profile(host, grid, step) {
  return new Profile(host, grid, step);
}

class Profile {
  constructor(host, grid, step) {
    this.grid = grid;
    this.step = step;
    this.columns = grid.steps.length;
    this.layers = grid.rows.length;
    this.bands = Array.from({ length: this.layers }, (_, layer) => {
      const row = grid.values.subarray(layer * this.columns, (layer + 1) * this.columns);
      return quantiles(row.map((value) => (value > 0 && value < Infinity ? value : NaN)), BAND).map(Math.log10);
    });
    this.marked = [...new Set(grid.marks.map((mark) => mark.row))];
    this.range = padded(grid.range);
    this.at = this.columns - 1;
    this.build(host);
    this.leave = step.subscribe((wanted) => {
      this.at = nearest(grid.steps, wanted);
      this.slider.value = String(this.at);
      this.say();
      this.surface.request();
    });
    this.say();
  }

  build(host) {
    const legend = element("div", "gs-legend");
    legend.append(element("span", "gs-key gs-key-band", "80 % of the steps"), element("span", "gs-key gs-key-line", "median step"));
    this.chosen = element("span", "gs-key gs-key-last");
    legend.append(this.chosen);
    host.append(legend);
    this.surface = new Surface(host, {
      label: `${this.grid.title}: a line over ${this.layers} layers, from input to output.`,
      height: HEIGHT,
      draw: (...given) => this.draw(...given),
    });
    const { canvas } = this.surface;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    const control = element("label", "gs-slider", "step");
    this.slider = element("input");
    this.slider.type = "range";
    this.slider.min = "0";
    this.slider.max = String(this.columns - 1);
    this.slider.value = String(this.at);
    this.slider.disabled = this.columns < 2;
    this.output = element("output");
    control.append(this.slider, this.output);
    host.append(control);
    this.slider.addEventListener("input", () => this.step.set(this.grid.steps[Number(this.slider.value)]));
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      const at = Math.max(0, Math.min(this.columns - 1, this.at + move));
      this.step.set(this.grid.steps[at]);
    });
    this.parts = [legend, control];
  }

  say() {
    const step = number(this.grid.steps[this.at]);
    this.output.textContent = step;
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    this.chosen.textContent = `step ${step}`;
  }

  value(layer) {
    return this.grid.values[layer * this.columns + this.at];
  }

  x(layer) {
    return this.plot.x + ((layer + 0.5) / this.layers) * this.plot.width;
  }

  y(logarithm) {
    const [low, high] = this.range;
    return this.plot.y + ((high - logarithm) / (high - low)) * this.plot.height;
  }

  point(event) {
    const place = this.surface.place(event);
    const layer = Math.floor(((place.x - this.plot.x) / this.plot.width) * this.layers);
    if (layer < 0 || layer >= this.layers) {
      this.surface.hide();
      return;
    }
    const value = this.value(layer);
    const said = value === Infinity ? "NaN or infinite entries" : Number.isNaN(value) ? "not measured" : number(value);
    const lines = [this.grid.rows[layer], `step ${number(this.grid.steps[this.at])}: ${said}`];
    const middle = 10 ** this.bands[layer][1];
    if (Number.isFinite(middle)) lines.push(`median step: ${number(middle)}`);
    lines.push(...new Set(this.grid.marks.filter((mark) => mark.row === layer).map((mark) => mark.text)));
    this.surface.show(place, lines);
  }

  draw(context, width, height, palette) {
    this.plot = { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: height - TOP - BOTTOM };
    const { plot } = this;
    context.clearRect(0, 0, width, height);
    for (const exponent of powerTicks(...this.range, 6)) {
      const y = this.y(exponent);
      context.fillStyle = palette.rule;
      context.fillRect(plot.x, y, plot.width, 1);
      write(context, power(exponent), plot.x - 8, y, { color: palette.muted, align: "right" });
    }
    this.area(context, palette);
    const dots = this.layers <= 80;
    this.curve(context, (layer) => this.bands[layer][1], { color: palette.line, width: 2.2, dots });
    this.curve(context, (layer) => Math.log10(this.value(layer)), { color: palette.last, width: 1.8, dash: [5, 3], dots, square: true });
    this.special(context, palette);
    this.name(context, palette);
  }

  area(context, palette) {
    context.fillStyle = palette.band;
    for (const run of stretches(this.layers, (layer) => Number.isFinite(this.bands[layer][0]))) {
      context.beginPath();
      for (const layer of run) context.lineTo(this.x(layer), this.y(this.bands[layer][2]));
      for (const layer of [...run].reverse()) context.lineTo(this.x(layer), this.y(this.bands[layer][0]));
      context.fill();
    }
  }

  curve(context, logarithm, { color, width, dash = [], dots, square = false }) {
    context.strokeStyle = color;
    context.fillStyle = color;
    context.lineWidth = width;
    for (const run of stretches(this.layers, (layer) => Number.isFinite(logarithm(layer)))) {
      context.setLineDash(dash);
      context.beginPath();
      for (const layer of run) context.lineTo(this.x(layer), this.y(logarithm(layer)));
      context.stroke();
      context.setLineDash([]);
      if (!dots && run.length > 1) continue;
      for (const layer of run) {
        const [x, y] = [this.x(layer), this.y(logarithm(layer))];
        context.beginPath();
        if (square) context.rect(x - 2.6, y - 2.6, 5.2, 5.2);
        else context.arc(x, y, 2.8, 0, 2 * Math.PI);
        context.fill();
      }
    }
  }

  /** What a logarithm can't show: zero at the foot, NaN and infinity at the top. */
  special(context, palette) {
    for (let layer = 0; layer < this.layers; layer++) {
      const value = this.value(layer);
      if (value === Infinity) cross(context, this.x(layer), this.plot.y + 6, 4, palette.nonfinite);
      if (value !== 0) continue;
      const [x, y] = [this.x(layer), this.plot.y + this.plot.height - 3];
      context.fillStyle = palette.ink;
      context.beginPath();
      context.moveTo(x - 4, y - 6);
      context.lineTo(x + 4, y - 6);
      context.lineTo(x, y);
      context.fill();
      if (layer === 0) write(context, "0", x + 7, y - 3, { color: palette.muted, size: 11 });
    }
  }

  name(context, palette) {
    const { plot } = this;
    const foot = plot.y + plot.height;
    context.fillStyle = palette.rule;
    context.fillRect(plot.x, foot, plot.width, 1);
    for (const layer of labelledRows(0, this.layers, this.marked, Math.floor(plot.width / LABEL))) {
      const found = this.marked.includes(layer);
      context.save();
      context.translate(this.x(layer) + 3, foot + 8);
      context.rotate(-0.85);
      write(context, `${found ? "▸ " : ""}${elided(this.grid.rows[layer], 16)}`, 0, 0, { color: found ? palette.ink : palette.muted, align: "right", size: 11, bold: found });
      context.restore();
    }
    write(context, "input → output", plot.x + plot.width, foot + BOTTOM - 8, { color: palette.muted, align: "right" });
  }

  remove() {
    this.leave();
    this.surface.remove();
    this.parts.forEach((part) => part.remove());
  }
}

/** Room above and below; a decade at least. */
function padded(range) {
  const [low, high] = range ?? [-1, 0];
  const room = Math.max(0.06 * (high - low), (1.2 - (high - low)) / 2);
  return [low - room, high + room];
}

/** The unbroken runs of places at which something is known. */
export function stretches(size, known) {
  const runs = [];
  let open = null;
  for (let at = 0; at < size; at++) {
    if (!known(at)) open = null;
    else if (open) open.push(at);
    else runs.push((open = [at]));
  }
  return runs;
}
