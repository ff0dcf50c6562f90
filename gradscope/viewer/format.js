// How numbers and names are written, the same as in gradscope's Python reporters.

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A number in three digits. */
export function number(value) {
  if (!Number.isFinite(value)) {
    return Number.isNaN(value) ? "NaN" : value > 0 ? "infinite" : "-infinite";
  }
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return grouped(value);
  if (size >= 1e-3 && size < 1e4) return size >= 100 ? grouped(Math.round(value)) : String(Number(value.toPrecision(3)));
  const [mantissa, exponent] = value.toExponential(2).split("e");
  return `${Number(mantissa)}e${Number(exponent)}`;
}

/** A number with commas between its thousands; `toLocaleString` takes 20 ms at first. */
export function grouped(value) {
  const [whole, ...fraction] = String(value).split(".");
  return [whole.replace(/\B(?=(\d{3})+$)/g, ","), ...fraction].join(".");
}

/** A share as a percentage. */
export function percent(value) {
  return `${number(100 * value)}%`;
}

/** Ten to a whole power, for an axis. */
export function power(exponent) {
  if (exponent === 0) return "1";
  return `10${[...String(exponent)].map((char) => SUPERSCRIPT[char]).join("")}`;
}

/** The name with all but its `inner` last parts abbreviated to initials and numbers. */
function abbreviated(name, inner) {
  const parts = name.split(".");
  if (parts.length === 1) return name;
  const outer = parts.length - inner;
  return parts.map((part, index) => (index < outer ? part.replace(/(?<=\p{L})\p{L}+|_/gu, "") : part)).join(".");
}

/**
 * The names within a length, abbreviated alike, as what stands in one column must compare; each by
 * itself where two would look the same.
 */
export function elidedAlike(names, length) {
  for (let inner = Math.max(...names.map((name) => name.split(".").length)); inner > 0; inner--) {
    const shown = names.map((name) => abbreviated(name, inner));
    if (new Set(shown).size < new Set(names).size) break;
    if (shown.every((name) => name.length <= length)) return shown;
  }
  return names.map((name) => elided(name, length));
}

/**
 * The name within a length: its parts are abbreviated from the outside in, then it is cut in the
 * middle, as the numbers and the end are what tells layers apart.
 */
export function elided(name, length) {
  let inner = name.split(".").length;
  while (inner > 0 && abbreviated(name, inner).length > length) inner--;
  // By characters: half of an emoji is none.
  const shown = [...abbreviated(name, inner)];
  if (shown.length <= length) return shown.join("");
  const tail = Math.floor(((length - 1) * 2) / 3);
  return `${shown.slice(0, length - 1 - tail).join("")}…${shown.slice(shown.length - tail).join("")}`;
}
