// A comparison's table can be sorted, its code copied, and a line found by its row.

import { element } from "./surface.js";
import { sortable } from "./table.js";

const LIT = "lit";

function copying(code) {
  // A page from disk may not reach the clipboard; then the code is selected.
  const button = element("button", "copy", "copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  });
  code.parentElement.before(button);
}

function linked(row) {
  const line = document.querySelector(`[data-line="${row.dataset.of}"]`);
  if (!line) return;
  row.addEventListener("pointerenter", () => line.classList.add(LIT));
  row.addEventListener("pointerleave", () => line.classList.remove(LIT));
}

for (const code of document.querySelectorAll("pre code")) copying(code);
for (const table of document.querySelectorAll("table.sheet")) {
  for (const row of table.tBodies[0].rows) linked(row);
  sortable(document.querySelector(".tools"), table);
}
