const content = JSON.parse(document.getElementById("content").textContent);
const views = new Map();
const chosen = new Map();

function unpack(columns) {
  const names = Object.keys(columns);
  const lists = names.map((name) => {
    const column = columns[name];
    return Array.isArray(column) ? column : column.codes.map((code) => (code < 0 ? null : column.values[code]));
  });
  const length = names.length ? lists[0].length : 0;
  return Array.from({ length }, (_, i) => Object.fromEntries(names.map((name, j) => [name, lists[j][i]])));
}

function passes(row) {
  for (const [name, values] of chosen) {
    if (row[name] !== undefined && !values.has(String(row[name]))) return false;
  }
  return true;
}

/* Columns of small multiples: as many as the place has room for. */
function fitted(spec, width) {
  if (!spec.facet || !spec.columns) return spec;
  const one = (spec.spec.width ?? 200) + 30;
  return { ...spec, columns: Math.max(1, Math.floor((width - 60) / one)) };
}

async function draw(element) {
  const figure = content.figures[element.dataset.figure];
  const plot = element.querySelector(".plot");
  const rows = Object.fromEntries(Object.entries(figure.data).map(([name, columns]) => [name, unpack(columns)]));
  const shown = Object.fromEntries(Object.entries(rows).map(([name, all]) => [name, all.filter(passes)]));
  const spec = fitted({ ...figure.spec, datasets: shown }, plot.clientWidth);
  const { view } = await vegaEmbed(plot, spec, {
    renderer: "svg",
    actions: { export: true, source: false, compiled: false, editor: false },
    config: content.config,
    tooltip: { theme: "dark" },
    logLevel: 1, // errors; its warnings are about fields that a filter left empty
  });
  view.addEventListener("click", (_, item) => item?.datum?.id && showRun(item.datum.id));
  views.set(element, { view, rows });
  element.dataset.drawn = "yes";
}

async function refilter() {
  for (const element of document.querySelectorAll("main [data-dataset]")) {
    const values = chosen.get("dataset");
    element.classList.toggle("hidden", Boolean(values) && !values.has(element.dataset.dataset));
  }
  for (const table of document.querySelectorAll(".table table")) filterRows(table);
  for (const { view, rows } of views.values()) {
    for (const [name, all] of Object.entries(rows)) view.data(name, all.filter(passes));
    view.resize();
    await view.runAsync();
  }
}

function filterRows(table) {
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const [dataset, method, seed] = ["dataset", "method", "seed"].map((name) => heads.indexOf(name));
  for (const row of table.tBodies[0]?.rows ?? []) {
    const values = { ...content.methods[row.cells[method]?.textContent] };
    if (dataset >= 0) values.dataset = row.cells[dataset].textContent;
    if (values.dataset === "all" || values.dataset === "") delete values.dataset;
    if (seed >= 0 && row.cells[seed].textContent !== "–") values.seed = row.cells[seed].textContent;
    row.classList.toggle("hidden", !passes(values));
  }
}

/* --- Filters, kept in the address so that a page that loads itself again stays as it was --- */

function readFilters() {
  const state = {};
  for (const filter of document.querySelectorAll(".filter")) {
    const boxes = [...filter.querySelectorAll("input")];
    const on = boxes.filter((box) => box.checked).map((box) => box.value);
    const all = on.length === boxes.length;
    filter.classList.toggle("narrowed", !all);
    filter.querySelector(".state").textContent = all ? "all" : `${on.length} of ${boxes.length}`;
    if (all) chosen.delete(filter.dataset.name);
    else {
      chosen.set(filter.dataset.name, new Set(on));
      state[filter.dataset.name] = on;
    }
  }
  return state;
}

function onFilter() {
  const state = readFilters();
  const hash = Object.keys(state).length ? `#filters=${encodeURIComponent(JSON.stringify(state))}` : " ";
  history.replaceState(null, "", hash.trim() || location.pathname);
  return refilter();
}

function restoreFilters() {
  if (!location.hash.startsWith("#filters=")) return;
  try {
    const state = JSON.parse(decodeURIComponent(location.hash.slice("#filters=".length)));
    for (const box of document.querySelectorAll(".filter input")) {
      if (state[box.name]) box.checked = state[box.name].includes(box.value);
    }
  } catch {
    history.replaceState(null, "", location.pathname);
  }
}

