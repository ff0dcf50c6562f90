// The gradient along the depth of the network, at one step and over all of them.

import { labelledRows, powerTicks } from "./axes.js";
import { elided, elidedAlike, number, power } from "./format.js";
import { nearest } from "./step.js";
import { Surface, cross, element, write } from "./surface.js";

const [LEFT, RIGHT, TOP] = [58, 14, 12];
const [PLOT, FOOT] = [226, 26];
const LABEL = 17;
// Names stand aslant below the picture: radians, characters, pixels per character.
const [SLANT, LONGEST, CHARACTER] = [0.85, 18, 6.2];

/**
 * Draw the curve in `host`, with a slider for the step.
 *
 * `grid` is what `heatmap` takes, with the layers in the order of depth, and `bands`: of each layer
 * the lower quantile, the median and the upper quantile over the steps, one after another.
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
    this.bands = Array.from({ length: this.layers }, (_, layer) => Array.from(grid.bands.subarray(3 * layer, 3 * layer + 3), Math.log10));
    this.names = elidedAlike(grid.rows, LONGEST);
    // Two more for the mark of a finding.
    this.foot = Math.sin(SLANT) * CHARACTER * (Math.max(...this.names.map((name) => name.length)) + 2) + FOOT;
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
    if (this.grid.values.includes(0)) legend.append(element("span", "gs-key gs-sign", "▾ exactly zero"));
    if (this.grid.values.includes(Infinity)) legend.append(element("span", "gs-key gs-sign", "× NaN or infinite"));
    if (this.marked.length) legend.append(element("span", "gs-key gs-sign", "▸ has a finding"));
    host.append(legend);
    this.surface = new Surface(host, {
      label: `${this.grid.title}: a line over ${this.layers} layers, from input to output.`,
      height: TOP + PLOT + this.foot,
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
    this.output.textContent = String(this.grid.steps[this.at]);
    const said = spelled(this.grid.steps[this.at], this.grid.ends[this.at]);
    this.slider.setAttribute("aria-valuetext", said);
    this.chosen.textContent = said;
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
    const [first, last] = [this.grid.steps[this.at], this.grid.ends[this.at]];
    const lines = [this.grid.rows[layer], `${spelled(first, last)}${last > first ? ", farthest from the median" : ""}: ${said}`];
    const middle = 10 ** this.bands[layer][1];
    if (!Number.isNaN(middle)) lines.push(`median step: ${number(middle)}`);
    lines.push(...new Set(this.grid.marks.filter((mark) => mark.row === layer).map((mark) => mark.text)));
    this.surface.show(place, lines);
  }

  draw(context, width, height, palette) {
    this.plot = { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: PLOT };
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
    this.name(context, height, palette);
  }

  area(context, palette) {
    context.fillStyle = palette.band;
    // A quantile of zero lies below any axis.
    const floor = this.range[0];
    for (const run of stretches(this.layers, (layer) => Number.isFinite(this.bands[layer][2]))) {
      context.beginPath();
      for (const layer of run) context.lineTo(this.x(layer), this.y(this.bands[layer][2]));
      for (const layer of [...run].reverse()) context.lineTo(this.x(layer), this.y(Math.max(floor, this.bands[layer][0])));
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
    }
  }

  name(context, height, palette) {
    const { plot } = this;
    const foot = plot.y + plot.height;
    context.fillStyle = palette.rule;
    context.fillRect(plot.x, foot, plot.width, 1);
    for (const layer of labelledRows(0, this.layers, this.marked, Math.floor(plot.width / LABEL))) {
      const found = this.marked.includes(layer);
      context.save();
      context.translate(this.x(layer) + 3, foot + 8);
      context.rotate(-SLANT);
      // The first ones must not run out of the picture on the left.
      const room = Math.floor(this.x(layer) / (CHARACTER * Math.cos(SLANT))) - 2;
      write(context, `${found ? "▸ " : ""}${elided(this.names[layer], room)}`, 0, 0, { color: found ? palette.ink : palette.muted, align: "right", size: 11, bold: found });
      context.restore();
    }
    write(context, "input → output", plot.x + plot.width, height - 8, { color: palette.muted, align: "right" });
  }

  remove() {
    this.leave();
    this.surface.remove();
    this.parts.forEach((part) => part.remove());
  }
}

function spelled(first, last) {
  return last > first ? `steps ${first} to ${last}` : `step ${first}`;
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
