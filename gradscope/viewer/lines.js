// Curves over the steps, with a logarithmic axis where the numbers span much.

import { linearTicks, powerTicks } from "./axes.js";
import { grouped, number, power } from "./format.js";
import { nearest } from "./step.js";
import { Surface, cross, element, write } from "./surface.js";
import { zoomable } from "./zoom.js";

const [LEFT, RIGHT, TOP, BOTTOM] = [58, 12, 14, 34];
const HEIGHT = 220;
// Marks closer than this would run into one another.
const APART = 9;
// A curve that spans more than this is drawn on a logarithmic axis at first.
const WIDE = 30;
// Colour, dashes and width together tell curves apart.
const STYLES = [
  { color: "line", dash: [], width: 1.8 },
  { color: "last", dash: [6, 3], width: 1.6 },
  { color: "first", dash: [2, 3], width: 1.8 },
  { color: "muted", dash: [9, 3, 2, 3], width: 1.4 },
];

/**
 * Draw curves in `host`.
 *
 * `chart`: `title`, `ends` (the first and the last step), `series` (`{name, steps, values, broken}`:
 * `broken` the steps at which some of it was not finite), `band` (`{name, steps, low, high}` or
 * null), `marks` (`{first, last, text}`) and `peers` (charts, itself among them, that are drawn on
 * one scale; nothing: it has its own).
 */
export function lines(host, chart, step) {
  return new Lines(host, chart, step);
}

class Lines {
  constructor(host, chart, step) {
    this.chart = chart;
    this.step = step;
    this.hidden = new Set();
    this.peers = chart.peers ?? [chart];
    const [left, right] = chart.ends;
    this.whole = { left, right: right > left ? right : left + 1, top: 0, bottom: 1 };
    this.places = [...new Set(chart.series.flatMap(({ steps, broken }) => [...steps, ...broken]))].sort((a, b) => a - b);
    this.log = this.spansMuch();
    this.build(host);
    this.zoom = zoomable(this.surface, {
      whole: this.whole,
      least: { width: Math.min(2, this.whole.right - this.whole.left), height: 1 },
      plot: () => this.plot,
      changed: () => this.surface.request(),
      both: false,
    });
    this.leave = step?.subscribe(() => this.surface.request());
  }

