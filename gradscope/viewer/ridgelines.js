// How the entries of tensors spread over magnitudes: a ridge per layer, or per step.

import { labelledRows, linearTicks } from "./axes.js";
import { color } from "./colormap.js";
import { elided, elidedAlike, number, percent, power } from "./format.js";
import { nearest } from "./step.js";
import { Surface, element, write } from "./surface.js";

const [RIGHT, TOP, BOTTOM] = [14, 30, 40];
const [SPACING, TALL] = [17, 3.1];
const [LOWEST, HIGHEST] = [170, 640];
const LOG2 = Math.log10(2);

/**
 * Draw the ridges in `host`.
 *
 * `spread`: `symbol` (what the magnitude is of), `layers` (names), `steps`, `lowest` (the exponent of two at which the first bin
 * begins), `bins` and `roots` (Uint8Array, layers × steps × bins: 255 times the root of the share
 * of entries in the octave) and `unmeasured` (Uint8Array, layers × steps: 1 where nothing was
 * read); `range` (exponents of two, to share one scale between pictures).
 */
export function ridgelines(host, spread, step) {
  return new Ridgelines(host, spread, step);
}

class Ridgelines {
  constructor(host, spread, step) {
    this.spread = spread;
    this.step = step;
    this.range = spread.range ?? [spread.lowest, spread.lowest + spread.bins];
    this.at = lastKnown(spread);
    // -1: every layer at one step.
    this.layer = -1;
    this.build(host);
    this.leave = step.subscribe((wanted) => {
      this.at = nearest(spread.steps, wanted);
      this.surface.request();
    });
  }

  build(host) {
    this.bar = element("label", "gs-choice", "show");
    this.select = element("select");
    this.select.append(new Option("every layer at one step", "-1"));
    this.spread.layers.forEach((name, index) => this.select.append(new Option(`${name}, step by step`, String(index))));
    this.select.addEventListener("change", () => {
      this.layer = Number(this.select.value);
      this.surface.paint();
    });
    this.bar.append(this.select);
    host.append(this.bar);
    this.surface = new Surface(host, {
      label: "How many of a tensor's entries have which magnitude: a ridge per layer, or per step of one layer.",
      height: () => Math.max(LOWEST, Math.min(HIGHEST, SPACING * this.ridges().length + TOP + BOTTOM + 30)),
      draw: (...given) => this.draw(...given),
    });
    this.surface.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.surface.canvas.addEventListener("click", (event) => {
      const index = this.ridgeAt(this.surface.place(event));
      if (index === null) return;
      if (this.layer < 0) this.choose(index);
      else this.step.set(this.spread.steps[this.ridges()[index].at]);
    });
  }

  /** Show one layer step by step; -1: every layer. */
  choose(layer) {
    this.layer = layer;
    this.select.value = String(layer);
    this.surface.hide();
    this.surface.paint();
  }

  ridges() {
    const { layers, steps } = this.spread;
    if (this.layer < 0) return layers.map((name, layer) => ({ name, layer, at: this.at }));
    return Array.from(steps, (step, at) => ({ name: `step ${step}`, layer: this.layer, at }));
  }

  /** The shares of one ridge, by octave. */
  shares({ layer, at }) {
    const { steps, bins, roots } = this.spread;
    const start = (layer * steps.length + at) * bins;
    return Array.from(roots.subarray(start, start + bins), (root) => (root / 255) ** 2);
  }

  /** Why a ridge is flat; "" where it is not. */
  lack(ridge) {
    if (this.shares(ridge).some((share) => share > 0)) return "";
    const { steps, unmeasured } = this.spread;
    return unmeasured[ridge.layer * steps.length + ridge.at] ? "not measured" : "no finite entry other than zero";
  }

  x(exponent) {
    const [low, high] = this.range;
    return this.plot.x + ((exponent - low) / (high - low)) * this.plot.width;
  }

  baseline(index, count) {
    return this.plot.y + this.lift + ((index + 1) / count) * (this.plot.height - this.lift);
  }

  ridgeAt({ x, y }) {
    const count = this.ridges().length;
    if (x < this.plot.x || x > this.plot.x + this.plot.width) return null;
    const index = Math.ceil(((y - this.plot.y - this.lift) / (this.plot.height - this.lift)) * count) - 1;
    return index >= 0 && index < count ? index : null;
  }

