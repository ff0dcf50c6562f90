// Looking closer: drag to zoom, Shift-drag to move, wheel with Ctrl, double-click to see all.

import { element } from "./surface.js";

const CLICK = 5;
const FACTOR = 1.6;

/**
 * Let a surface be zoomed. `whole` and `view` are `{left, right, top, bottom}` in the data's units,
 * `plot()` is the rectangle they are drawn in; `changed` is called with each new view.
 */
export function zoomable(surface, { whole, least, plot, changed, both }) {
  let view = { ...whole };
  let drag = null;
  let swallow = false;
  const { canvas, frame } = surface;
  const stop = new AbortController();
  const on = (target, name, listener, more = {}) => target.addEventListener(name, listener, { signal: stop.signal, ...more });

  const buttons = element("div", "gs-zoom");
  const button = (text, label, act) => {
    const made = element("button", "gs-button", text);
    made.type = "button";
    made.setAttribute("aria-label", label);
    made.title = label;
    on(made, "click", act);
    buttons.append(made);
    return made;
  };
  button("+", "zoom in", () => scale(1 / FACTOR));
  button("−", "zoom out", () => scale(FACTOR));
  const reset = button("see all", "see all", () => set(whole));
  frame.append(buttons);
  const brush = element("div", "gs-brush");
  brush.hidden = true;
  frame.append(brush);

  function set(wanted) {
    view = clamped(wanted, whole, least);
    const zoomed = ["left", "right", "top", "bottom"].some((side) => view[side] !== whole[side]);
    reset.hidden = !zoomed;
    changed(view);
  }

  function scale(factor, at = null) {
    const area = plot();
    const x = at ? (at.x - area.x) / area.width : 0.5;
    const y = at ? (at.y - area.y) / area.height : 0.5;
    const width = (view.right - view.left) * factor;
    const left = view.left + x * (view.right - view.left) - x * width;
    const next = { ...view, left, right: left + width };
    if (both) {
      const height = (view.bottom - view.top) * factor;
      next.top = view.top + y * (view.bottom - view.top) - y * height;
      next.bottom = next.top + height;
    }
    set(next);
  }

  function inside({ x, y }) {
    const area = plot();
    return { x: Math.max(area.x, Math.min(area.x + area.width, x)), y: Math.max(area.y, Math.min(area.y + area.height, y)) };
  }

  on(canvas, "pointerdown", (event) => {
    if (event.button !== 0) return;
    swallow = false;
    drag = { from: inside(surface.place(event)), view: { ...view }, moves: event.shiftKey };
    canvas.setPointerCapture(event.pointerId);
  });
  on(canvas, "pointermove", (event) => {
    if (!drag) return;
    const to = inside(surface.place(event));
    const area = plot();
    if (drag.moves) {
      const right = ((drag.from.x - to.x) / area.width) * (view.right - view.left);
      const down = both ? ((drag.from.y - to.y) / area.height) * (view.bottom - view.top) : 0;
      const { left, right: end, top, bottom } = drag.view;
      set({ left: left + right, right: end + right, top: top + down, bottom: bottom + down });
      return;
    }
    drag.to = to;
    const tall = both && Math.abs(to.y - drag.from.y) > 3 * CLICK;
    brush.hidden = Math.abs(to.x - drag.from.x) < CLICK;
    brush.style.left = `${Math.min(drag.from.x, to.x)}px`;
    brush.style.width = `${Math.abs(to.x - drag.from.x)}px`;
    brush.style.top = `${tall ? Math.min(drag.from.y, to.y) : area.y}px`;
    brush.style.height = `${tall ? Math.abs(to.y - drag.from.y) : area.height}px`;
  });
  on(canvas, "pointerup", () => {
    const ended = drag;
    drag = null;
    brush.hidden = true;
    if (!ended?.to || ended.moves || Math.abs(ended.to.x - ended.from.x) < CLICK) return;
    swallow = true;
    const area = plot();
    const x = (at) => view.left + ((at - area.x) / area.width) * (view.right - view.left);
    const y = (at) => view.top + ((at - area.y) / area.height) * (view.bottom - view.top);
    const [left, right] = [ended.from.x, ended.to.x].sort((a, b) => a - b).map(x);
    const next = { ...view, left, right };
    if (both && Math.abs(ended.to.y - ended.from.y) > 3 * CLICK) {
      [next.top, next.bottom] = [ended.from.y, ended.to.y].sort((a, b) => a - b).map(y);
    }
    set(next);
  });
  on(canvas, "pointercancel", () => {
    drag = null;
    brush.hidden = true;
  });
  on(canvas, "click", (event) => {
    // The end of a drag is not a click.
    if (swallow) event.stopImmediatePropagation();
  });
  on(canvas, "dblclick", () => set(whole));
  on(
    canvas,
    "wheel",
    (event) => {
      // Without a key the wheel scrolls the page.
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      scale(event.deltaY > 0 ? FACTOR : 1 / FACTOR, surface.place(event));
    },
    { passive: false },
  );
  on(canvas, "keydown", (event) => {
    const acts = { "+": () => scale(1 / FACTOR), "=": () => scale(1 / FACTOR), "-": () => scale(FACTOR), 0: () => set(whole) };
    if (event.key in acts && !event.ctrlKey && !event.metaKey) {
      acts[event.key]();
      event.preventDefault();
    }
  });
  reset.hidden = true;

  return {
    get view() {
      return view;
    },
    set,
    remove() {
      stop.abort();
      buttons.remove();
      brush.remove();
    },
  };
}

/** The view within the whole, and not smaller than the least. */
function clamped(wanted, whole, least) {
  const [left, right] = interval(wanted.left, wanted.right, whole.left, whole.right, least.width);
  const [top, bottom] = interval(wanted.top, wanted.bottom, whole.top, whole.bottom, least.height);
  return { left, right, top, bottom };
}

function interval(first, last, low, high, least) {
  const size = Math.min(high - low, Math.max(least, last - first));
  const middle = (first + last) / 2;
  const start = Math.max(low, Math.min(high - size, last - first === size ? first : middle - size / 2));
  return size === high - low ? [low, high] : [start, start + size];
}
