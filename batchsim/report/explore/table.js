// The rows, sorted by a column and filtered by words; up to five of them are chosen, to be compared in the pictures.
const data = JSON.parse(document.getElementById("explored").textContent);
const place = id => document.getElementById(id);
const columns = Object.fromEntries(data.columns.map(column => [column.key, column]));
const axes = data.columns.filter(column => column.kind === "field");
const at = (key, row) => data.values[key][row] ?? null;
const numeric = key => data.values[key].every(value => value === null || typeof value === "number");
const state = { sort: data.sort, words: [], limit: data.limit, chosen: [] };
const LETTERS = "ABCDE";
const MARKS = { best: "gain", "runner-up": "gain", unstable: "loss" };

const formats = {};
function digits(least, most, style = "decimal", notation = "standard") {
  const options = { minimumFractionDigits: least, maximumFractionDigits: most, style, notation };
  return formats[JSON.stringify(options)] ??= new Intl.NumberFormat("en-US", options);
}

// As many digits as tell two values apart: 12,345 and 1.235 and 0.0123.
function shown(column, value) {
  if (value === null) return "\u2013";
  if (typeof value !== "number") return String(value);
  if (column.format === "percent") return digits(1, 1, "percent").format(value);
  if (column.format === "gain") return (value > 0 ? "+" : "") + digits(1, 1, "percent").format(value);
  if (column.kind === "field" && Number.isInteger(value)) return digits(0, 0).format(value);
  const size = Math.abs(value);
  const places = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4;
  if (column.format === "money") return `$${digits(Math.max(places, 2), Math.max(places, 2)).format(value)}`;
  return digits(column.kind === "field" ? 0 : places, places).format(value);
}

function interval(column, row) {
  const low = data.low[column.key]?.[row] ?? null, high = data.high[column.key]?.[row] ?? null;
  return low === null || high === null ? "" : `${shown(column, low)} to ${shown(column, high)}`;
}

const labels = data.values.schedule.map((_, row) => axes
  .map(column => ({ column, value: at(column.key, row) })).filter(({ value }) => value !== null)
  .map(({ column, value }) => column.bare ? value : `${column.label}=${shown(column, value)}`).join(", "));
const texts = labels.map((label, row) => [
  ...axes.map(column => `${column.label}=${at(column.key, row)} ${column.key}=${at(column.key, row)}`), label,
  ...data.columns.filter(column => column.kind === "text").map(column => at(column.key, row) ?? ""),
  data.errors[row] ?? "", ...data.marks[row] ?? [],
].join(" ").toLowerCase());
const tokens = texts.map(text => new Set(text.split(/[\s,]+/)));

// A word is found anywhere, `name=value` is meant exactly, and `ttft.p99<500` compares a figure.
function matches(row) {
  return state.words.every(word => {
    const [, name, sign, limit] = word.match(/^([\w.]+)(<=?|>=?)(-?[\d.]+)$/) ?? [];
    const column = name && data.columns.find(each => each.key.toLowerCase() === name)
      || name && data.columns.find(each => each.key.toLowerCase().endsWith(name));
    if (!column) return word.includes("=") ? tokens[row].has(word) : texts[row].includes(word);
    const value = at(column.key, row), bound = Number(limit);
    if (typeof value !== "number") return false;
    const beyond = sign[0] === "<" ? bound - value : value - bound;
    return sign[1] ? beyond >= 0 : beyond > 0;
  });
}

const filtered = () => labels.map((_, row) => row).filter(matches);

function sorted(rows) {
  const { key, down } = state.sort;
  if (!key) return rows;
  const compare = (left, right) => typeof left === "number" && typeof right === "number"
    ? left - right : String(left).localeCompare(String(right), "en", { numeric: true });
  return [...rows].sort((left, right) => {
    const a = at(key, left), b = at(key, right);
    if (a === null || b === null) return (a === null) - (b === null) || left - right;
    return (down ? -1 : 1) * compare(a, b) || left - right;
  });
}

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function cell(column, row) {
  const words = typeof at(column.key, row) === "string" ? { class: "words" } : {};
  const made = element(column.kind === "figure" ? "td" : "th", shown(column, at(column.key, row)), words);
  const range = interval(column, row);
  if (range && column.interval) made.append(" ", element("small", range));
  else if (range) made.title = `90%: ${range}`;
  return made;
}

