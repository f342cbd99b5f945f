// --------------------------------------------------------------------- the spectrum of a layer

// One or two sides: the second has its own colour, mark and dash.
const sideColor = (side) => colors()[side];
const sideMark = (side) => MARKS[side * 2];
const sideNames = comparing ? ["A", "B"] : [""];
const named = (text, side) => (comparing ? `${text} ${sideNames[side]}` : text);

function sidesOf(layer) {
  return sideNames.map((_, side) => side).filter((side) => layer.sides[side])
    .map((side) => ({ side, curves: curvesOf(layer.index, side) }));
}
const drawn = (sides) => sides.filter(({ curves }) => !curves.missing);
const xminLine = (layer, side) => {
  const xmin = value(layer, "xmin", side);
  return known(xmin) && xmin > 0 ? [Math.log10(xmin)] : [];
};
const verticals = (layer, side, name) => ({
  type: "line", name, data: [], itemStyle: { color: sideColor(side) },
  markLine: {
    silent: true, symbol: "none", animation: false, lineStyle: { color: sideColor(side), type: side ? [7, 4] : [2, 3], width: 1.3 },
    label: { show: side === 0, formatter: "xmin", color: css("--muted"), position: "end", distance: 3 },
    data: xminLine(layer, side).map((x) => ({ xAxis: x })),
  },
});
const curve = (name, data, color, lineStyle, given = {}) => ({
  type: "line", name, data, showSymbol: false, symbol: "none", lineStyle: { color, ...lineStyle }, itemStyle: { color }, ...given,
});
const pointTip = (x, y) => tooltip(({ seriesName, value: at }) => (Array.isArray(at) ? [seriesName, `${x} ${fromLog(at[0])}`, `${y} ${fromLog(at[1])}`] : []));

function spectrumOption(layer, which, xName, yName) {
  const sides = drawn(sidesOf(layer)), series = [], xs = [], ys = [];
  let start = which === "density" ? -Infinity : Infinity;
  for (const { side, curves } of sides) {
    const color = sideColor(side);
    if (which === "density") {
      const [low, high] = curves.bins, values = unpack(curves.density);
      const points = values.map((y, i) => [low + ((i + 0.5) / values.length) * (high - low), y]).filter((p) => p[1] !== null);
      series.push({ type: "scatter", name: named("ESD", side), data: points, symbol: sideMark(side), symbolSize: 6, itemStyle: { color } });
      points.forEach(([x, y]) => { xs.push(x); ys.push(y); });
    } else {
      const points = pairs(...curves.survival);
      series.push(curve(named("ESD", side), points, color, { width: 2, type: side ? [10, 2, 2, 2] : "solid" }, { triggerLineEvent: true }));
      points.forEach(([x, y]) => { xs.push(x); ys.push(y); });
      // The smallest eigenvalues of square windows spread over many decades in which nothing happens.
      const few = points.find((point) => point[1] < Math.log10(0.99) + points[0][1]) ?? points[0];
      start = Math.min(start, few[0], ...xminLine(layer, side).map((x) => x - 0.3));
    }
  }
  for (const { side, curves } of sides) {
    const color = sideColor(side), part = which === "density" ? 1 : 2;
    if (curves.tail[0].length) {
      const ends = curves.tail[0].map((x, i) => [x, curves.tail[part][i]]);
      series.push(curve(named("fitted tail", side), ends, comparing ? color : colors()[1], { width: 2.2, type: [8, 4] }));
      ends.forEach(([x, y]) => { xs.push(x); ys.push(y); });
    }
    const law = pairs(curves.law[0], curves.law[part]);
    if (law.length) {
      series.push(curve(named("Marchenko\u2013Pastur", side), law, comparing ? color : css("--muted"), { width: 1.3, type: comparing ? [2, side ? 6 : 3] : "solid", opacity: 0.9 }));
      law.forEach(([x]) => xs.push(x));
    }
    series.push(verticals(layer, side, named("fitted tail", side)));
  }
  // The law may fall far below what the spectrum has: the data set the scale.
  const names = legend(series);
  return {
    series,
    tooltip: pointTip("\u03bb", yName),
    legend: names,
    grid: grid(names, { top: below(names) + 12 }),
    xAxis: logAxis(xs.filter((x) => x >= start), { name: xName }),
    yAxis: logAxis(ys, { name: yName }),
  };
}