for (const filter of document.querySelectorAll(".filter")) {
  filter.addEventListener("change", onFilter);
  for (const [name, value] of [["all", true], ["none", false]]) {
    filter.querySelector(`.${name}`).addEventListener("click", () => {
      for (const box of filter.querySelectorAll("input")) box.checked = value;
      onFilter();
    });
  }
}
document.addEventListener("click", (event) => {
  for (const filter of document.querySelectorAll(".filter[open]")) {
    if (!filter.contains(event.target)) filter.open = false;
  }
});

/* --- Tables: words left, numbers right; a click on a head sorts --- */

const number = (text) => {
  const value = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return Number.isNaN(value) ? null : value;
};

function prepareTable(table) {
  const rows = [...(table.tBodies[0]?.rows ?? [])];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const texts = rows.map((row) => row.cells[column].textContent);
    const words = texts.some((text) => text && text !== "–" && !/^[+-]?[\d.,]+(e-?\d+)?( %)?$/.test(text)) || texts.every((text) => !text);
    head.classList.toggle("words", words);
    for (const row of rows) {
      row.cells[column].classList.toggle("words", words);
      row.cells[column].classList.toggle("long", row.cells[column].textContent.length > 48);
    }
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => sortBy(table, column, words));
  });
}

function sortBy(table, column, words) {
  const head = table.tHead.rows[0].cells[column];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => (words ? row.cells[column].textContent : number(row.cells[column].textContent));
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = words ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

/* --- A run's own page --- */

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function showRun(id) {
  const run = content.runs[id];
  if (!run) return;
  const place = document.getElementById("run-content");
  place.replaceChildren(element("h3", `${run.method} · ${run.dataset} · seed ${run.seed}`));
  const list = document.createElement("dl");
  const say = (name, value) => value !== null && value !== undefined && value !== "" && list.append(element("dt", name), element("dd", String(value)));
  say("run", run.name);
  say("folder", run.folder);
  say("status", run.problem ? `${run.status}: ${run.problem}` : run.status);
  for (const [name, value] of Object.entries(run.accuracy)) say(name, value?.toFixed?.(4));
  say("steps", run.steps);
  say("hours", `${run.hours}${run.gpus ? ` on ${run.gpus} GPU` : ""}`);
  say("started", run.started);
  say("commit", run.commit);
  say("command", run.command);
  say("data", Object.entries(run.counts).map(([name, n]) => `${name} ${n}`).join(", "));
  place.append(list);
  const slugs = Object.keys(run.references);
  if (slugs.length) {
    const names = Object.keys(run.references[slugs[0]]);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["reference", ...names]) head.append(element("th", name.replaceAll("_", " ")));
    const body = table.createTBody();
    for (const slug of slugs) {
      const row = body.insertRow();
      row.append(element("td", slug), ...names.map((name) => element("td", String(run.references[slug][name] ?? ""))));
    }
    place.append(table);
  }
  for (const sample of run.samples) {
    place.append(element("h3", "sample"), element("pre", `prompt: ${sample.prompt}\n\nbefore: ${sample.before}\n\nafter: ${sample.after}`));
  }
  if (run.traceback) place.append(element("h3", "traceback"), element("pre", run.traceback));
  document.getElementById("run").showModal();
}

/* --- Theme --- */

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

/* --- Start --- */

for (const table of document.querySelectorAll(".table table")) prepareTable(table);
for (const row of document.querySelectorAll("#table-runs tbody tr")) {
  const run = Object.keys(content.runs).find((id) => content.runs[id].name === [...row.cells].at(-1).textContent);
  if (run) row.addEventListener("click", () => showRun(run));
}
restoreFilters();
readFilters();
const figures = [...document.querySelectorAll("figure[data-figure]")];
for (const figure of figures) {
  try {
    await draw(figure);
  } catch (error) {
    figure.querySelector(".plot").replaceChildren(element("p", `This figure cannot be drawn: ${error.message}`));
    console.error(error);
  }
  await new Promise((resolve) => setTimeout(resolve)); // let the reader scroll meanwhile
}
await refilter();
document.documentElement.dataset.ready = "yes";
