// The model as a tree, each part in the colour of its health.

import { number } from "./format.js";
import { element } from "./surface.js";

const ORDER = ["healthy", "info", "warning", "error"];
const SIGNS = { healthy: "✓", info: "i", warning: "!", error: "×" };

/**
 * Draw the tree in `host`.
 *
 * `layers`: `{name, type, severity, codes, value}` in the order of depth; `severity` is "healthy",
 * "info", "warning" or "error", `value` a number to show (NaN: none). `chosen(name)` is called when
 * a layer is clicked.
 */
export function tree(host, layers, chosen) {
  const root = { children: new Map(), layer: null };
  for (const layer of layers) {
    let node = root;
    for (const part of layer.name.split(".")) {
      if (!node.children.has(part)) node.children.set(part, { children: new Map(), layer: null });
      node = node.children.get(part);
    }
    node.layer = layer;
  }
  const list = element("ul", "gs-tree");
  for (const [name, node] of root.children) list.append(item(name, name, node, chosen));
  host.append(list);
  return { remove: () => list.remove() };
}

function item(name, path, node, chosen) {
  // A part with a single part of its own is one line.
  while (!node.layer && node.children.size === 1) {
    const [[part, only]] = node.children;
    [name, path, node] = [`${name}.${part}`, `${path}.${part}`, only];
  }
  const made = element("li");
  const state = worst(node);
  if (!node.children.size) {
    made.append(line(name, node, state, chosen));
    return made;
  }
  const details = element("details");
  const summary = element("summary");
  summary.append(line(name, node, state, chosen));
  details.open = ORDER.indexOf(state) >= ORDER.indexOf("warning");
  const inner = element("ul");
  for (const [part, child] of node.children) inner.append(item(part, `${path}.${part}`, child, chosen));
  details.append(summary, inner);
  made.append(details);
  return made;
}

function line(name, node, state, chosen) {
  const made = element("span", "gs-node");
  made.append(element("span", `gs-health gs-${state}`, SIGNS[state]));
  const label = element("span", "gs-name", name);
  if (node.layer) {
    const button = element("button", "gs-link");
    button.type = "button";
    button.append(label);
    button.addEventListener("click", (event) => {
      event.preventDefault();
      chosen(node.layer.name);
    });
    made.append(button, element("span", "gs-type", node.layer.type));
    if (node.layer.codes.length) made.append(element("span", "gs-codes", node.layer.codes.join(" ")));
    if (Number.isFinite(node.layer.value)) made.append(element("span", "gs-value", number(node.layer.value)));
  } else {
    made.append(label, element("span", "gs-type", `${size(node)} parts`));
  }
  const health = made.firstChild;
  health.setAttribute("role", "img");
  health.setAttribute("aria-label", state);
  return made;
}

function worst(node) {
  const states = [node.layer?.severity ?? "healthy", ...Array.from(node.children.values(), worst)];
  return ORDER[Math.max(...states.map((state) => ORDER.indexOf(state)))];
}

function size(node) {
  return (node.layer ? 1 : 0) + Array.from(node.children.values(), size).reduce((sum, part) => sum + part, 0);
}
