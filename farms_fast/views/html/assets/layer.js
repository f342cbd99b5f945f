// ------------------------------------------------------------------------------ one layer

const layerView = document.getElementById("layer");
const METRICS = [
  ["alpha_weighted", "alpha\u00b7log \u03bbmax (alpha_weighted)", (x) => fixed(x)],
  ["log_alpha_norm", "log \u03a3\u03bb^alpha (log_alpha_norm)", (x) => fixed(x)],
  ["xmin", "start of the tail, xmin", significant],
  ["num_pl_spikes", "eigenvalues in the tail", (x) => String(x ?? "\u2013")],
  ["num_evals", "eigenvalues", (x) => String(x ?? "\u2013")],
  ["dropped", "of them zero, left out of the fit", (x) => String(x ?? "\u2013")],
  ["sigma", "(alpha \u2212 1) / \u221an, sigma", (x) => fixed(x)],
  ["alpha_even", "alpha of the even windows", (x) => fixed(x)],
  ["alpha_odd", "alpha of the odd windows", (x) => fixed(x)],
  ["window_alpha_mean", "mean alpha of single windows", (x) => fixed(x)],
  ["window_alpha_std", "their standard deviation", (x) => fixed(x)],
  ["spectral_norm", "largest eigenvalue \u03bbmax", significant],
  ["log_norm", "log \u03a3\u03bb", (x) => fixed(x)],
  ["stable_rank", "stable rank", significant],
  ["matrix_rank", "rank, all windows together", (x) => String(x ?? "\u2013")],
  ["entropy", "entropy", (x) => fixed(x)],
  ["mp_softrank", "mp_softrank", (x) => fixed(x)],
  ["Q", "aspect ratio of the windows, Q", (x) => significant(x)],
];
// What a report has in its heading.
const BOTH = [
  ["alpha_low", "95 % interval of alpha, from", (x) => fixed(x)],
  ["alpha_high", "to", (x) => fixed(x)],
  ["split_half", "even and odd windows differ by", (x) => fixed(x)],
  ["D", "D", (x) => fixed(x)],
  ["windows", "windows", (x) => String(x ?? "\u2013")],
];
const PANELS = [
  ["layer-density", "Density of the eigenvalues", "Bins of equal width in log \u03bb, the fitted tail, and the Marchenko\u2013Pastur law of the same shape and variance.", (l) => spectrumOption(l, "density", "eigenvalue \u03bb", "density")],
  ["layer-survival", "Complementary CDF", "Share of eigenvalues at or above \u03bb: needs no bins. A power law is a straight line.", (l) => spectrumOption(l, "survival", "eigenvalue \u03bb", "share \u2265 \u03bb")],
  ["layer-scan", "D over candidate xmin", "Distance and exponent of the tail that would start at each candidate; the diamond is the fit.", scanOption],
];

function layerFacts(layer, side) {
  const get = (field) => value(layer, field, side), name = (text) => named(text, side);
  const ends = known(get("alpha_low")) ? `${fixed(get("alpha_low"))} to ${fixed(get("alpha_high"))}` : "";
  return [
    [name("alpha"), fixed(get("alpha")), known(get("alpha_se")) ? `\u00b1 ${fixed(get("alpha_se"))}` : ""],
    ...(ends ? [[name("95 % interval"), ends, ""]] : []),
    ...(known(get("split_half")) ? [[name("even and odd windows differ by"), fixed(get("split_half")), ""]] : []),
    [name("D"), fixed(get("D")), ""],
    [name("tail"), String(get("num_pl_spikes") ?? "\u2013"), `of ${get("num_evals") ?? 0} eigenvalues`],
    [name("windows"), String(get("windows") ?? "\u2013"), `of ${get("window_rows")}\u00d7${get("window_cols")}`],
  ];
}

