// What all pictures share: how they look, their axes, and what is told of a row that is pointed at.
const MANY = 16;
const FEW = 8;

const setting = name => place(name).value;
const narrow = () => innerWidth < 600;
const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = shade => (dark.matches && data.dark[shade]) || shade;
const nth = index => colour(data.palette[index % data.palette.length]);
const escape = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
const values = (key, rows) => rows.map(row => at(key, row));
const kept = row => !data.allowed || data.allowed[row];
const steady = row => !data.steady || data.steady[row];
const share = column => column.format === "percent" || column.format === "gain";

const layout = (height, xaxis, yaxis, rest = {}) => ({
  ...data.layout, height, ...rest,
  xaxis: { ...data.layout.xaxis, ...xaxis }, yaxis: { ...data.layout.yaxis, ...yaxis },
});

const clicks = new Set();
function show(id, traces, look) {
  const done = Plotly.react(id, traces, look, config);
  if (!clicks.has(id)) {
    clicks.add(id);
    place(id).on("plotly_click", ({ points: [point] }) => {
      const row = point.data.type === "heatmap" ? point.data.rows[point.y]?.[point.x] : point.customdata;
      if (Number.isInteger(row)) choose(row);
    });
  }
  return done;
}

// Logarithmic where values spread far, with labels at 1, 2 and 5 as far as there is room.
function axis(column, all) {
  const found = all.filter(value => typeof value === "number");
  const least = Math.min(...found), most = Math.max(...found);
  const look = { title: { text: column.label }, zeroline: false, separatethousands: true };
  if (share(column)) return { ...look, tickformat: ".0%" };
  if (column.format === "money") look.tickprefix = "$";
  if (!(least > 0 && most / least > 20)) return look;
  const first = Math.floor(Math.log10(least)), last = Math.ceil(Math.log10(most));
  const every = Math.ceil((last - first + 1) / 8), fine = last - first < (narrow() ? 2 : 5);
  const marks = [];
  for (let decade = first; decade <= last; decade += every) {
    marks.push(...(fine ? [1, 2, 5] : [1]).map(digit => digit * 10 ** decade));
  }
  return { ...look, type: "log", tickvals: marks, ticktext: marks.map(mark => digits(0, 6).format(mark)) };
}

// The values that a field takes, in order; numbers that are too many, in ranges.
function scale(key, rows) {
  const column = columns[key];
  const distinct = [...new Set(values(key, rows))].filter(value => value !== null);
  const numbered = (names, groups) => {
    const order = new Map(groups.flatMap((group, index) => group.map(value => [value, index])));
    return { names, index: row => order.get(at(key, row)) };
  };
  if (numeric(key)) distinct.sort((a, b) => a - b);
  if (!numeric(key) || distinct.length <= MANY) {
    return numbered(distinct.map(value => shown(column, value)), distinct.map(value => [value]));
  }
  const least = distinct[0], most = distinct.at(-1);
  const to = least > 0 && most / least >= 10 ? Math.log : value => value;
  const range = value => Math.min(FEW - 1, Math.floor((to(value) - to(least)) / (to(most) - to(least)) * FEW));
  const groups = Array.from({ length: FEW }, (_, index) => distinct.filter(value => range(value) === index))
    .filter(group => group.length);
  const ends = group => [...new Set([group[0], group.at(-1)])].map(value => shown(column, value)).join(" to ");
  return numbered(groups.map(ends), groups);
}

// The row of several that a cell stands for: the best or worst by a figure, or the one in the middle.
function standing(rows, column) {
  const found = rows.filter(row => typeof at(column.key, row) === "number");
  if (!found.length) return null;
  found.sort((a, b) => at(column.key, a) - at(column.key, b));
  const which = column.better ? setting("several") : "median";
  if (which === "median") return found[Math.floor((found.length - 1) / 2)];
  return (which === "best") === (column.better === "high") ? found.at(-1) : found[0];
}

function about(row) {
  const some = data.columns.filter(column => column.kind === "figure" && column.shown && at(column.key, row) !== null);
  const told = some.map(column =>
    `${escape(column.label)} <b>${shown(column, at(column.key, row))}</b> ${interval(column, row)}`);
  return [`<b>${escape(labels[row])}</b>`, ...told].join("<br>");
}

// How a value of a field is called where the field itself is not.
const called = (column, name) => column.bare ? name : `${column.label}=${name}`;
