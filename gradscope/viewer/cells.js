// Which cells of a grid lie under which pixels.

/**
 * Where each column's cell ends: at the next recorded step, unless that is much farther off than
 * usual. What lies beyond was not recorded, and looks so.
 */
export function columnEnds(steps, ends) {
  const gaps = [];
  for (let at = 1; at < steps.length; at++) gaps.push(steps[at] - ends[at - 1]);
  gaps.sort((a, b) => a - b);
  const usual = gaps.length ? gaps[gaps.length >> 1] : 1;
  return Float64Array.from(ends, (end, at) =>
    at + 1 < steps.length && steps[at + 1] - end <= 2 * usual ? steps[at + 1] : end + usual,
  );
}

/** One band of rows per pixel row; where rows are taller than a pixel, one band per part of a row. */
export function rowBands(view, pixels) {
  const bands = new Int32Array(2 * pixels);
  const height = (view.bottom - view.top) / pixels;
  for (let y = 0; y < pixels; y++) {
    const first = Math.floor(view.top + y * height + 1e-9);
    bands[2 * y] = first;
    // A pixel of several rows takes those that begin in it; a part of a row has that row.
    bands[2 * y + 1] = Math.max(first + 1, Math.floor(view.top + (y + 1) * height + 1e-9));
  }
  return bands;
}

/** The first and one past the last column under each pixel; equal where there is none. */
export function columnSpans(starts, ends, view, pixels) {
  const spans = new Int32Array(2 * pixels);
  const width = (view.right - view.left) / pixels;
  let [first, past] = [0, 0];
  for (let x = 0; x < pixels; x++) {
    const left = view.left + x * width;
    while (first < ends.length && ends[first] <= left) first++;
    while (past < starts.length && starts[past] < left + width) past++;
    spans[2 * x] = first;
    spans[2 * x + 1] = Math.max(first, past);
  }
  return spans;
}