function showLayer(index) {
  undraw(layerView);
  const layer = layers[index], inTable = inOrder(), at = inTable.indexOf(index);
  const go = (text, to, key) => {
    const button = element("button", { type: "button", disabled: to === undefined, title: key });
    button.append(text);
    if (to !== undefined) button.addEventListener("click", () => openLayer(to));
    return button;
  };
  const back = element("button", { type: "button", title: "Escape" }, "\u2190 All layers");
  back.addEventListener("click", closeLayer);
  const heading = element("h2", { class: "layer-name", tabindex: "-1" }, element("bdi", {}, layer.name));
  const sides = sidesOf(layer).map(({ side }) => side);
  const parts = [
    element("div", { class: "bar" }, back,
      go("\u2039 Previous", at > 0 ? inTable[at - 1] : undefined, "left arrow"), go("Next \u203a", at >= 0 ? inTable[at + 1] : undefined, "right arrow"),
      element("span", {}, at < 0 ? "not among the layers that the filter shows" : `${at + 1} of ${inTable.length} as the table has them`)),
    heading,
    element("p", { class: "muted" }, `${layer.kind}, ${shapeOf(either(layer, "shape"))}, ${groupOf(layer)}${page.blocks[layer.depth] === layer.name ? "" : `, block ${page.blocks[layer.depth]}`}`),
  ];
  if (comparing && layer.note) parts.push(element("p", { class: "note" }, layer.note));
  const message = value(layer, "message"), status = value(layer, "status");
  if (!comparing && status !== "ok") parts.push(element("p", { class: "note" }, message ? `${status}: ${message}` : status));
  const list = element("dl", { class: "facts" });
  if (!comparing) facts(list, layerFacts(layer, 0));
  else if (inBoth(layer)) {
    facts(list, [
      ["alpha A", fixed(value(layer, "alpha", 0)), `\u00b1 ${fixed(value(layer, "alpha_se", 0))}`],
      ["alpha B", fixed(value(layer, "alpha", 1)), `\u00b1 ${fixed(value(layer, "alpha_se", 1))}`],
      ["difference", signed(layer.difference), `\u00b1 ${fixed(layer.difference_se)}, ${layer.paired ? "by one bootstrap of both" : "as of independent alphas"}`],
      ["z", signed(layer.z, 1), differs(layer) ? "beyond 1.96" : "within 1.96"],
    ]);
  }
  if (list.children.length) parts.push(list);
  const panels = element("div", { class: "panels" });
  layerView.replaceChildren(...parts, panels);
  for (const side of sidesOf(layer)) {
    if (side.curves.missing && drawn(sidesOf(layer)).length) panels.before(element("p", { class: "note" }, `No spectrum of ${sideNames[side.side]}: ${side.curves.missing}.`));
  }
  const some = sidesOf(layer), spectra = drawn(some).length > 0;
  const because = [...new Set(some.map(({ curves }) => curves.missing))].join("; ");
  if (!spectra) panels.before(element("p", { class: "note", id: "no-spectrum" }, `No spectrum to draw: ${because}.`));
  else for (const [id, title, text, option] of PANELS) draw(figure(panels, { id, title, text }), () => option(layer));
  const bins = some.map(({ curves }) => curves.windows).filter(Boolean);
  const outside = bins.reduce((sum, found) => sum + found.outside, 0);
  if (bins.length) draw(figure(panels, {
    id: "layer-windows", title: "Alpha of single windows",
    text: `Each window fitted alone; the line is the pooled alpha, the band its 95 % interval.${outside ? ` ${counted(outside, "window")} beyond the ends ${outside === 1 ? "is" : "are"} counted there.` : ""}`,
  }), () => windowsOption(layer));

  const metrics = element("dl", { class: "metrics" });
  facts(metrics, (comparing ? [...BOTH, ...METRICS] : METRICS).map(([field, text, format]) => [text, sides.map((side) => format(value(layer, field, side))).join("\u2003"), ""]));
  layerView.append(element("h3", {}, sides.length > 1 ? "Metrics of A and B" : comparing ? `Metrics of ${sideNames[sides[0]]}` : "Metrics"), metrics);
  return heading;
}
