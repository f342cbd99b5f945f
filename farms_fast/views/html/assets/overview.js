// ----------------------------------------------------------------------------- all the layers

const groupOf = (layer) => page.groups[layer.group];
const blockText = (depth) => ending(page.blocks[depth] ?? "", 14);
const depthAxis = () => {
  const count = page.blocks.length, step = Math.max(1, Math.ceil(count / 20));
  const ticks = Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
  const long = ticks.some((tick) => blockText(tick).length > 4) && ticks.filter((tick) => blockText(tick).length > 4).length > 4;
  return axis({
    name: "block", min: -0.6, max: count - 0.4, splitLine: { show: false },
    axisLabel: { color: css("--muted"), customValues: ticks, formatter: blockText, rotate: long ? 55 : 0, hideOverlap: !long },
    axisTick: { lineStyle: { color: css("--line") }, customValues: ticks },
  });
};
// Side by side within a block, so that bars do not hide each other.
const alone = new Set(layers.map((l) => l.depth).filter((depth, i, all) => all.indexOf(depth) === i && all.lastIndexOf(depth) === i));
const aside = (layer) => layer.depth + (!alone.has(layer.depth) && page.groups.length > 1 ? 0.5 * (layer.group / (page.groups.length - 1) - 0.5) : 0);

const groupText = (name) => ending(page.groups[name.slice(1)], 34);
function depthOption(shown, { field, digits, interval, yName, log, wide = false }) {
  const series = [], many = shown.length > 200;
  page.groups.forEach((_, group) => {
    const members = shown.filter((layer) => layer.group === group && known(value(layer, field)) && (!log || value(layer, field) > 0));
    if (!members.length) return;
    const color = colors()[group % colors().length], name = `g${group}`;
    const height = (layer) => (log ? Math.log10(value(layer, field)) : value(layer, field));
    const points = [...members].sort((p, q) => p.depth - q.depth || p.index - q.index)
      .map((layer) => ({ value: [aside(layer), height(layer)], layer: layer.index }));
    // Several layers of one role in a block, such as experts, are no line.
    const single = new Set(members.map((layer) => layer.depth)).size === members.length;
    series.push({
      type: "line", name, data: points, symbol: MARKS[group % MARKS.length], symbolSize: many ? 5.5 : 8, showAllSymbol: true,
      itemStyle: { color }, lineStyle: { color, width: single ? 1.2 : 0, type: DASHES[group % DASHES.length], opacity: 0.65 },
      emphasis: { focus: "series" },
    });
    if (interval) {
      const ends = members.filter((layer) => known(value(layer, interval[0])) && known(value(layer, interval[1])))
        .map((layer) => [aside(layer), value(layer, field), value(layer, interval[0]), value(layer, interval[1])]);
      if (ends.length) series.push(bars(name, ends, color, { faint: many }));
    }
  });
  const marks = legend(series, { show: wide, text: groupText });
  return {
    series,
    tooltip: tooltip(({ data }) => {
      const layer = layers[data.layer];
      const ends = interval && known(value(layer, interval[0])) ? ` (${fixed(value(layer, interval[0]))} to ${fixed(value(layer, interval[1]))})` : "";
      return [layer.name, `${yName} ${digits === undefined ? significant(value(layer, field)) : fixed(value(layer, field), digits)}${ends}`, `${layer.kind} ${shapeOf(either(layer, "shape"))}, ${groupOf(layer)}`];
    }),
    legend: marks,
    grid: grid(wide ? marks : null),
    xAxis: depthAxis(),
    yAxis: log
      ? logAxis(shown.map((layer) => value(layer, field)).filter((x) => known(x) && x > 0).map(Math.log10), { name: yName })
      : axis({ name: yName }),
  };
}

const PLOTS = [
  { id: "plot-alpha", title: "Alpha against depth", wide: true, field: "alpha", digits: 3, interval: ["alpha_low", "alpha_high"], yName: "alpha",
    text: "The exponent of each layer\u2019s tail. Bars are 95 % bootstrap intervals over the windows; a layer with a single window has none. Choose a point to see its spectrum." },
  { id: "plot-D", title: "Distance D against depth", field: "D", digits: 3, yName: "D",
    text: "Kolmogorov\u2013Smirnov distance of the tail from the power law: the smaller, the better the fit. Marks as above." },
  { id: "plot-rank", title: "Stable rank per window against depth", field: "stable_rank_per_window", yName: "stable rank per window", log: true,
    text: "Sum of the eigenvalues over the largest, all windows together, divided by the number of windows: undivided, as the table has it, it grows with that number. Marks as above." },
];

function reportPlots(parent, shown) {
  const rooms = PLOTS.map((plot) => figure(parent, plot));
  const drawn = PLOTS.map((plot, i) => () => draw(rooms[i], () => depthOption(shown(), plot), openClicked));
  // One legend for all: what is switched off in it is so in the others.
  const first = drawn.shift()();
  afterwards(() => {
    const others = drawn.map((make) => make());
    first.on("legendselectchanged", ({ selected }) => others.forEach((other) => other.setOption({ legend: { selected } })));
  });
}
function openClicked({ data }) {
  if (data && data.layer !== undefined) openLayer(data.layer);
}
