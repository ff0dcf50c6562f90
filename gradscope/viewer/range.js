// What the colours of a heatmap and the heights of a profile span.

import { quantiles } from "./pool.js";

// A colour scale that reaches farther than these shares of the numbers, by a decade at least, ends
// at them: one spike must not take the contrast from all else.
const BULK = [0.002, 0.998];
const SAMPLE = 20_000;

/** The lowest and highest number shown (exponents of ten where `log`); null where there is none. */
export function rangeOf(grid) {
  if (!grid.log) return [0, 1];
  let [low, high] = [Infinity, -Infinity];
  for (const value of grid.values) {
    if (value > 0 && value < Infinity) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return null;
  const stride = Math.ceil(grid.values.length / SAMPLE);
  const sample = grid.values.filter((value, at) => at % stride === 0 && value > 0 && value < Infinity);
  const [first, last] = quantiles(sample, BULK).map(Math.log10);
  const [least, most] = [Math.log10(low), Math.log10(high)];
  return [first - least > 1 ? first : least, most - last > 1 ? last : most];
}

/** Less than a decade is no difference to paint in full contrast. */
export function widened([low, high], log) {
  if (!log || high - low >= 1) return [low, high];
  return [(low + high - 1) / 2, (low + high + 1) / 2];
}