  point(event) {
    const place = this.surface.place(event);
    const index = this.ridgeAt(place);
    if (index === null) {
      this.surface.hide();
      return;
    }
    const { lowest, bins } = this.spread;
    const ridge = this.ridges()[index];
    const lack = this.lack(ridge);
    if (lack) {
      this.surface.show(place, [ridge.name, lack]);
      return;
    }
    const [low, high] = this.range;
    const exponent = Math.floor(low + Math.min(0.9999, (place.x - this.plot.x) / this.plot.width) * (high - low));
    const bin = exponent - lowest;
    const share = bin >= 0 && bin < bins ? this.shares(ridge)[bin] : 0;
    this.surface.show(place, [
      ridge.name,
      `${number(2 ** exponent)} to ${number(2 ** (exponent + 1))}: ${percent(share)} of the entries`,
    ]);
  }

  draw(context, width, height, palette) {
    const ridges = this.ridges();
    const longest = Math.max(...ridges.map((ridge) => Math.min(ridge.name.length, 30)));
    const gutter = Math.min(0.32 * width, 7 * longest + 16);
    this.plot = { x: gutter, y: TOP, width: width - gutter - RIGHT, height: height - TOP - BOTTOM };
    const spacing = this.plot.height / (ridges.length + 1);
    this.lift = Math.min(46, TALL * spacing);
    context.clearRect(0, 0, width, height);
    const head = this.layer < 0 ? `every layer at step ${this.spread.steps[this.at]}` : `${elided(this.spread.layers[this.layer], 48)}, step by step`;
    write(context, head, this.plot.x, 12, { color: palette.ink, bold: true });
    this.axis(context, palette);
    const all = ridges.map((ridge) => this.shares(ridge));
    const highest = Math.max(1e-6, ...all.map((shares) => Math.max(...shares)));
    const labels = new Set(labelledRows(0, ridges.length, [], Math.floor(this.plot.height / 14)));
    const names = elidedAlike(ridges.map((ridge) => ridge.name), Math.floor((gutter - 10) / 6.6));
    ridges.forEach((ridge, index) => {
      const y = this.baseline(index, ridges.length);
      this.ridge(context, all[index], y, highest, color(0.15 + (0.7 * index) / Math.max(1, ridges.length - 1)), palette);
      const chosen = this.layer >= 0 && ridge.at === this.at;
      if (labels.has(index)) {
        write(context, names[index], gutter - 8, y - 4, { color: chosen ? palette.ink : palette.muted, align: "right", bold: chosen });
      }
      const lack = this.lack(ridge);
      if (lack) {
        write(context, lack, this.plot.x + 8, y - 5, { color: palette.muted, size: 11 });
      }
    });
  }

  axis(context, palette) {
    const [low, high] = this.range.map((exponent) => exponent * LOG2);
    const foot = this.plot.y + this.plot.height;
    for (const exponent of linearTicks(low, high, this.plot.width / 52, true)) {
      const x = this.x(exponent / LOG2);
      context.fillStyle = palette.rule;
      context.fillRect(x, this.plot.y, 1, this.plot.height);
      write(context, power(exponent), x, foot + 12, { color: palette.muted, align: "center" });
    }
    write(context, this.spread.symbol, this.plot.x + this.plot.width, foot + 29, { color: palette.muted, align: "right" });
  }

  ridge(context, shares, y, highest, fill, palette) {
    const height = (share) => y - (share / highest) * this.lift;
    context.beginPath();
    context.moveTo(this.x(this.spread.lowest), y);
    shares.forEach((share, bin) => context.lineTo(this.x(this.spread.lowest + bin + 0.5), height(share)));
    context.lineTo(this.x(this.spread.lowest + shares.length), y);
    context.fillStyle = fill;
    context.globalAlpha = 0.8;
    context.fill();
    context.globalAlpha = 1;
    context.strokeStyle = palette.card;
    context.lineWidth = 1.2;
    context.stroke();
  }

  remove() {
    this.leave();
    this.surface.remove();
    this.bar.remove();
  }
}

/** The last step at which there is anything to see. */
function lastKnown({ layers, steps, bins, roots }) {
  const some = (at) => layers.some((_, layer) => {
    const start = (layer * steps.length + at) * bins;
    return roots.subarray(start, start + bins).some((root) => root > 0);
  });
  for (let at = steps.length - 1; at > 0; at--) if (some(at)) return at;
  return 0;
}
