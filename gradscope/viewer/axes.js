// Where the ticks of an axis stand.

/** Round numbers between two, at most about `count`; whole ones if asked for. */
export function linearTicks(low, high, count, whole = false) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, count);
  const scale = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * scale).find((size) => size >= rough);
  if (whole) step = Math.max(1, step);
  const ticks = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let index = first; index * step <= high + 1e-9 * step; index++) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

/** Whole powers of ten between two exponents, at most about `count`. */
export function powerTicks(low, high, count) {
  const stride = Math.max(1, Math.ceil((high - low) / Math.max(1, count)));
  const ticks = [];
  for (let exponent = Math.ceil(low - 1e-9); exponent <= high + 1e-9; exponent++) {
    if (exponent % stride === 0) ticks.push(exponent);
  }
  return ticks;
}

/** Which of some rows get a label where `room` labels fit: the wanted ones first. */
export function labelledRows(first, last, wanted, room) {
  const gap = Math.max(1, Math.ceil((last - first) / Math.max(1, room)));
  const taken = [];
  const offer = (row) => {
    if (row >= first && row < last && taken.every((other) => Math.abs(other - row) >= gap)) taken.push(row);
  };
  wanted.forEach(offer);
  for (let row = first; row < last; row += gap) offer(row);
  return taken.sort((a, b) => a - b);
}