function scanOption(layer) {
  const series = [], xs = [], top = [];
  for (const { side, curves } of drawn(sidesOf(layer))) {
    const color = sideColor(side), second = comparing ? color : colors()[2];
    const distances = pairs(curves.scan[0], curves.scan[1]);
    distances.forEach(([x]) => xs.push(x));
    series.push(curve(named("D", side), distances, color, { width: 2, type: side ? [8, 3] : "solid" }, { triggerLineEvent: true }));
    const alphas = pairs(curves.scan[0], curves.scan[2]);
    // The last candidates have tails of a few eigenvalues, whose alpha is anything.
    const sorted = alphas.map((p) => p[1]).sort((p, q) => p - q);
    top.push(sorted[Math.floor(0.9 * (sorted.length - 1))], value(layer, "alpha", side));
    series.push(curve(named("alpha", side), alphas, second, { width: 1.4, type: side ? [2, 4] : "dotted" }, { yAxisIndex: 1, triggerLineEvent: true }));
    const xmin = xminLine(layer, side)[0], D = value(layer, "D", side);
    if (known(xmin) && known(D)) {
      series.push({ type: "scatter", name: named("the fit", side), data: [[xmin, D]], symbol: MARKS[3], symbolSize: 12, itemStyle: { color: comparing ? color : colors()[1], borderColor: css("--ground"), borderWidth: 1 }, z: 5 });
    }
    series.push(verticals(layer, side, named("D", side)));
  }
  const most = Math.max(2, ...top.filter(known)) * 1.25, names = legend(series);
  return {
    series,
    tooltip: tooltip(({ seriesName, value: at }) => (Array.isArray(at) ? [seriesName, `xmin ${fromLog(at[0])}`, fixed(at[1])] : [])),
    legend: names,
    grid: grid(names, { top: below(names) + 12 }),
    xAxis: logAxis(xs, { name: "candidate xmin" }),
    yAxis: [
      axis({ name: "D", min: 0 }),
      axis({ name: "alpha", min: 1, max: most, axisLabel: { color: css("--muted"), showMaxLabel: false, hideOverlap: true }, splitLine: { show: false } }),
    ],
  };
}

function windowsOption(layer) {
  const series = [], xs = [];
  for (const { side, curves } of sidesOf(layer)) {
    const found = curves.windows, color = sideColor(side);
    if (!found) continue;
    const width = (found.high - found.low) / found.counts.length;
    xs.push(found.low, found.high);
    series.push({
      type: "custom", name: named("windows alone", side), encode: { x: [0, 1], y: 2 }, clip: true,
      data: found.counts.map((n, i) => [found.low + i * width, found.low + (i + 1) * width, n]),
      itemStyle: { color },
      renderItem: (_, api) => {
        const [left, top] = api.coord([api.value(0), api.value(2)]), [right, bottom] = api.coord([api.value(1), 0]);
        return { type: "rect", shape: { x: left + 0.5, y: top, width: Math.max(1, right - left - 1), height: bottom - top },
          style: { fill: side ? "transparent" : color, opacity: side ? 1 : 0.45, stroke: color, lineWidth: side ? 1.4 : 0.5, lineDash: side ? [4, 2] : null } };
      },
    });
    const [alpha, low, high, even, odd] = ["alpha", "alpha_low", "alpha_high", "alpha_even", "alpha_odd"].map((f) => value(layer, f, side));
    const line = (x, text, type, width = 1.6) => ({ xAxis: x, lineStyle: { color: comparing ? color : colors()[1], type, width }, label: { show: side === 0, formatter: text, color: css("--muted"), distance: 3, position: "end" } });
    series.push({
      type: "line", name: named("windows alone", side), data: [],
      markArea: known(low) && known(high) ? { silent: true, itemStyle: { color: comparing ? color : colors()[1], opacity: 0.13 }, data: [[{ xAxis: low }, { xAxis: high }]] } : undefined,
      markLine: { silent: true, symbol: "none", data: known(alpha) ? [line(alpha, "pooled", side ? [7, 4] : "solid", 2)] : [] },
    });
    const halves = [["even windows", even, false], ["odd windows", odd, true]].filter((half) => known(half[1]));
    for (const [text, x, hollow] of halves) {
      const ink = comparing ? color : colors()[1];
      xs.push(x);
      series.push({ type: "scatter", name: named(text, side), data: [[x, 0]], symbol: MARKS[2], symbolSize: 11, symbolOffset: [0, -7], itemStyle: { color: hollow ? css("--ground") : ink, borderColor: ink, borderWidth: 1.6 }, z: 6 });
    }
    if (known(low)) xs.push(low, high);
  }
  const least = Math.min(...xs), greatest = Math.max(...xs), margin = Math.max(0.04 * (greatest - least), 1e-3);
  const names = legend(series);
  return {
    series,
    tooltip: tooltip(({ seriesName, value: at }) => (at.length === 3
      ? [seriesName, `${counted(at[2], "window")} with alpha`, `${fixed(at[0])} to ${fixed(at[1])}`] : [seriesName, `alpha ${fixed(at[0])}`])),
    legend: names,
    grid: grid(names, { top: below(names) + 12 }),
    xAxis: axis({ name: "alpha", min: least - margin, max: greatest + margin, axisLabel: { color: css("--muted"), hideOverlap: true, formatter: (x) => Number(x.toPrecision(4)), showMinLabel: false, showMaxLabel: false } }),
    yAxis: axis({ name: "windows", min: 0, minInterval: 1, scale: false }),
  };
}
