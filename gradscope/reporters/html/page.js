// The report's pictures: hands the embedded numbers to the viewer.

import { counts, numbers } from "./decode.js";
import { heatmap } from "./heatmap.js";
import { lines } from "./lines.js";
import { profile } from "./profile.js";
import { rangeOf } from "./range.js";
import { ridgelines } from "./ridgelines.js";
import { sharedStep } from "./step.js";
import { element } from "./surface.js";
import { sortable } from "./table.js";
import { tree } from "./tree.js";

/** A grid whose values are an array; most are decoded when they are asked for. */
async function opened(grid) {
  if (typeof grid.values === "string") grid.values = await numbers(grid.values);
  return grid;
}

async function decoded(run) {
  await Promise.all([run.heatmaps[0], run.profile].filter(Boolean).map(opened));
  if (run.profile) run.profile.bands = await numbers(run.profile.bands);
  for (const chart of run.charts) {
    await Promise.all(chart.series.map(async (series) => (series.values = await numbers(series.values))));
    if (chart.band) [chart.band.low, chart.band.high] = await Promise.all([numbers(chart.band.low), numbers(chart.band.high)]);
  }
  for (const spread of run.spreads) {
    [spread.roots, spread.unmeasured] = await Promise.all([spread.roots, spread.unmeasured].map(counts));
  }
  for (const layer of run.layers) layer.value ??= NaN;
  return { ...run, step: sharedStep() };
}

/** A place for each run that has something to show in a picture; the picture goes if none has. */
function panels(view, runs, has) {
  const figure = document.querySelector(`[data-view="${view}"]`);
  const shown = runs.filter(has);
  if (figure && !shown.length) figure.remove();
  const host = figure?.querySelector(".panels");
  return shown.map((run) => ({ run, panel: panel(host, runs.length > 1 ? run.name : "") }));
}

function panel(host, title) {
  const made = element("div", "panel");
  if (title) made.append(element("h4", "run-name", title));
  host.append(made);
  return made;
}

/** One scale for all runs, so that colours and heights compare. */
function extent(ranges) {
  if (!ranges.length) return null;
  return [Math.min(...ranges.map(([low]) => low)), Math.max(...ranges.map(([, high]) => high))];
}

const shared = (grids) => extent(grids.map(rangeOf).filter((range) => range !== null));

async function showHeatmaps(runs) {
  const places = panels("heatmap", runs, (run) => run.heatmaps.length);
  if (!places.length) return () => {};
  const titles = [...new Set(runs.flatMap((run) => run.heatmaps.map((grid) => grid.title)))];
  const select = document.querySelector("#quantity");
  select.append(...titles.map((title) => new Option(title, title)));
  let drawn = [];
  const draw = async () => {
    const chosen = select.value;
    const found = places
      .map((place) => ({ ...place, grid: place.run.heatmaps.find((grid) => grid.title === chosen) }))
      .filter(({ grid }) => grid);
    await Promise.all(found.map(({ grid }) => opened(grid)));
    if (chosen !== select.value) return;
    drawn.forEach(({ picture }) => picture.remove());
    const range = shared(found.map(({ grid }) => grid));
    drawn = found.map(({ run, panel, grid }) => ({ run, grid, picture: heatmap(panel, { ...grid, range }, run.step) }));
    document.querySelector("#quantity-note").textContent = note(drawn[0].grid);
  };
  select.addEventListener("change", draw);
  select.closest("label").hidden = titles.length < 2;
  await draw();
  return (run, name) => {
    const found = drawn.find((entry) => entry.run === run);
    const row = found?.grid.rows.findIndex((other) => other === name || other.startsWith(`${name}.`)) ?? -1;
    if (row < 0) return;
    found.picture.focus(row);
    document.querySelector('[data-view="heatmap"]').scrollIntoView({ block: "center" });
  };
}

function note(grid) {
  const things = grid.table === "parameters" ? "parameters" : "modules";
  const told = [`One row per ${things.slice(0, -1)}, the first layer on top.`];
  if (grid.left_out) told.push(`${grid.left_out} of ${grid.left_out + grid.rows.length} ${things} are left out: biases, norms, and what was not measured or does not fit.`);
  if (grid.pooled) told.push("Several recorded steps share a column; it holds the value farthest from its row's median.");
  return told.join(" ");
}

function showCharts(runs) {
  const figure = document.querySelector('[data-view="lines"]');
  const titles = [...new Set(runs.flatMap((run) => run.charts.map((chart) => chart.title)))];
  if (!titles.length) {
    figure?.remove();
    return;
  }
  let host = figure.querySelector(".panels");
  for (const title of titles) {
    const found = runs.map((run) => ({ run, chart: run.charts.find((chart) => chart.title === title) })).filter(({ chart }) => chart);
    const peers = found.map(({ chart }) => chart);
    // Of several runs each quantity has a row of its own.
    if (runs.length > 1 && host.childElementCount) host.after((host = element("div", "panels small")));
    for (const { run, chart } of found) {
      lines(panel(host, runs.length > 1 ? `${title}, ${run.name}` : title), { ...chart, peers }, run.step);
    }
  }
}

function showRidges(runs) {
  const places = panels("ridgelines", runs, (run) => run.spreads.length);
  const titles = [...new Set(runs.flatMap((run) => run.spreads.map((spread) => spread.title)))];
  const select = document.querySelector("#counted");
  select?.append(...titles.map((title) => new Option(title, title)));
  let drawn = [];
  const draw = () => {
    drawn.forEach((picture) => picture.remove());
    const title = select?.value ?? titles[0];
    const found = places
      .map((place) => ({ ...place, spread: place.run.spreads.find((spread) => spread.title === title) }))
      .filter(({ spread }) => spread);
    const range = extent(found.map(({ spread: { lowest, bins } }) => [lowest, lowest + bins]));
    drawn = found.map(({ run, panel, spread }) => ridgelines(panel, { ...spread, range }, run.step));
  };
  select?.addEventListener("change", draw);
  draw();
}

async function main() {
  const begun = performance.now();
  const runs = await Promise.all(JSON.parse(document.querySelector("#data").textContent).map(decoded));
  document.documentElement.classList.add("live");
  // More beside one another would be too narrow to read.
  document.documentElement.style.setProperty("--runs", Math.min(runs.length, 4));
  const focus = await showHeatmaps(runs);
  const grids = runs.map((run) => run.profile).filter(Boolean);
  const range = shared(grids);
  for (const { run, panel } of panels("profile", runs, (other) => other.profile)) {
    profile(panel, { ...run.profile, range }, run.step);
  }
  showCharts(runs);
  showRidges(runs);
  for (const { run, panel } of panels("tree", runs, (other) => other.layers.length)) {
    tree(panel, run.layers, (name) => focus(run, name));
  }
  for (const table of document.querySelectorAll("table.sheet")) {
    sortable(table.closest("details").querySelector(".tools"), table);
  }
  // Observers are told in the order in which they were made: by now the pictures are painted.
  await new Promise((told) => new ResizeObserver(told).observe(document.body));
  // For tests and the curious: milliseconds since the page was asked for, and of the script alone.
  document.documentElement.dataset.ready = performance.now().toFixed(0);
  document.documentElement.dataset.drawn = (performance.now() - begun).toFixed(0);
}

main().catch((error) => {
  // The pictures for print are there without a script too.
  document.documentElement.classList.remove("live");
  console.error(error);
});
