// A table whose rows can be sorted and filtered.

import { element } from "./surface.js";

/**
 * Let a table be sorted by any column and filtered by text.
 *
 * A cell's `data-value` is what it is sorted by, as a number where it is one; "" or nothing: not
 * known, and last. `host` gets the field for the filter.
 */
export function sortable(host, table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const field = element("input", "gs-filter");
  field.type = "search";
  field.placeholder = "filter by name or type";
  field.setAttribute("aria-label", "filter the rows");
  const found = element("span", "gs-found");
  found.setAttribute("aria-live", "polite");
  const bar = element("div", "gs-tools");
  bar.append(field, found);
  host.append(bar);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      row.hidden = !words.every((word) => texts[index].includes(word));
      if (!row.hidden) shown++;
    });
    found.textContent = words.length ? `${shown} of ${rows.length}` : "";
  });

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = element("button", "gs-sort");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      // Numbers are most telling from the top, names from A.
      const ascending = now ? now === "descending" : !head.classList.contains("n");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      body.append(...sorted(rows, column, ascending));
    });
  });
  return { filter: (text) => { field.value = text; field.dispatchEvent(new Event("input")); } };
}

function sorted(rows, column, ascending) {
  const keyed = rows.map((row) => ({ row, key: keyOf(row.cells[column]) }));
  const direction = ascending ? 1 : -1;
  return keyed
    .sort((one, other) => {
      if (one.key === null || other.key === null) return (one.key === null) - (other.key === null);
      if (typeof one.key === "number") return direction * (one.key - other.key);
      return direction * one.key.localeCompare(other.key, "en", { numeric: true });
    })
    .map(({ row }) => row);
}

function keyOf(cell) {
  const value = cell.dataset.value;
  if (value === undefined) return cell.textContent.trim();
  return value === "" ? null : Number(value);
}
