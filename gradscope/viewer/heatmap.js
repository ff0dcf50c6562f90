// Layers × steps in colours: each cell a layer at a step.

import { labelledRows, linearTicks } from "./axes.js";
import { columnEnds, columnSpans, rowBands } from "./cells.js";
import { COLORS, colorAt } from "./colormap.js";
import { elidedAlike, number, percent } from "./format.js";
import { colorLegend } from "./legend.js";
import { grown, pooled, weigh } from "./pool.js";
import { rangeOf, widened } from "./range.js";
import { nearest } from "./step.js";
import { Surface, cross, element, hatch, ring, write } from "./surface.js";
import { zoomable } from "./zoom.js";

const TOP = 22;
const BOTTOM = 40;
const RIGHT = 10;
const ROW = 17;
const LABEL = 14;
const [LOWEST, HIGHEST] = [120, 620];
// Marks closer than this would run into one another.
const MARK_GAP = 20;
// In decades: what stands out so far from its surroundings is drawn five pixels wide.
const STANDS_OUT = 1;

/**
 * Draw a heatmap in `host`.
 *
 * `grid`: `rows` (names), `steps` and `ends` (the first and the last step of each column),
 * `values` (Float32Array, rows × columns; NaN: not measured, Infinity: NaN or infinity there),
 * `log` (else shares from 0 to 1), `symbol`, `title`, `marks` (`{row, first, last, text}`) and
 * `range` (`[low, high]`, to share one scale between pictures; see `rangeOf`).
 */
export function heatmap(host, grid, step) {
  return new Heatmap(host, grid, step);
}

class Heatmap {
  constructor(host, grid, step) {
    this.grid = grid;
    this.step = step;
    this.columns = grid.steps.length;
    const { shown, weight } = weigh(grid.values, grid.rows.length, this.columns, grid.log);
    this.shown = shown;
    this.weight = weight;
    const range = grid.range ?? rangeOf(grid);
    this.range = widened(range ?? [0, 0], grid.log);
    this.starts = Float64Array.from(grid.steps);
    this.ends = columnEnds(grid.steps, grid.ends);
    this.whole = { left: this.starts[0], right: this.ends[this.columns - 1], top: 0, bottom: grid.rows.length };
    this.marked = [...new Set(grid.marks.map((mark) => mark.row))];
    this.cursor = null;
    this.legend = colorLegend(grid, range && this.range, this.marked.length > 0);
    host.append(this.legend);
    this.surface = new Surface(host, {
      label: `${grid.title}: ${grid.rows.length} rows by ${this.columns} columns. Arrow keys move a cursor that reads the numbers.`,
      height: Math.max(LOWEST, Math.min(HIGHEST, ROW * grid.rows.length + TOP + BOTTOM)),
      draw: (...given) => this.draw(...given),
    });
    this.readout = element("p", "gs-readout", "Point at a cell, or use the arrow keys. Drag to zoom, double-click to see all.");
    this.readout.setAttribute("aria-live", "polite");
    host.append(this.readout);
    this.zoom = zoomable(this.surface, {
      whole: this.whole,
      // Fewer than two columns or rows are none to look into.
      least: { width: Math.min(2, this.whole.right - this.whole.left), height: 1 },
      plot: () => this.plot,
      changed: () => this.surface.request(),
      // A drag along one row of a flat picture means the steps alone.
      both: grid.rows.length > 8,
    });
    this.listen();
    this.leave = step?.subscribe(() => this.surface.request());
  }

