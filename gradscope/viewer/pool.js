// Many cells in one pixel: the one that stands out is shown, so that no one-step event gets lost.

const NONFINITE = 1e9;
const ZERO = 1e8;
const ABSENT = -1;
// A median of so many is as good as one of all.
const ENOUGH = 256;

/**
 * What each cell of a grid weighs against others in its pixel.
 *
 * `values` holds rows × columns; NaN: not measured, Infinity: there was NaN or infinity. Returned
 * are `shown` (log10 of the value, or the value itself where `log` is false) and `weight`: the
 * distance from the row's median, with zeros and what is not finite above all others.
 */
export function weigh(values, rows, columns, log) {
  const shown = new Float32Array(values.length);
  const weight = new Float32Array(values.length);
  for (let row = 0; row < rows; row++) {
    const start = row * columns;
    for (let at = start; at < start + columns; at++) {
      const value = values[at];
      shown[at] = !Number.isFinite(value) || (log && value <= 0) ? NaN : log ? Math.log10(value) : value;
    }
    const middle = median(shown.subarray(start, start + columns));
    for (let at = start; at < start + columns; at++) {
      const value = values[at];
      if (Number.isNaN(value)) weight[at] = ABSENT;
      else if (value === Infinity) weight[at] = NONFINITE;
      else if (log && value === 0) weight[at] = ZERO;
      else weight[at] = Math.abs(shown[at] - middle);
    }
  }
  return { shown, weight };
}

/** The median of what is not NaN, of many numbers that of a sample; NaN where nothing is. */
function median(numbers) {
  const stride = Math.ceil(numbers.length / ENOUGH);
  const known = numbers.filter((value, at) => at % stride === 0 && !Number.isNaN(value)).sort();
  return known.length ? known[(known.length - 1) >> 1] : NaN;
}

/** The quantiles of what is not NaN. */
export function quantiles(numbers, shares) {
  const known = numbers.filter((value) => !Number.isNaN(value)).sort();
  return shares.map((share) => {
    if (!known.length) return NaN;
    const place = share * (known.length - 1);
    const below = Math.floor(place);
    const above = Math.min(below + 1, known.length - 1);
    return known[below] + (place - below) * (known[above] - known[below]);
  });
}

/**
 * The cell that each pixel shows: an Int32Array of height × width with -1 for none.
 *
 * `spans` are the first and one past the last column of each pixel column, `bands` likewise the
 * rows of each pixel row.
 */
export function pooled(weight, columns, spans, bands) {
  const width = spans.length / 2;
  const height = bands.length / 2;
  const cells = new Int32Array(width * height).fill(-1);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let best = ABSENT;
      let chosen = -1;
      for (let row = bands[2 * y]; row < bands[2 * y + 1]; row++) {
        for (let at = row * columns + spans[2 * x]; at < row * columns + spans[2 * x + 1]; at++) {
          if (weight[at] > best) {
            best = weight[at];
            chosen = at;
          }
        }
      }
      cells[y * width + x] = chosen;
    }
  }
  return cells;
}

/**
 * Let cells that stand out from their neighbours by more than `height` cover them, `reach` pixels
 * far: what is one pixel wide can be overlooked.
 */
export function grown(cells, weight, width, { reachX, reachY, height }) {
  const made = cells.slice();
  const heavy = (cell) => (cell < 0 ? ABSENT : weight[cell]);
  for (let at = 0; at < cells.length; at++) {
    const own = heavy(cells[at]);
    if (own < height) continue;
    const [x, y] = [at % width, Math.floor(at / width)];
    for (let down = -reachY; down <= reachY; down++) {
      for (let right = -reachX; right <= reachX; right++) {
        const other = at + down * width + right;
        const inside = x + right >= 0 && x + right < width && other >= 0 && other < cells.length;
        if (inside && own > heavy(cells[other]) + height && own > heavy(made[other])) made[other] = cells[at];
      }
    }
  }
  return made;
}
