// All rows at once: one figure against another with the frontier, and a figure over the fields.
function frontier(rows, x, y) {
  const sign = column => column.better === "high" ? -1 : 1;
  const order = rows.filter(steady).sort((a, b) =>
    sign(x) * (at(x.key, a) - at(x.key, b)) || sign(y) * (at(y.key, a) - at(y.key, b)));
  let best = Infinity;
  return order.filter(row => {
    const better = sign(y) * at(y.key, row) < best;
    if (better) best = sign(y) * at(y.key, row);
    return better;
  });
}

function drawScatter() {
  const x = columns[setting("scatter-x")], y = columns[setting("scatter-y")], by = columns[setting("scatter-colour")];
  const rows = filtered().filter(row => at(x.key, row) !== null && at(y.key, row) !== null);
  const points = (some, name, rest) => ({
    type: "scatter", mode: "markers", name, x: values(x.key, some), y: values(y.key, some),
    customdata: some, text: some.map(about), hovertemplate: "%{text}<extra></extra>", ...rest,
  });
  const dots = some => ({
    size: rows.length > 400 ? 5 : 8, opacity: some.map(row => kept(row) && steady(row) ? 0.8 : 0.35),
    symbol: some.map(row => kept(row) && steady(row) ? "circle" : "x"),
  });
  const groups = scale(by.key, rows);
  let traces = groups.names.map((name, index) => {
    const some = rows.filter(row => groups.index(row) === index);
    return points(some, called(by, name), { marker: { ...dots(some), color: nth(index) } });
  });
  if (numeric(by.key) && new Set(values(by.key, rows)).size > FEW) {
    const colorbar = { title: { text: by.label, side: "right" }, thickness: 12, outlinewidth: 0 };
    const marker = { ...dots(rows), color: values(by.key, rows), colorscale: data.scale, showscale: true, colorbar };
    traces = [points(rows, by.label, { showlegend: false, marker })];
  }
  const front = frontier(rows, x, y);
  traces.push(points(front, "frontier", {
    mode: "lines+markers", line: { shape: x.better === "high" ? "vh" : "hv", color: "rgba(217,72,59,0.9)", width: 2 },
    marker: { size: 9, symbol: "circle-open", color: "#d9483b", line: { width: 2 } },
  }));
  const chosen = state.chosen.filter(({ row }) => rows.includes(row));
  traces.push(points(chosen.map(each => each.row), "chosen", {
    mode: "markers+text", text: chosen.map(each => LETTERS[each.slot]), textposition: "top center",
    textfont: { size: 14, weight: 700 }, showlegend: false, hoverinfo: "skip", hovertemplate: null,
    marker: {
      size: 15, symbol: "circle-open", line: { width: 3 },
      color: chosen.map(each => colour(data.colours[each.slot])),
    },
  }));
  root.dataset.frontier = front.join(" ");
  const [across, up] = [x, y].map(column => axis(column, values(column.key, rows)));
  // Zoomed in, it stays so while rows are chosen.
  const rest = { hovermode: "closest", uirevision: `${x.key} ${y.key}` };
  return show("scatter", traces, layout(440, across, up, rest));
}

function drawMap() {
  const across = columns[setting("map-x")], up = columns[setting("map-y")], column = columns[setting("map-value")];
  place("several").disabled = !column.better;
  const able = filtered().filter(row => data.errors[row] === undefined && at(across.key, row) !== null);
  return up && up !== across ? drawHeat(across, up, column, able) : drawLines(across, column, able.filter(kept));
}

// Few digits, so that numbers fit into cells.
function brief(column, value) {
  if (share(column)) return shown(column, value);
  const style = Math.abs(value) >= 10000 ? { notation: "compact" } : {};
  return new Intl.NumberFormat("en-US", { ...style, maximumSignificantDigits: 3 }).format(value);
}

