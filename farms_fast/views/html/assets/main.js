// ----------------------------------------------------------------------------------- the page

const overview = document.getElementById("overview");
let wasAt = 0;

const openLayer = (index) => { location.hash = `layer=${index}`; };
const closeLayer = () => { location.hash = ""; };
function route() {
  const match = /^#layer=(\d+)$/.exec(location.hash);
  const index = match && Number(match[1]) < layers.length ? Number(match[1]) : null;
  const was = layerView.hidden ? null : Number(layerView.dataset.index);
  if (index === null) {
    if (was === null) return;
    undraw(layerView);
    layerView.hidden = true;
    overview.hidden = false;
    redraw();
    resizeCharts();
    window.scrollTo(0, wasAt);
    table.querySelector("tr.seen")?.classList.remove("seen");
    rows[was].classList.add("seen");
    rows[was].querySelector("a").focus({ preventScroll: true });
    return;
  }
  if (was === null) wasAt = window.scrollY;
  overview.hidden = true;
  layerView.hidden = false;
  layerView.dataset.index = index;
  const heading = showLayer(index);
  window.scrollTo(0, 0);
  heading.focus({ preventScroll: true });
}
window.addEventListener("hashchange", route);
window.addEventListener("keydown", (event) => {
  if (layerView.hidden || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select")) return;
  if (event.key === "Escape") return closeLayer();
  const list = inOrder(), at = list.indexOf(Number(layerView.dataset.index));
  const to = { ArrowLeft: list[at - 1], ArrowRight: list[at + 1] }[event.key];
  if (at >= 0 && to !== undefined) openLayer(to);
});

function spread(values) {
  const given = values.filter(known).sort((a, b) => a - b);
  const middle = given.length ? (given[(given.length - 1) >> 1] + given[given.length >> 1]) / 2 : null;
  return { given, middle, least: given[0] ?? null, most: given.at(-1) ?? null };
}
function summary() {
  const list = document.getElementById("facts");
  if (comparing) {
    const both = layers.filter(inBoth), beyond = both.filter(differs).length;
    const only = [0, 1].map((side) => layers.filter((l) => l.sides[1 - side] === null).length);
    const mean = both.length ? both.reduce((sum, l) => sum + l.difference, 0) / both.length : null;
    facts(list, [
      ["compared", String(both.length), both.length === 1 ? "layer" : "layers"],
      ["beyond 1.96 standard errors", String(beyond), `by chance about ${fixed(0.05 * both.filter((l) => known(l.z)).length, 1)}`],
      ["mean difference of alpha", signed(mean), ""],
      ["mean alpha", `${fixed(page.sides[0].mean_alpha)} \u2192 ${fixed(page.sides[1].mean_alpha)}`, ""],
      ["only in A", String(only[0]), ""], ["only in B", String(only[1]), ""],
      ["failed", `${page.sides[0].failed}, ${page.sides[1].failed}`, "in A, in B"],
    ]);
    return;
  }
  const alphas = spread(layers.map((l) => value(l, "alpha"))), errors = spread(layers.map((l) => value(l, "alpha_se")));
  const halves = spread(layers.map((l) => value(l, "split_half")));
  const meanHalves = halves.given.length ? halves.given.reduce((a, b) => a + b, 0) / halves.given.length : null;
  facts(list, [
    ["layers", String(layers.length), page.sides[0].failed ? `${page.sides[0].failed} failed` : ""],
    ["mean alpha", fixed(page.sides[0].mean_alpha), ""],
    ["median alpha", fixed(alphas.middle), ""],
    ["lowest and highest alpha", fixed(alphas.least), `to ${fixed(alphas.most)}`],
    ["median standard error", fixed(errors.middle), "over windows"],
    ["even and odd windows differ by", fixed(meanHalves), "on average"],
    ["tensors left out", String(page.sides[0].skipped.length), ""],
  ]);
}

function about() {
  const parent = document.getElementById("about");
  page.sides.forEach((side, i) => {
    const rows = side.settings.map(([name, text]) => element("tr", {},
      element("th", { scope: "row" }, name), element("td", { class: page.settings_that_differ?.includes(name) ? "strong" : null }, element("bdi", {}, text))));
    parent.append(element("details", {}, element("summary", {}, named("Settings", i)), element("table", {}, element("tbody", {}, ...rows))));
    if (!side.skipped.length) return;
    const reasons = new Map();
    for (const [name, shape, reason] of side.skipped) reasons.set(reason, [...(reasons.get(reason) ?? []), [name, shape]]);
    const listed = [...reasons].sort((a, b) => b[1].length - a[1].length).map(([reason, tensors]) =>
      element("details", {}, element("summary", {}, `${tensors.length}\u2002${reason}`),
        element("table", {}, element("tbody", {}, ...tensors.map(([name, shape]) => element("tr", {}, element("td", {}, element("bdi", {}, name)), element("td", {}, shape)))))));
    parent.append(element("details", {}, element("summary", {}, `${named("Tensors left out", i)} (${side.skipped.length})`), ...listed));
  });
}

// Milliseconds from the start of loading, for whoever waits: "ready" when the page can be used with its
// first plot in it, "drawn" when the other plots are there too.
const since = () => String(Math.round(performance.now()));
function afterwards(work) {
  requestAnimationFrame(() => setTimeout(() => { work(); document.documentElement.dataset.drawn = since(); }));
}

function start() {
  document.getElementById("title").textContent = page.title;
  document.getElementById("kicker").textContent = comparing
    ? `farms_fast comparison: A is ${page.sides[0].name}, B is ${page.sides[1].name}` : "farms_fast report";
  document.getElementById("footer").textContent = `Made with farms_fast ${page.version}. Plots by Apache ECharts ${echarts.version}.`;
  document.getElementById("notes").replaceChildren(...page.notes.map((text) => element("p", { class: "note" }, text)));
  summary();
  buildTable();
  applyTheme();
  (comparing ? comparisonPlots : reportPlots)(document.getElementById("plots"), shownLayers);
  about();
  route();
  document.documentElement.dataset.ready = since();
}
start();