  build(host) {
    this.legend = element("div", "gs-legend");
    if (this.chart.series.length > 1 || this.chart.band) {
      this.chart.series.forEach((series, index) => {
        const key = element("button", `gs-key gs-toggle gs-style-${index % STYLES.length}`, series.name);
        key.type = "button";
        key.setAttribute("aria-pressed", "true");
        key.addEventListener("click", () => {
          if (!this.hidden.delete(index)) this.hidden.add(index);
          key.setAttribute("aria-pressed", String(!this.hidden.has(index)));
          this.surface.request();
        });
        this.legend.append(key);
      });
      if (this.chart.band) this.legend.append(element("span", "gs-key gs-key-band", this.chart.band.name));
    }
    this.zeroKey = element("span", "gs-key gs-sign", "▾ exactly zero");
    if (this.chart.series.some(({ broken }) => broken.length)) this.legend.append(element("span", "gs-key gs-sign", "× NaN or infinite"));
    if (this.chart.series.some(({ values }) => values.includes(0))) this.legend.append(this.zeroKey);
    if (this.chart.marks.length) this.legend.append(element("span", "gs-key gs-sign", "⊓ a finding"));
    this.zeroKey.hidden = !this.log;
    const scale = element("button", "gs-button gs-log", "log");
    scale.type = "button";
    scale.title = "logarithmic axis";
    scale.setAttribute("aria-label", "logarithmic axis");
    scale.setAttribute("aria-pressed", String(this.log));
    scale.addEventListener("click", () => {
      this.log = !this.log;
      scale.setAttribute("aria-pressed", String(this.log));
      this.zeroKey.hidden = !this.log;
      this.surface.request();
    });
    scale.hidden = !this.positive();
    this.legend.append(scale);
    host.append(this.legend);
    this.surface = new Surface(host, {
      label: `${this.chart.title} by step: ${this.chart.series.map((series) => series.name).join(", ")}`,
      height: HEIGHT,
      draw: (...given) => this.draw(...given),
    });
    const { canvas } = this.surface;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.look(null));
    canvas.addEventListener("click", () => {
      if (this.at !== null && this.at !== undefined) this.step?.set(this.at);
    });
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      const from = this.at ?? this.step?.value ?? this.zoom.view.left;
      const step = this.places[Math.max(0, Math.min(this.places.length - 1, nearest(this.places, from) + move))];
      this.look(step);
      this.surface.show({ x: this.x(step), y: TOP }, this.describe(step));
    });
  }

  /** All that is drawn on the scale of some charts: `{steps, values}` each. */
  everything(charts) {
    return charts.flatMap(({ series, band }) => [
      ...series.filter((_, index) => !this.hidden.has(index)),
      ...(band ? [band.low, band.high].map((values) => ({ steps: band.steps, values })) : []),
    ]);
  }

  positive() {
    const all = this.everything(this.peers).map(({ values }) => values);
    return all.every((values) => values.every((value) => !(value < 0))) && all.some((values) => values.some((value) => value > 0));
  }

  spansMuch() {
    let [low, high] = [Infinity, 0];
    for (const { values } of this.everything(this.peers)) {
      for (const value of values) {
        if (value < 0) return false;
        if (value > 0) [low, high] = [Math.min(low, value), Math.max(high, value)];
      }
    }
    return high > WIDE * low;
  }

  look(step) {
    this.at = step;
    this.surface.request();
  }

  point(event) {
    const place = this.surface.place(event);
    const { plot } = this;
    if (event.buttons || place.x < plot.x - 4 || place.x > plot.x + plot.width + 4) {
      this.surface.hide();
      this.look(null);
      return;
    }
    const { left, right } = this.zoom.view;
    const wanted = left + ((place.x - plot.x) / plot.width) * (right - left);
    const step = this.places[nearest(this.places, wanted)];
    this.look(step);
    this.surface.show(place, this.describe(step));
  }

  describe(step) {
    const told = [`step ${step}`];
    this.chart.series.forEach((series, index) => {
      if (this.hidden.has(index)) return;
      const at = nearest(series.steps, step);
      const known = series.steps[at] === step;
      const broken = series.broken.includes(step);
      if (known) told.push(`${series.name}: ${number(series.values[at])}${broken ? ", others NaN or infinite" : ""}`);
      else if (broken) told.push(`${series.name}: NaN or infinite`);
    });
    const { band } = this.chart;
    if (band?.steps.length) {
      const at = nearest(band.steps, step);
      if (band.steps[at] === step) told.push(`${band.name}: ${number(band.low[at])} to ${number(band.high[at])}`);
    }
    for (const mark of this.chart.marks) if (mark.first <= step && step <= mark.last) told.push(mark.text);
    return told;
  }

  /** The lowest and highest number of all peers; in a closer look, of this chart within the view. */
  extent(view) {
    const { left, right } = this.whole;
    const closer = view.left > left || view.right < right;
    let [low, high] = [Infinity, -Infinity];
    for (const { steps, values } of this.everything(closer ? [this.chart] : this.peers)) {
      values.forEach((value, at) => {
        const outside = closer && (steps[at] < view.left || steps[at] > view.right);
        if (outside || !Number.isFinite(value) || (this.log && value <= 0)) return;
        if (value < low) low = value;
        if (value > high) high = value;
      });
    }
    if (low > high) return [0, 1];
    if (this.log) [low, high] = [Math.log10(low), Math.log10(high)];
    const least = this.log ? 0.5 : Math.abs(high) * 1e-3 || 1;
    const room = Math.max(0.06 * (high - low), (least - (high - low)) / 2);
    // Of what is never negative no negative number is on the axis.
    return [!this.log && low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  x(step) {
    const { left, right } = this.zoom?.view ?? this.whole;
    return this.plot.x + ((step - left) / (right - left)) * this.plot.width;
  }

  y(value) {
    const [low, high] = this.range;
    const shown = this.log ? Math.log10(value) : value;
    return this.plot.y + ((high - shown) / (high - low)) * this.plot.height;
  }

  draw(context, width, height, palette) {
    const view = this.zoom?.view ?? this.whole;
    this.plot = { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: height - TOP - BOTTOM };
    this.range = this.extent(view);
    context.clearRect(0, 0, width, height);
    this.grid(context, view, palette);
    context.save();
    context.beginPath();
    context.rect(this.plot.x - 3, 0, this.plot.width + 6, this.plot.y + this.plot.height + 3);
    context.clip();
    if (this.chart.band) this.area(context, palette);
    this.chart.series.forEach((series, index) => {
      if (this.hidden.has(index)) return;
      this.curve(context, series, STYLES[index % STYLES.length], palette);
      this.special(context, series, palette);
    });
    this.marks(context, palette);
    this.crosshair(context, palette);
    context.restore();
  }

  grid(context, view, palette) {
    const { plot } = this;
    const [low, high] = this.range;
    const ticks = this.logTicks(low, high);
    for (const { value, text } of ticks) {
      const y = this.y(value);
      context.fillStyle = palette.rule;
      context.fillRect(plot.x, y, plot.width, 1);
      write(context, text, plot.x - 8, y, { color: palette.muted, align: "right" });
    }
    for (const tick of linearTicks(view.left, view.right, plot.width / 72, true)) {
      write(context, String(tick), this.x(tick), plot.y + plot.height + 13, { color: palette.muted, align: "center" });
    }
    write(context, "step", plot.x + plot.width, plot.y + plot.height + 28, { color: palette.muted, align: "right" });
  }

  logTicks(low, high) {
    if (this.log && high - low >= 1.5) return powerTicks(low, high, 5).map((exponent) => ({ value: 10 ** exponent, text: power(exponent) }));
    const [from, to] = this.log ? [10 ** low, 10 ** high] : [low, high];
    return linearTicks(from, to, 5).map((value) => ({ value, text: tickText(value) }));
  }

  /** As many points per pixel as are needed: the first, the lowest, the highest, the last. */
  curve(context, { steps, values }, { color, dash, width }, palette) {
    context.strokeStyle = palette[color];
    context.fillStyle = palette[color];
    context.lineWidth = width;
    context.setLineDash(dash);
    const points = [];
    let pixel = null;
    steps.forEach((step, at) => {
      const value = values[at];
      if (!Number.isFinite(value) || (this.log && value <= 0)) return;
      const [x, y] = [this.x(step), this.y(value)];
      const column = Math.round(2 * x);
      if (pixel?.column !== column) points.push((pixel = { column, x, ys: [y, y, y, y] }));
      else pixel.ys = [pixel.ys[0], Math.min(pixel.ys[1], y), Math.max(pixel.ys[2], y), y];
    });
    context.beginPath();
    for (const { x, ys } of points) for (const y of ys) context.lineTo(x, y);
    context.stroke();
    context.setLineDash([]);
    if (points.length === 1) {
      context.beginPath();
      context.arc(points[0].x, points[0].ys[0], 3, 0, 2 * Math.PI);
      context.fill();
    }
  }

  /** What has no place on the axis: NaN and infinity at the top, zero at the foot of a logarithm. */
  special(context, { steps, values, broken }, palette) {
    const spaced = (places, mark) => {
      let last = -Infinity;
      for (const x of places.map((step) => this.x(step))) {
        if (x - last < APART) continue;
        mark((last = x));
      }
    };
    spaced(broken, (x) => cross(context, x, this.plot.y + 5, 4, palette.nonfinite));
    if (!this.log) return;
    const foot = this.plot.y + this.plot.height;
    context.fillStyle = palette.ink;
    spaced(steps.filter((_, at) => values[at] === 0), (x) => {
      context.beginPath();
      context.moveTo(x - 3.5, foot - 7);
      context.lineTo(x + 3.5, foot - 7);
      context.lineTo(x, foot - 1);
      context.fill();
    });
  }

  area(context, palette) {
    const { steps, low, high } = this.chart.band;
    const floor = this.log ? 10 ** this.range[0] : -Infinity;
    const known = [...steps.keys()].filter((at) => Number.isFinite(low[at]) && Number.isFinite(high[at]) && (!this.log || high[at] > 0));
    context.fillStyle = palette.band;
    context.beginPath();
    for (const at of known) context.lineTo(this.x(steps[at]), this.y(high[at]));
    for (const at of known.reverse()) context.lineTo(this.x(steps[at]), this.y(Math.max(low[at], floor)));
    context.fill();
  }

  /** The steps of findings, as a bar above the curves. */
  marks(context, palette) {
    context.fillStyle = palette.ink;
    for (const { first, last } of this.chart.marks) {
      const [left, right] = [this.x(first), Math.max(this.x(last), this.x(first) + 3)];
      context.fillRect(left, 4, right - left, 2);
      context.fillRect(left, 4, 1.5, 7);
      context.fillRect(right - 1.5, 4, 1.5, 7);
    }
  }

  crosshair(context, palette) {
    for (const [step, color] of [[this.step?.value, palette.muted], [this.at, palette.ink]]) {
      if (step === null || step === undefined) continue;
      context.fillStyle = color;
      context.fillRect(this.x(step) - 0.5, this.plot.y, 1, this.plot.height);
    }
  }

  remove() {
    this.leave?.();
    this.zoom.remove();
    this.surface.remove();
    this.legend.remove();
  }
}

function tickText(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return number(value);
  return grouped(Number(value.toPrecision(6)));
}