  listen() {
    const { canvas } = this.surface;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.move(null));
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(this.surface.place(event));
      if (cell >= 0) this.step?.set(this.grid.steps[cell % this.columns]);
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  point(event) {
    if (event.buttons) {
      this.surface.hide();
      return;
    }
    const place = this.surface.place(event);
    const cell = this.cellAt(place);
    this.move(cell < 0 ? null : cell);
    if (cell < 0) this.surface.hide();
    else this.surface.show(place, this.describe(cell));
  }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const rows = this.grid.rows.length;
    if (event.key === "Escape") {
      this.move(null);
      this.surface.hide();
    } else if (event.key in moves && !event.altKey && !event.ctrlKey && !event.metaKey) {
      const [down, right] = moves[event.key];
      let [row, column] = [0, 0];
      if (this.cursor === null) {
        const wanted = this.step?.value ?? null;
        if (wanted !== null) column = nearest(this.grid.steps, wanted);
      } else {
        row = Math.max(0, Math.min(rows - 1, Math.floor(this.cursor / this.columns) + down));
        column = Math.max(0, Math.min(this.columns - 1, (this.cursor % this.columns) + right));
      }
      this.move(row * this.columns + column);
      this.surface.hide();
    } else if (event.key === "Enter" && this.cursor !== null) {
      this.step?.set(this.grid.steps[this.cursor % this.columns]);
    } else {
      return;
    }
    event.preventDefault();
  }

  move(cell) {
    if (cell === this.cursor) return;
    this.cursor = cell;
    if (cell !== null) this.readout.textContent = this.describe(cell).join(" · ");
    this.surface.request();
  }

  /** A cell in words: the layer, the step, the number. */
  describe(cell) {
    const row = Math.floor(cell / this.columns);
    const column = cell % this.columns;
    const [first, last] = [this.grid.steps[column], this.grid.ends[column]];
    const several = last > first ? `steps ${first} to ${last}, farthest from the row's median` : `step ${first}`;
    const lines = [this.grid.rows[row], `${several}: ${this.said(this.grid.values[cell])}`];
    for (const mark of this.grid.marks) {
      if (mark.row === row && mark.first <= last && mark.last >= first) lines.push(mark.text);
    }
    return lines;
  }

  said(value) {
    if (Number.isNaN(value)) return "not measured";
    if (value === Infinity) return "NaN or infinite entries";
    return `${this.grid.symbol} = ${this.grid.log ? number(value) : percent(value)}`;
  }

  /** The cell that the picture shows at a place; -1: none. */
  cellAt({ x, y }) {
    const plot = this.plot;
    const inside = x >= plot.x && x < plot.x + plot.width && y >= plot.y && y < plot.y + plot.height;
    if (!inside || !this.cells) return -1;
    const [across, down] = [this.spans.length / 2, this.bands.length / 2];
    const column = Math.floor(((x - plot.x) / plot.width) * across);
    const row = Math.floor(((y - plot.y) / plot.height) * down);
    return this.cells[row * across + column];
  }

  /** Make the rows whose names pass visible alone; null: all. */
  focus(row) {
    const half = 12;
    const rows = this.grid.rows.length;
    const top = Math.max(0, Math.min(row - half, rows - 2 * half));
    this.zoom.set({ ...this.zoom.view, top, bottom: Math.min(rows, top + 2 * half) });
    const column = this.cursor === null ? this.columns - 1 : this.cursor % this.columns;
    this.move(row * this.columns + column);
  }

  draw(context, width, height, palette, ratio) {
    const view = this.zoom?.view ?? this.whole;
    const gutter = this.gutter(context, width);
    this.plot = { x: gutter, y: TOP, width: width - gutter - RIGHT, height: height - TOP - BOTTOM };
    const { plot } = this;
    context.clearRect(0, 0, width, height);
    hatch(context, plot.x, plot.y, plot.width, plot.height, palette.hatch);
    const [across, down] = [Math.round(plot.width * ratio), Math.round(plot.height * ratio)];
    const key = JSON.stringify([view, across, down, palette]);
    // The cursor moves far more often than the view.
    if (key !== this.painted) {
      this.painted = key;
      this.spans = columnSpans(this.starts, this.ends, view, across);
      this.bands = rowBands(view, down);
      const found = pooled(this.weight, this.columns, this.spans, this.bands);
      const thin = plot.height / (view.bottom - view.top) < 3;
      const reach = { reachX: Math.ceil(2 * ratio), reachY: thin ? Math.ceil(ratio) : 0, height: STANDS_OUT };
      this.cells = grown(found, this.weight, across, reach);
      this.picture = this.paint(palette);
      this.patches = this.patchesToMark();
    }
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture, plot.x, plot.y, plot.width, plot.height);
    for (const { broken, x, y } of this.patches) {
      context.fillStyle = broken ? palette.nonfinite : palette.zero;
      context.fillRect(x - 5, y - 5, 10, 10);
      if (broken) cross(context, x, y, 3, "#000000");
      else ring(context, x, y, 2.6, "#ffffff");
    }
    this.outline(context, view, palette);
    this.nameRows(context, view, palette);
    this.nameSteps(context, view, palette);
    this.pointOut(context, view, palette);
  }

  gutter(context, width) {
    context.font = "12px system-ui";
    const longest = Math.max(...this.grid.rows.map((name) => Math.min(name.length, 34)));
    return Math.min(0.34 * width, 7 * longest + 24);
  }

  paint(palette) {
    const [across, down] = [this.spans.length / 2, this.bands.length / 2];
    const image = new ImageData(across, down);
    const [low, high] = this.range;
    const zero = rgb(palette.zero);
    const broken = rgb(palette.nonfinite);
    const { data } = image;
    for (let pixel = 0; pixel < this.cells.length; pixel++) {
      const cell = this.cells[pixel];
      if (cell < 0) continue;
      const shown = this.shown[cell];
      let source = COLORS;
      let from = 0;
      if (this.grid.values[cell] === Infinity) source = broken;
      else if (Number.isNaN(shown)) source = zero;
      else from = colorAt((shown - low) / (high - low));
      data[4 * pixel] = source[from];
      data[4 * pixel + 1] = source[from + 1];
      data[4 * pixel + 2] = source[from + 2];
      data[4 * pixel + 3] = 255;
    }
    const canvas = new OffscreenCanvas(across, down);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  /** Where marks go on what has no place on the scale of colours: one per patch of it. */
  patchesToMark() {
    const [across, down] = [this.spans.length / 2, this.bands.length / 2];
    const { plot } = this;
    const gapX = Math.max(1, Math.round((MARK_GAP * across) / plot.width));
    const gapY = Math.max(1, Math.round((MARK_GAP * down) / plot.height));
    const taken = new Map();
    for (let pixel = 0; pixel < this.cells.length; pixel++) {
      const cell = this.cells[pixel];
      if (cell < 0 || !Number.isNaN(this.shown[cell])) continue;
      const [x, y] = [pixel % across, Math.floor(pixel / across)];
      const key = Math.floor(y / gapY) * across + Math.floor(x / gapX);
      const broken = this.grid.values[cell] === Infinity;
      const patch = taken.get(key);
      if (patch === undefined || (broken && !patch.broken)) taken.set(key, { broken, left: x, right: x, top: y, bottom: y });
      else if (patch.broken === broken) {
        patch.left = Math.min(patch.left, x);
        patch.right = Math.max(patch.right, x);
        patch.bottom = y;
      }
    }
    return Array.from(taken.values(), ({ broken, left, right, top, bottom }) => ({
      broken,
      x: plot.x + ((left + right + 1) / 2 / across) * plot.width,
      y: plot.y + ((top + bottom + 1) / 2 / down) * plot.height,
    }));
  }

  /** The rows and steps of findings: a line along the row's edge, from its first step to its last. */
  outline(context, view, palette) {
    const { plot } = this;
    context.save();
    this.clip(context);
    for (const mark of this.grid.marks) {
      const top = this.down(mark.row, view);
      const bottom = this.down(mark.row + 1, view);
      const left = this.across(mark.first, view);
      const right = Math.max(this.across(this.endOf(mark.last), view), left + 3);
      // A thin row's outline stands around it.
      const room = Math.max(0, (7 - (bottom - top)) / 2);
      for (const [line, stroke] of [[3, palette.card], [1.4, palette.ink]]) {
        context.strokeStyle = stroke;
        context.lineWidth = line;
        context.strokeRect(left + 1, top + 1 - room, right - left - 2, bottom - top - 2 + 2 * room);
      }
    }
    context.restore();
  }

  /** Leave out what a closer look has no place for. */
  clip(context) {
    const { plot } = this;
    context.beginPath();
    context.rect(plot.x - 2, plot.y - 2, plot.width + 4, plot.height + 4);
    context.clip();
  }

  endOf(step) {
    return this.ends[nearest(this.grid.steps, step)];
  }

  across(step, view) {
    return this.plot.x + ((step - view.left) / (view.right - view.left)) * this.plot.width;
  }

  down(row, view) {
    return this.plot.y + ((row - view.top) / (view.bottom - view.top)) * this.plot.height;
  }

  nameRows(context, view, palette) {
    const [first, last] = [Math.floor(view.top), Math.ceil(view.bottom)];
    const room = Math.floor(this.plot.height / LABEL);
    const characters = Math.max(6, Math.floor((this.plot.x - 22) / 6.6));
    const rows = labelledRows(first, last, this.marked, room);
    const names = elidedAlike(rows.map((row) => this.grid.rows[row]), characters);
    for (const [index, row] of rows.entries()) {
      const y = this.down(row + 0.5, view);
      if (y < this.plot.y || y > this.plot.y + this.plot.height) continue;
      const found = this.marked.includes(row);
      const text = `${found ? "▸ " : ""}${names[index]}`;
      write(context, text, this.plot.x - 7, y, { color: found ? palette.ink : palette.muted, align: "right", bold: found });
    }
  }

  nameSteps(context, view, palette) {
    const y = this.plot.y + this.plot.height;
    for (const tick of linearTicks(view.left, view.right, this.plot.width / 72, true)) {
      const x = this.across(tick, view);
      if (x > this.plot.x + this.plot.width - 4) continue;
      context.fillStyle = palette.muted;
      context.fillRect(x, y + 2, 1, 4);
      write(context, String(tick), x, y + 15, { color: palette.muted, align: "center" });
    }
    write(context, "step", this.plot.x + this.plot.width, y + 31, { color: palette.muted, align: "right" });
  }

  pointOut(context, view, palette) {
    const step = this.step?.value ?? null;
    if (step !== null && step >= view.left && step <= view.right) {
      const x = this.across(step, view);
      context.fillStyle = palette.ink;
      context.beginPath();
      context.moveTo(x - 5, TOP - 12);
      context.lineTo(x + 5, TOP - 12);
      context.lineTo(x, TOP - 3);
      context.fill();
      write(context, `step ${step}`, Math.min(x + 9, this.plot.x + this.plot.width - 62), TOP - 9, { color: palette.muted, size: 11 });
    }
    if (this.cursor === null) return;
    const row = Math.floor(this.cursor / this.columns);
    const column = this.cursor % this.columns;
    const left = this.across(this.starts[column], view);
    const top = this.down(row, view);
    const size = [Math.max(3, this.across(this.ends[column], view) - left), Math.max(3, this.down(row + 1, view) - top)];
    context.save();
    this.clip(context);
    for (const [line, stroke] of [[4, palette.card], [2, palette.ink]]) {
      context.strokeStyle = stroke;
      context.lineWidth = line;
      context.strokeRect(left - 1, top - 1, size[0] + 2, size[1] + 2);
    }
    context.restore();
  }

  remove() {
    this.leave?.();
    this.zoom.remove();
    this.surface.remove();
    this.legend.remove();
    this.readout.remove();
  }
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}
