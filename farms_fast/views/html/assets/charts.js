// ------------------------------------------------------------------------------------- charts

// The end of a text, for a plot. ECharts keeps the widths of texts in a plain object, which one like
// "__proto__" would be found in before it was put there.
const ending = (text, most) => {
  const end = text.length > most ? `\u2026${text.slice(1 - most)}` : text;
  return end in {} ? `\u200b${end}` : end;
};

// Every chart that is on the page: how its option is made, so that it can be made anew.
const charts = new Map();

// A figure with a heading, a line that says what it shows, and room for a chart.
function figure(parent, { id, title, text, wide = false, label }) {
  const room = element("div", { class: "chart", id, role: "img", "aria-label": label ?? `${title}. ${text}` });
  parent.append(element("figure", { class: wide ? "wide" : null },
    element("figcaption", {}, element("h3", {}, title), element("p", {}, text)), room));
  return room;
}

function draw(room, makeOption, onClick) {
  const chart = echarts.init(room, null, { renderer: "svg" });
  charts.set(room, { chart, makeOption });
  if (onClick) chart.on("click", onClick);
  roomWidth = room.clientWidth || roomWidth;
  chart.setOption({ ...common(), ...makeOption() });
  return chart;
}
function undraw(parent) {
  for (const [room, { chart }] of charts) {
    if (parent.contains(room)) { chart.dispose(); charts.delete(room); }
  }
}
function redraw() {
  for (const [room, { chart, makeOption }] of charts) {
    roomWidth = printing ? PAPER : room.clientWidth || roomWidth;
    // Roles that were switched off in the legend stay off.
    const selected = chart.getOption().legend?.[0]?.selected;
    const option = { ...common(), ...makeOption() };
    if (option.legend && selected) option.legend.selected = selected;
    chart.setOption(option, true);
  }
}
// What is between the margins of a page of A4 or Letter, in CSS pixels.
const PAPER = 660;
function resizeCharts() {
  charts.forEach(({ chart }, room) => { if (room.offsetWidth) chart.resize({ width: printing ? PAPER : "auto" }); });
  redraw();
}
let resizing = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(resizeCharts); });

const common = () => ({
  animation: false,
  backgroundColor: "transparent",
  color: colors(),
  textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: css("--ink"), fontSize: 12 },
  toolbox: {
    show: !printing, right: 0, top: -6, itemSize: 12, itemGap: 9,
    iconStyle: { borderColor: css("--muted") }, emphasis: { iconStyle: { borderColor: css("--accent"), textFill: css("--accent") } },
    feature: {
      dataZoom: { title: { zoom: "zoom into a rectangle", back: "zoom back" }, filterMode: "none", brushStyle: { color: css("--accent"), opacity: 0.15, borderWidth: 0 } },
      restore: { title: "whole plot" },
      saveAsImage: { title: "save as SVG", backgroundColor: css("--ground"), name: "farms-fast" },
    },
  },
});
// Names of series, and what is shown of them; those of curves without marks get none here either.
function legend(series, { text = (name) => name, of = series, ...given } = {}) {
  const shown = new Map();
  for (const one of of) if (!shown.has(one.name) && one.name !== undefined) shown.set(one.name, one);
  const data = [...shown].map(([name, one]) => ({ name, ...(one.symbol === "none" ? { itemStyle: { opacity: 0 } } : {}) }));
  return {
    left: 0, width: legendWidth(), top: 0, itemWidth: 26, itemHeight: 9, itemGap: 14, data, formatter: text,
    textStyle: { color: css("--ink"), fontSize: 12 }, inactiveColor: css("--line"), ...given,
  };
}
// The legend wraps, and the plot begins below its last line.
let roomWidth = 600;
const legendWidth = () => Math.max(160, roomWidth - 125);
function below(made) {
  let lines = 1, used = 0;
  for (const { name } of made.data) {
    const width = 26 + 5 + 14 + 6.4 * made.formatter(name).length;
    if (used > 0 && used + width > legendWidth()) [lines, used] = [lines + 1, 0];
    used += width;
  }
  return 14 + 24 * lines;
}
const grid = (made, given = {}) => ({ left: 4, right: 10, top: made ? below(made) : 30, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "all", ...given });
// The tooltip's content is made of elements, in which names stand as text.
const tooltip = (lines) => ({
  trigger: "item", confine: true, backgroundColor: css("--ground"), borderColor: css("--line"), padding: [6, 9],
  textStyle: { color: css("--ink"), fontSize: 12 },
  formatter: (given) => {
    const [name, ...others] = lines(given) ?? [];
    return name === undefined ? "" : element("div", { class: "tip" }, element("strong", {}, element("bdi", {}, name)), ...others.map((line) => element("span", {}, line)));
  },
});

const axis = (given = {}) => ({
  type: "value", scale: true, nameLocation: "middle", nameGap: 26,
  nameTextStyle: { color: css("--muted") }, axisLabel: { color: css("--muted"), hideOverlap: true },
  axisLine: { show: true, onZero: false, lineStyle: { color: css("--line") } }, axisTick: { lineStyle: { color: css("--line") } },
  splitLine: { lineStyle: { color: css("--line"), opacity: 0.6 } }, ...given,
});

// Ticks of an axis of decimal logarithms: decades, and where there are few of them 2 and 5 between.
function decades(low, high) {
  const span = high - low, ticks = [];
  const step = Math.max(1, Math.ceil(span / 7));
  for (let e = Math.floor(low); e <= Math.ceil(high); e += 1) {
    if (span >= 2.2 && e % step) continue;
    for (const m of span < 2.2 ? [1, 2, 5] : [1]) ticks.push(e + Math.log10(m));
  }
  return ticks.filter((t) => t >= low - 1e-9 && t <= high + 1e-9);
}
const tickText = (log) => {
  const e = Math.round(log);
  return Math.abs(log - e) < 1e-9 && (e < -2 || e > 3) ? `10${superscript(e)}` : fromLog(log);
};
function logAxis(values, given = {}) {
  const finite = values.filter(known);
  let low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!finite.length) [low, high] = [0, 1];
  const margin = Math.max((high - low) * 0.03, 0.01);
  [low, high] = [low - margin, high + margin];
  let ticks = decades(low, high);
  if (ticks.length < 2) ticks = [0.1, 0.5, 0.9].map((part) => low + part * (high - low));
  return axis({
    min: low, max: high, ...given,
    axisLabel: { color: css("--muted"), hideOverlap: true, customValues: ticks, formatter: tickText },
    axisTick: { lineStyle: { color: css("--line") }, customValues: ticks },
    splitLine: { show: false },
  });
}

// Vertical or horizontal bars from low to high through points [x, y, low, high], without caps.
const bars = (name, data, color, given = {}) => ({
  type: "custom", name, data, silent: true, z: 1, clip: true, tooltip: { show: false },
  encode: { x: given.across ? [0, 2, 3] : 0, y: given.across ? 1 : [1, 2, 3] }, ...given.series,
  renderItem: (_, api) => {
    const [from, to] = [2, 3].map((i) => (given.across ? api.coord([api.value(i), api.value(1)]) : api.coord([api.value(0), api.value(i)])));
    return { type: "line", shape: { x1: from[0], y1: from[1], x2: to[0], y2: to[1] }, style: { stroke: color, lineWidth: given.faint ? 0.8 : 1.2, opacity: given.faint ? 0.45 : 0.75 } };
  },
});
