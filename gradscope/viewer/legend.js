// What the colours of a heatmap mean.

import { linearTicks, powerTicks } from "./axes.js";
import { color } from "./colormap.js";
import { percent, power } from "./format.js";
import { element } from "./surface.js";

const SLACK = 1e-3;

/** The scale of colours from `low` to `high` (null: no number to show), and the marks in the grid. */
export function colorLegend(grid, range, marked) {
  const legend = element("div", "gs-legend");
  legend.append(element("span", "gs-symbol", grid.symbol));
  const [low, high] = range ?? [-Infinity, Infinity];
  if (range) legend.append(scale(grid, low, high));
  const kinds = { zero: false, broken: false, gap: false };
  let beyond = false;
  const [least, most] = [10 ** (low - SLACK), 10 ** (high + SLACK)];
  for (const value of grid.values) {
    if (value === 0 && grid.log) kinds.zero = true;
    else if (value === Infinity) kinds.broken = true;
    else if (Number.isNaN(value)) kinds.gap = true;
    else if (grid.log && (value < least || value > most)) beyond = true;
  }
  if (beyond) legend.append(element("span", "", "beyond it the colour of its end"));
  if (kinds.zero) legend.append(element("span", "gs-key gs-key-zero", "exactly zero"));
  if (kinds.broken) legend.append(element("span", "gs-key gs-key-broken", "NaN or infinite"));
  if (kinds.gap) legend.append(element("span", "gs-key gs-key-gap", "not measured"));
  if (marked) legend.append(element("span", "gs-key gs-key-mark", "▸ has a finding, outlined where it was seen"));
  return legend;
}

function scale(grid, low, high) {
  const made = element("div", "gs-scale");
  const bar = element("canvas", "gs-bar");
  bar.width = 256;
  bar.height = 1;
  const context = bar.getContext("2d");
  for (let x = 0; x < 256; x++) {
    context.fillStyle = color(x / 255);
    context.fillRect(x, 0, 1, 1);
  }
  const ticks = element("div", "gs-ticks");
  for (const value of grid.log ? powerTicks(low, high, 6) : linearTicks(0, 1, 4)) {
    const tick = element("span", "", grid.log ? power(value) : percent(value));
    tick.style.left = `${(100 * (value - low)) / (high - low)}%`;
    ticks.append(tick);
  }
  made.append(bar, ticks);
  return made;
}
