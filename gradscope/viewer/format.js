// How numbers and names are written, the same as in gradscope's Python reporters.

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A number in three digits. */
export function number(value) {
  if (!Number.isFinite(value)) {
    return Number.isNaN(value) ? "NaN" : value > 0 ? "infinite" : "-infinite";
  }
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en-US");
  if (size >= 1e-3 && size < 1e4) {
    return size >= 100 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));
  }
  const [mantissa, exponent] = value.toExponential(2).split("e");
  return `${Number(mantissa)}e${Number(exponent)}`;
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

/**
 * The name within a length: first its outer parts are abbreviated, then its middle goes, as the
 * numbers and the end are what tells layers apart.
 */
export function elided(name, length) {
  const parts = name.split(".");
  for (let index = 0; index < parts.length - 1 && parts.join(".").length > length; index++) {
    if (!/^\d+$/.test(parts[index])) parts[index] = parts[index].slice(0, 1);
  }
  const shown = parts.join(".");
  if (shown.length <= length) return shown;
  const tail = Math.floor(((length - 1) * 2) / 3);
  return `${shown.slice(0, length - 1 - tail)}…${shown.slice(shown.length - tail)}`;
}