function drawHeat(across, up, column, rows) {
  const xs = scale(across.key, rows), ys = scale(up.key, rows);
  const cells = ys.names.map(() => xs.names.map(() => []));
  for (const row of rows) cells[ys.index(row)]?.[xs.index(row)]?.push(row);
  const each = make => cells.map((line, j) => line.map((some, i) => make(some, j, i)));
  const stands = each(some => standing(some.filter(kept), column));
  const value = (j, i) => stands[j][i] === null ? null : at(column.key, stands[j][i]);
  const found = stands.flat().filter(row => row !== null).map(row => at(column.key, row));
  const least = Math.min(...found), most = Math.max(...found);
  // Of latencies the ratios matter, of rates the differences.
  const to = column.better !== "high" && least > 0 && most / least > 30 ? Math.log10 : same => same;
  const z = each((_, j, i) => value(j, i) === null ? null : to(value(j, i)));
  const text = each((some, j, i) =>
    value(j, i) !== null ? brief(column, value(j, i)) : some.length ? "\u2717" : "");
  const hover = each((some, j, i) => {
    const fit = some.filter(kept).length;
    const which = data.allowed ? `${fit} of ${some.length} meet the objectives`
      : some.length > 1 ? `one of ${some.length} rows` : "";
    return [stands[j][i] === null ? "" : about(stands[j][i]), which].filter(Boolean).join("<br>") || "no rows";
  });
  const width = (place("map").clientWidth - (narrow() ? 110 : 190)) / xs.names.length;
  const room = width > 7 * Math.max(...text.flat().map(word => word.length)) + 4 && ys.names.length <= 25;
  const marks = to === Math.log10 ? axis({ ...column, format: "number" }, found) : null;
  const heat = {
    type: "heatmap", z, rows: stands, x: xs.names.map((_, index) => index), y: ys.names.map((_, index) => index),
    colorscale: data.scale, reversescale: column.better === "low", xgap: 2, ygap: 2, hoverongaps: false,
    text: hover, hovertemplate: "%{text}<extra></extra>", showscale: !room || !narrow(),
    colorbar: {
      thickness: 12, outlinewidth: 0, tickformat: share(column) ? ".0%" : "",
      ...(marks && { tickvals: marks.tickvals.map(Math.log10), ticktext: marks.ticktext }),
    },
  };
  // What is in a cell is written by a trace of its own, so that cells without a value are told apart too.
  const written = each((_, j, i) => ({ j, i })).flat().filter(({ j, i }) => text[j][i]);
  const ink = ({ j, i }) => {
    if (z[j][i] === null) return "#d9483b";
    const high = most > least ? (z[j][i] - to(least)) / (to(most) - to(least)) : 0.5;
    return (column.better === "low" ? 1 - high : high) > 0.45 ? "#1c2330" : "#ffffff";
  };
  const words = {
    type: "scatter", mode: "text", x: written.map(({ i }) => i), y: written.map(({ j }) => j), hoverinfo: "skip",
    text: written.map(({ j, i }) => text[j][i]), textfont: { size: 11.5, color: written.map(ink) }, showlegend: false,
  };
  const named = (field, names) => ({
    title: { text: field.label }, tickvals: names.map((_, index) => index), ticktext: names,
    range: [-0.5, names.length - 0.5], showgrid: false, zeroline: false, fixedrange: true,
  });
  const height = Math.min(900, 150 + 34 * Math.max(ys.names.length, 5));
  const look = layout(height, named(across, xs.names), named(up, ys.names), { showlegend: false });
  return show("map", room ? [heat, words] : [heat], look);
}

// Of one field: a line for each schedule, or for each value of whatever else varies.
function drawLines(across, column, rows) {
  const other = axes.find(each => each !== across && new Set(values(each.key, rows)).size > 1);
  const groups = other ? scale(other.key, rows) : { names: [column.label], index: () => 0 };
  const plain = numeric(across.key), xs = scale(across.key, rows);
  const where = row => plain ? at(across.key, row) : xs.index(row);
  const places = [...new Set(rows.map(where))].sort((a, b) => a - b);
  const traces = groups.names.map((name, group) => {
    const some = new Map(places.map(each => [each, []]));
    for (const row of rows) if (groups.index(row) === group) some.get(where(row)).push(row);
    const points = [...some.values()].map(each => standing(each, column)).filter(row => row !== null);
    const reach = side => points.map(row => {
      const value = at(column.key, row);
      return Math.abs((data[side][column.key]?.[row] ?? value) - value);
    });
    return {
      type: "scatter", mode: plain ? "lines+markers" : "markers", name: other ? called(other, name) : name,
      x: points.map(row => plain ? at(across.key, row) : xs.names[xs.index(row)]), y: values(column.key, points),
      customdata: points, text: points.map(about), hovertemplate: "%{text}<extra></extra>",
      error_y: { symmetric: false, array: reach("high"), arrayminus: reach("low"), thickness: 1, width: 3 },
      line: { width: 2, color: nth(group) }, marker: { size: 8, color: nth(group) },
    };
  });
  const bottom = plain ? axis(across, places) : { type: "category", title: { text: across.label } };
  return show("map", traces, layout(400, bottom, axis(column, values(column.key, rows))));
}
