// ---------------------------------------------------------------------------------- the table

const numeric = (label, hint, get, text) => ({ label, hint, get, text, numeric: true });
const statusOf = (layer) => {
  const message = value(layer, "message");
  return message ? `${value(layer, "status")}: ${message}` : value(layer, "status");
};
const commonColumns = [
  { label: "#", hint: "position in the model", get: (l) => l.index, text: (l) => String(l.index + 1), numeric: true },
  { label: "layer", hint: "name", get: (l) => l.name, name: true },
  { label: "role", hint: "name within the block", get: groupOf, text: groupOf, short: true },
  { label: "shape", hint: "rows \u00d7 columns, with the number of matrices before them where there are several", get: (l) => (either(l, "shape") ?? [0]).reduce((a, b) => a * b, 1), text: (l) => shapeOf(either(l, "shape")), numeric: true },
];
const plainColumn = (label, hint, field, text) => numeric(label, hint, (l) => value(l, field), (l) => text(value(l, field)));
const reportColumns = () => [
  ...commonColumns,
  plainColumn("windows", "windows whose eigenvalues are pooled", "windows", (x) => String(x ?? "\u2013")),
  plainColumn("alpha", "exponent of the tail", "alpha", (x) => fixed(x)),
  plainColumn("\u00b1", "block-bootstrap standard error of alpha over the windows", "alpha_se", (x) => fixed(x)),
  plainColumn("split", "|alpha of even windows \u2212 alpha of odd windows|", "split_half", (x) => fixed(x)),
  plainColumn("D", "Kolmogorov\u2013Smirnov distance of the tail from the power law", "D", (x) => fixed(x)),
  plainColumn("stable rank", "sum of the eigenvalues over the largest, all windows together", "stable_rank", (x) => significant(x)),
  plainColumn("log \u03bbmax", "decimal logarithm of the largest eigenvalue", "log_spectral_norm", (x) => fixed(x)),
  { label: "status", hint: "ok, or why there is no alpha", get: statusOf, text: statusOf, wrap: true, bad: (l) => value(l, "status") !== "ok" },
];
const sideColumn = (label, hint, field, side) => numeric(label, hint, (l) => value(l, field, side), (l) => fixed(value(l, field, side)));
const compareColumns = () => [
  ...commonColumns.filter((column) => !column.short),
  sideColumn("alpha A", "exponent of the tail in A", "alpha", 0),
  sideColumn("\u00b1 A", "its standard error over the windows", "alpha_se", 0),
  sideColumn("alpha B", "exponent of the tail in B", "alpha", 1),
  sideColumn("\u00b1 B", "its standard error over the windows", "alpha_se", 1),
  { ...numeric("difference", "alpha B \u2212 alpha A", (l) => l.difference, (l) => signed(l.difference)), strong: differs },
  numeric("\u00b1", "standard error of the difference", (l) => l.difference_se, (l) => fixed(l.difference_se)),
  { ...numeric("z", "difference over its standard error", (l) => l.z, (l) => signed(l.z, 1)), strong: differs },
  { label: "intervals", hint: "whether the 95 % intervals of the two alphas overlap", get: (l) => (l.overlap === null ? null : Number(l.overlap)), text: (l) => (l.overlap === null ? "\u2013" : l.overlap ? "overlap" : "apart") },
  { label: "note", hint: "in one only, failed, or of another shape", get: (l) => l.note, text: (l) => l.note, wrap: true, bad: (l) => l.note !== "" },
];
const columns = comparing ? compareColumns() : reportColumns();

const failedLayer = (layer) => [0, 1].some((side) => layer.sides[side] && value(layer, "status", side) !== "ok");
const SHOWN = comparing ? [
  ["all layers", () => true],
  ["beyond 1.96 standard errors", differs],
  ["within", (l) => inBoth(l) && !differs(l)],
  ["alpha is higher in B", (l) => inBoth(l) && l.difference > 0],
  ["alpha is lower in B", (l) => inBoth(l) && l.difference < 0],
  ["only in A", (l) => l.sides[1] === null],
  ["only in B", (l) => l.sides[0] === null],
  ["failed", failedLayer],
] : [
  ["all layers", () => true],
  ["with an alpha", (l) => known(value(l, "alpha"))],
  ["failed", failedLayer],
];

