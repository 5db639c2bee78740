// The chosen rows: distributions of their latencies, and their timelines; then everything is drawn for the first time.
const LANES = ["host", "copy_in", "compute", "copy_out"];
const ROW_PX = 24;

// On a narrow page the schedule has to do.
function title({ row, slot }) {
  const bare = axes.filter(column => column.bare).map(column => at(column.key, row)).join(" ");
  return `<b>${LETTERS[slot]}</b> \u00b7 ${escape(narrow() ? bare : labels[row])}`;
}

function drawCumulative() {
  if (!place("latency")) return null;
  const latency = setting("latency");
  const found = state.chosen.filter(({ row }) => data.details[row]?.cdf[latency]);
  const traces = found.map(each => {
    const times = data.details[each.row].cdf[latency], name = title(each), color = colour(data.colours[each.slot]);
    // A logarithmic axis has no place for zeros.
    const some = times.map((_, index) => index).filter(index => times[index] > 0);
    return {
      type: "scatter", mode: "lines+markers", name, customdata: some.map(() => each.row),
      x: some.map(index => times[index]), y: some.map(index => index / (times.length - 1)), line: { color, width: 2 },
      marker: { color, size: some.map(index => index === 50 || index === 99 ? 8 : 0.1) },
      hovertemplate: `${name}<br>%{y:.0%} within %{x:,.4g} ms<extra></extra>`,
    };
  });
  const times = traces.flatMap(trace => trace.x), bound = data.bounds[latency];
  if (bound && found.length) {
    times.push(bound);
    traces.push({
      type: "scatter", mode: "lines", name: `at most ${digits(0, 3).format(bound)} ms`, x: [bound, bound], y: [0, 1],
      hoverinfo: "skip", line: { color: "#d9483b", width: 1.5, dash: "dashdot" },
    });
  }
  missing("cumulative", found.length);
  const across = axis({ label: `${place("latency").selectedOptions[0].text}, ms`, format: "number" }, times);
  const up = { tickformat: ".0%", range: [-0.02, 1.03], zeroline: false, fixedrange: true };
  return show("cumulative", traces, layout(340 + 20 * traces.length, across, up, { hovermode: "closest" }));
}

function drawTimeline() {
  const found = state.chosen.filter(({ row }) => data.details[row]?.window.length);
  const longest = Math.max(0, ...found.map(({ row }) => data.details[row].end_ns));
  const left = -longest / 20, right = longest * 1.01;
  const bars = new Map(data.stages.map(stage => [stage, { base: [], x: [], y: [], text: [], customdata: [] }]));
  const annotations = [], ticks = [];
  let position = 0;
  for (const each of found) {
    const { window, end_ns: end } = data.details[each.row];
    position += 0.9;
    annotations.push({
      text: title(each), x: 0, xref: "paper", xanchor: "left", y: position, yanchor: "middle", showarrow: false,
      font: { size: 13 },
    });
    for (const [index, lane] of LANES.entries()) {
      const label = lane.replace("_", " ");
      ticks.push({ position: ++position, label });
      for (const [stage, on, step, start, length] of window) {
        const from = Math.max(start, left), to = Math.min(start + length, end, right);
        if (on !== index || from >= to) continue;
        const bar = bars.get(data.stages[stage]), ms = length / 1e6;
        const lasts = ms >= 1 ? `${digits(3, 3).format(ms)} ms` : `${digits(1, 1).format(ms * 1e3)} \u00b5s`;
        bar.base.push(from / 1e6);
        bar.x.push((to - from) / 1e6);
        bar.y.push(position);
        bar.text.push(lane === "compute" ? `step ${step}` : "");
        bar.customdata.push([step, start / 1e6, lasts, label]);
      }
    }
  }
  const traces = [...bars].filter(([, bar]) => bar.x.length).map(([stage, bar]) => {
    const { label, marker, ink } = data.looks[stage];
    return {
      type: "bar", orientation: "h", name: label, ...bar, marker, width: 0.82, textposition: "inside",
      insidetextanchor: "middle", textangle: 0, insidetextfont: { color: ink, size: 11 },
      hovertemplate: `<b>${escape(label)}</b> on %{customdata[3]}, step %{customdata[0]}<br>`
        + "starts at %{customdata[1]:.4f} ms, lasts %{customdata[2]}<extra></extra>",
    };
  });
  missing("timeline", found.length);
  const across = { title: { text: "ms since a forward ended" }, zeroline: false, range: [left / 1e6, right / 1e6] };
  const up = {
    tickvals: ticks.map(tick => tick.position), ticktext: ticks.map(tick => `${tick.label}  `),
    range: [position + 0.7, 0.2], showgrid: false, zeroline: false, fixedrange: true,
  };
  const rest = { barmode: "overlay", uniformtext: { minsize: 9, mode: "hide" }, annotations };
  return show("timeline", traces, layout(Math.round(position * ROW_PX) + 150, across, up, rest));
}

function missing(id, drawn) {
  const lost = state.chosen.filter(({ row }) => !data.details[row]).map(({ slot }) => LETTERS[slot]);
  const none = drawn || !state.chosen.length ? "" : "There is none of these.";
  place(`${id}-missing`).textContent = lost.length ? `Not in this page: ${lost.join(", ")}.` : none;
  place(id).hidden = !drawn;
}

const overview = () => Promise.all([drawScatter(), drawMap()]);
const compare = () => Promise.all([drawScatter(), drawCumulative(), drawTimeline()]);
for (const name of ["scatter-x", "scatter-y", "scatter-colour"]) place(name).onchange = drawScatter;
for (const name of ["map-x", "map-y", "map-value", "several"]) place(name).onchange = drawMap;
if (place("latency")) place("latency").onchange = drawCumulative;
let resized = 0;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawMap, 200); });
dark.addEventListener("change", () => { drawMap(); compare(); });
state.chosen = data.chosen.map((row, slot) => ({ row, slot }));
fill();
Promise.all([overview(), compare()]).then(() => { root.dataset.explored = labels.length; });
