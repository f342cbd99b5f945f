// ------------------------------------------------------------------------------ two compared

const SIGNIFICANT = 1.96;
const differs = (layer) => known(layer.z) && Math.abs(layer.z) > SIGNIFICANT;
const inBoth = (layer) => known(layer.difference);

const differenceTip = (layer) => [
  layer.name,
  `alpha A ${fixed(value(layer, "alpha", 0))} \u00b1 ${fixed(value(layer, "alpha_se", 0))}`,
  `alpha B ${fixed(value(layer, "alpha", 1))} \u00b1 ${fixed(value(layer, "alpha_se", 1))}`,
  `difference ${signed(layer.difference)} \u00b1 ${fixed(layer.difference_se)}, z ${signed(layer.z, 1)}`,
];

// Filled where the difference is beyond its error, hollow where it is not.
const mark = (beyond, color) => ({
  symbol: "circle", symbolSize: beyond ? 9 : 6.5, itemStyle: { color: beyond ? color : css("--ground"), borderColor: color, borderWidth: 1.5, opacity: 1 },
});
const split = (shown) => [
  ["within", shown.filter((layer) => inBoth(layer) && !differs(layer)), colors()[0], false],
  ["beyond 1.96 standard errors", shown.filter((layer) => inBoth(layer) && differs(layer)), colors()[1], true],
];

function scatterOption(shown) {
  const both = shown.filter(inBoth), series = [];
  for (const [name, members, color, beyond] of split(shown)) {
    series.push({
      type: "scatter", name, ...mark(beyond, color),
      data: members.map((layer) => ({ value: [value(layer, "alpha", 0), value(layer, "alpha", 1)], layer: layer.index })),
    });
    const ends = (layer, side) => ["alpha_low", "alpha_high"].map((field) => value(layer, field, side));
    const points = members.map((layer) => [value(layer, "alpha", 0), value(layer, "alpha", 1), layer]);
    const across = points.map(([a, b, layer]) => [a, b, ...ends(layer, 0)]).filter((row) => row.every(known));
    const along = points.map(([a, b, layer]) => [a, b, ...ends(layer, 1)]).filter((row) => row.every(known));
    if (across.length) series.push(bars(name, across, color, { across: true }));
    if (along.length) series.push(bars(name, along, color));
  }
  const alphas = both.flatMap((layer) => [0, 1].flatMap((side) => ["alpha", "alpha_low", "alpha_high"].map((field) => value(layer, field, side)))).filter(known);
  const least = Math.min(...alphas), greatest = Math.max(...alphas), margin = Math.max(0.06 * (greatest - least), 0.01);
  const ends = alphas.length ? [least - margin, greatest + margin] : [0, 1];
  const labels = { color: css("--muted"), hideOverlap: true, showMinLabel: false, showMaxLabel: false, formatter: (x) => Number(x.toPrecision(4)) };
  series.push(curve("diagonal", [[ends[0], ends[0]], [ends[1], ends[1]]], css("--muted"), { width: 1, type: [4, 4] }, { silent: true, tooltip: { show: false } }));
  const names = legend(series, { of: series.slice(0, -1) });
  return {
    series,
    tooltip: tooltip(({ data }) => (data.layer === undefined ? [] : differenceTip(layers[data.layer]))),
    legend: names,
    grid: grid(names),
    xAxis: axis({ name: "alpha A", min: ends[0], max: ends[1], axisLabel: labels }),
    yAxis: axis({ name: "alpha B", min: ends[0], max: ends[1], axisLabel: labels }),
  };
}

function differenceOption(shown) {
  const series = [];
  for (const [name, members, color, beyond] of split(shown)) {
    series.push({
      type: "scatter", name, ...mark(beyond, color),
      data: members.map((layer) => ({ value: [aside(layer), layer.difference], layer: layer.index })),
    });
    const ends = members.filter((layer) => known(layer.difference_se)).map((layer) => {
      const reach = SIGNIFICANT * layer.difference_se;
      return [aside(layer), layer.difference, layer.difference - reach, layer.difference + reach];
    });
    if (ends.length) series.push(bars(name, ends, color));
  }
  series.push({ type: "line", name: "none", data: [], markLine: { silent: true, symbol: "none", label: { show: false }, lineStyle: { color: css("--muted"), type: [4, 4], width: 1 }, data: [{ yAxis: 0 }] } });
  const names = legend(series, { of: series.slice(0, -1) });
  return {
    series,
    tooltip: tooltip(({ data }) => (data?.layer === undefined ? [] : differenceTip(layers[data.layer]))),
    legend: names,
    grid: grid(names),
    xAxis: depthAxis(),
    yAxis: axis({ name: "alpha B \u2212 alpha A" }),
  };
}

function comparisonPlots(parent, shown) {
  const scatter = figure(parent, {
    id: "plot-scatter", title: "Alpha before and after",
    text: "Each layer\u2019s alpha in A and in B with its 95 % interval; on the dashed line nothing has changed. Choose a point to see both spectra.",
  });
  const difference = figure(parent, {
    id: "plot-difference", title: "Difference against depth",
    text: "Alpha in B less alpha in A, with 1.96 standard errors of the difference to both sides. Of unchanged layers one in twenty lies beyond them.",
  });
  draw(scatter, () => scatterOption(shown()), openClicked);
  afterwards(() => draw(difference, () => differenceOption(shown()), openClicked));
}