function line(row) {
  const made = element("tr", "", { "data-row": row });
  const box = element("input", "", { type: "checkbox", "aria-label": `compare ${labels[row]}` });
  const first = element("td", "", { class: "pick" });
  first.append(box, element("b"));
  made.append(first);
  const visible = data.columns.filter(column => column.shown);
  if (data.errors[row] === undefined) {
    made.append(...visible.map(column => cell(column, row)));
  } else {
    const fields = visible.filter(column => column.kind === "field");
    const reason = element("td", data.errors[row], { colspan: visible.length - fields.length, class: "failed" });
    made.append(...fields.map(column => cell(column, row)), reason);
  }
  const named = made.querySelector("th.words") ?? made.querySelector("th");
  for (const word of data.marks[row] ?? []) {
    named.append(" ", element("span", word, { class: `chip ${MARKS[word] ?? ""}` }));
  }
  return made;
}

function fill() {
  const rows = sorted(filtered());
  place("rows").replaceChildren(...rows.slice(0, state.limit).map(line));
  const left = rows.length - Math.min(rows.length, state.limit);
  const some = rows.length === labels.length ? "" : ` of ${digits(0, 0).format(labels.length)}`;
  place("count").textContent = `${digits(0, 0).format(rows.length)}${some} rows`
    + (left ? `, the first ${digits(0, 0).format(state.limit)} shown` : "");
  place("more").hidden = !left;
  for (const heading of place("table").querySelectorAll("th[data-key]")) {
    heading.classList.toggle("words", !numeric(heading.dataset.key));
    heading.removeAttribute("aria-sort");
    if (heading.dataset.key !== state.sort.key) continue;
    heading.setAttribute("aria-sort", state.sort.down ? "descending" : "ascending");
  }
  mark();
}

// Rows keep their elements while they are marked, and so the focus stays where it is.
function mark() {
  for (const made of place("rows").children) {
    const found = state.chosen.find(each => each.row === Number(made.dataset.row));
    made.classList.toggle("chosen", Boolean(found));
    made.querySelector("input").checked = Boolean(found);
    made.querySelector("b").textContent = found ? LETTERS[found.slot] : "";
    made.querySelector("b").style.borderColor = found ? data.colours[found.slot] : "transparent";
  }
  place("chosen").replaceChildren(...state.chosen.map(({ row, slot }) => {
    const made = element("li"), letter = element("b", LETTERS[slot]);
    const remove = element("button", "\u00d7", { type: "button", "aria-label": `do not compare ${labels[row]}` });
    letter.style.borderColor = data.colours[slot];
    remove.onclick = () => choose(row);
    made.append(letter, ` ${labels[row]} `, remove);
    return made;
  }));
  if (state.chosen.length) return;
  place("chosen").append(element("li", "No row is chosen: choose some in the table, or click on a point."));
}

function choose(row) {
  if (data.errors[row] !== undefined) return;
  const found = state.chosen.findIndex(each => each.row === row);
  if (found >= 0) {
    state.chosen.splice(found, 1);
  } else {
    if (state.chosen.length === LETTERS.length) state.chosen.shift();
    const slot = [...LETTERS].findIndex((_, each) => !state.chosen.some(other => other.slot === each));
    state.chosen.push({ row, slot });
  }
  mark();
  compare();
}

place("table").tHead.addEventListener("click", event => {
  const heading = event.target.closest("button")?.closest("th");
  if (!heading) return;
  const { key } = heading.dataset;
  // What is best comes first, and the other way round on the next click.
  const down = state.sort.key === key ? !state.sort.down : columns[key].better === "high";
  state.sort = { key, down };
  fill();
});
place("rows").addEventListener("click", event => {
  const row = event.target.closest("tr");
  if (row && !String(getSelection())) choose(Number(row.dataset.row));
  else if (event.target.matches("input")) choose(Number(row.dataset.row));
});
place("more").onclick = () => { state.limit = Infinity; fill(); };
let typed = 0;
place("filter").addEventListener("input", event => {
  clearTimeout(typed);
  typed = setTimeout(() => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    fill();
    overview();
  }, 120);
});