const table = document.getElementById("table");
const filterInput = document.getElementById("filter");
const roleSelect = document.getElementById("role");
const showSelect = document.getElementById("show");
// Everything that a filter is compared with, once.
const haystacks = layers.map((l) => [l.name, l.kind, groupOf(l), statusOf(l), l.note ?? "", value(l, "status", 1) ?? ""].join("\n").toLowerCase());
let order = layers.map((layer) => layer.index);
let visible = new Set(order);
let sorted = { column: 0, down: false };
const rows = [];

const inOrder = () => order.filter((index) => visible.has(index));
const shownLayers = () => layers.filter((layer) => visible.has(layer.index));

function buildTable() {
  const head = element("tr");
  columns.forEach((column, i) => {
    const button = element("button", { type: "button", title: column.hint }, column.label);
    button.addEventListener("click", () => sortBy(i));
    head.append(element("th", { scope: "col", class: column.numeric ? "n" : null }, button));
  });
  const body = element("tbody");
  for (const layer of layers) {
    const row = element("tr", { "data-index": layer.index });
    for (const column of columns) {
      if (column.name) {
        row.append(element("td", { class: "name" }, element("a", { href: `#layer=${layer.index}`, title: layer.name.slice(0, 2000) }, element("bdi", {}, layer.name))));
        continue;
      }
      const classes = [column.numeric && "n", column.wrap && "text", column.short && "short", column.bad?.(layer) && "bad", column.strong?.(layer) && "strong"];
      row.append(element("td", { class: classes.filter(Boolean).join(" ") || null }, column.text(layer) ?? ""));
    }
    rows[layer.index] = row;
    body.append(row);
  }
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !event.target.closest("a") && !String(window.getSelection())) openLayer(Number(row.dataset.index));
  });
  table.append(element("caption", {}, "All layers; the buttons in the heading sort"), element("thead", {}, head), body);

  roleSelect.append(element("option", { value: "" }, "all"), ...page.groups.map((text, group) => element("option", { value: group }, ending(text, 40))));
  SHOWN.forEach(([text, test], i) => {
    const count = layers.filter(test).length;
    if (count || i === 0) showSelect.append(element("option", { value: i }, `${text} (${count})`));
  });
  let waiting = 0;
  filterInput.addEventListener("input", () => { applyFilter(); clearTimeout(waiting); waiting = setTimeout(redraw, 120); });
  for (const select of [roleSelect, showSelect]) select.addEventListener("change", () => { applyFilter(); redraw(); });
  showSorting();
  applyFilter();
}

const collator = new Intl.Collator("en", { numeric: true });
function sortBy(column) {
  // The model's order and texts rise first, figures fall: the extreme ones are looked for.
  const first = columns[column].numeric && column > 0;
  sorted = { column, down: sorted.column === column ? !sorted.down : first };
  const { get } = columns[column], sign = sorted.down ? -1 : 1;
  const keys = layers.map(get);
  order = layers.map((layer) => layer.index).sort((p, q) => {
    const [a, b] = [keys[p], keys[q]];
    // What has no value is last either way.
    if (a === null || b === null || a === "" || b === "") return (a === null || a === "") - (b === null || b === "") || p - q;
    return sign * (typeof a === "number" ? a - b : collator.compare(a, b)) || p - q;
  });
  table.tBodies[0].append(...order.map((index) => rows[index]));
  showSorting();
}
function showSorting() {
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === sorted.column) cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}
function applyFilter() {
  const words = filterInput.value.toLowerCase().split(/\s+/).filter(Boolean);
  const role = roleSelect.value, test = SHOWN[showSelect.value || 0][1];
  visible = new Set(layers.filter((layer) => words.every((word) => haystacks[layer.index].includes(word))
    && (role === "" || layer.group === Number(role)) && test(layer)).map((layer) => layer.index));
  for (const layer of layers) rows[layer.index].hidden = !visible.has(layer.index);
  document.getElementById("shown").textContent = `${visible.size} of ${counted(layers.length, "layer")}`;
}
