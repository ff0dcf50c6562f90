// A canvas that keeps its size, its sharpness and its colours right, with a tooltip.

const COLORS = ["ink", "muted", "rule", "card", "line", "first", "last", "band", "zero", "nonfinite", "hatch"];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif';

/** An element with a class and text; names are hostile, so text is all it can hold. */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** A canvas in `host`; `draw(context, width, height, palette)` is called when it must be painted. */
export class Surface {
  constructor(host, { label, height, draw }) {
    this.host = host;
    this.height = height;
    this.draw = draw;
    this.frame = element("div", "gs-surface");
    this.canvas = element("canvas", "gs-canvas");
    this.canvas.tabIndex = 0;
    // Not "img": the arrow keys are for the picture, not for the screen reader.
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "picture");
    this.canvas.setAttribute("aria-label", label);
    this.tooltip = element("div", "gs-tooltip");
    this.tooltip.hidden = true;
    this.tooltip.setAttribute("aria-live", "polite");
    this.frame.append(this.canvas, this.tooltip);
    host.append(this.frame);
    this.pending = 0;
    this.width = 0;
    // It is called at once, too, but when all pictures of the page have their places: asking for the
    // width of each as it is made would lay out the page again and again.
    this.resizing = new ResizeObserver(([{ contentRect }]) => {
      if (Math.abs(contentRect.width - this.width) >= 1) this.paint();
    });
    this.resizing.observe(this.frame);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    this.listening = new AbortController();
    const { signal } = this.listening;
    dark.addEventListener("change", () => this.request(), { signal });
    // For a host that has a dark mode of its own.
    window.addEventListener("gradscope:theme", () => this.request(), { signal });
    this.canvas.addEventListener("pointerleave", () => this.hide(), { signal });
  }

  /** Paint before the next frame. */
  request() {
    if (!this.pending) {
      this.pending = requestAnimationFrame(() => {
        this.pending = 0;
        this.paint();
      });
    }
  }

  paint() {
    this.width = this.frame.clientWidth || 600;
    const height = typeof this.height === "function" ? this.height(this.width) : this.height;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.lineJoin = "round";
    context.font = `12px ${FONT}`;
    this.draw(context, this.width, height, palette(this.frame), ratio);
  }

  /** Where a pointer is, in CSS pixels of the canvas. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** Show lines of text beside a place; the first stands out. */
  show({ x, y }, lines) {
    this.tooltip.replaceChildren(...lines.map((line, index) => element("div", index ? "" : "gs-head", line)));
    this.tooltip.hidden = false;
    // Where it stood before must not limit its width.
    this.tooltip.style.left = "0";
    const { offsetWidth, offsetHeight } = this.tooltip;
    const left = x + 14 + offsetWidth > this.width ? x - 14 - offsetWidth : x + 14;
    const top = y + 14 + offsetHeight > this.canvas.clientHeight ? y - 10 - offsetHeight : y + 14;
    this.tooltip.style.left = `${Math.max(0, left)}px`;
    this.tooltip.style.top = `${Math.max(0, top)}px`;
  }

  hide() {
    this.tooltip.hidden = true;
  }

  /** Take it off the page. */
  remove() {
    this.resizing.disconnect();
    this.listening.abort();
    this.frame.remove();
  }
}

function palette(frame) {
  const style = getComputedStyle(frame);
  return Object.fromEntries(COLORS.map((name) => [name, style.getPropertyValue(`--gs-${name}`).trim()]));
}

/** Text at a place; `bold` and `align` as canvases name them. */
export function write(context, text, x, y, { color, align = "left", baseline = "middle", size = 12, bold = false }) {
  context.font = `${bold ? "600 " : ""}${size}px ${FONT}`;
  context.fillStyle = color;
  context.textAlign = align;
  context.textBaseline = baseline;
  context.fillText(text, x, y);
}

/** A cross: what is not a finite number. */
export function cross(context, x, y, radius, color) {
  context.strokeStyle = color;
  context.lineWidth = 1.6;
  context.beginPath();
  context.moveTo(x - radius, y - radius);
  context.lineTo(x + radius, y + radius);
  context.moveTo(x + radius, y - radius);
  context.lineTo(x - radius, y + radius);
  context.stroke();
}

/** A ring: exactly zero. */
export function ring(context, x, y, radius, color) {
  context.strokeStyle = color;
  context.lineWidth = 1.3;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.stroke();
}

/** Diagonal lines over a rectangle: nothing was measured here. */
export function hatch(context, x, y, width, height, color) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = color;
  context.lineWidth = 1;
  context.beginPath();
  for (let offset = -height; offset < width; offset += 7) {
    context.moveTo(x + offset, y + height);
    context.lineTo(x + offset + height, y);
  }
  context.stroke();
  context.restore();
}
