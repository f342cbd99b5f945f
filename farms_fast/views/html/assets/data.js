// ---------------------------------------------------------------------------------- the data

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const page = read("data");
const comparing = page.mode === "compare";
const layers = page.layers;
layers.forEach((layer, index) => { layer.index = index; });

// The curves are several times as large as all the rest, and wanted one layer at a time.
let allCurves = null;
const curvesOf = (index, side) => (allCurves ??= read("curves"))[index][side];

// The value of a record's field on one side; null where there is none.
const position = Object.fromEntries(page.fields.map((name, i) => [name, i]));
const value = (layer, field, side = 0) => layer.sides[side]?.[position[field]] ?? null;
const either = (layer, field) => value(layer, field, layer.sides[0] ? 0 : 1);
const known = (number) => typeof number === "number";

// [least, step, whole numbers] as pairs with another such list; points without a value are left out.
const unpack = ([least, step, numbers]) => numbers.map((n) => (n === null ? null : least + step * n));
const pairs = (x, y) => {
  const xs = unpack(x), ys = unpack(y);
  return xs.map((at, i) => [at, ys[i]]).filter((point) => point[1] !== null);
};

// ------------------------------------------------------------------------------------ numbers

const minus = (text) => text.replace(/^-/, "\u2212");
// Adding 0 takes the sign from what is nearly nothing.
const fixed = (x, digits = 3) => (known(x) ? minus((Number(x.toFixed(digits)) + 0).toFixed(digits)) : "\u2013");
const signed = (x, digits = 3) => (known(x) && Number(x.toFixed(digits)) > 0 ? "+" : "") + fixed(x, digits);
const significant = (x) => {
  if (!known(x)) return "\u2013";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)) return power(Math.log10(Math.abs(x)), x < 0);
  return minus(String(Number(x.toPrecision(4))));
};
const superscript = (n) => String(n).replace(/./g, (c) => (c === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[c]));
// A number given by its decimal logarithm.
const power = (log, negative = false) => {
  let exponent = Math.floor(log);
  let mantissa = (10 ** (log - exponent)).toFixed(2);
  if (mantissa === "10.00") [mantissa, exponent] = ["1.00", exponent + 1];
  return `${negative ? "\u2212" : ""}${mantissa}\u00b710${superscript(exponent)}`;
};
const fromLog = (log) => (log > -3 && log < 6 ? significant(10 ** log) : power(log));
const shapeOf = (shape) => (shape ? (shape[0] === 1 ? shape.slice(1) : shape).join("\u00d7") : "\u2013");
const counted = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

// ----------------------------------------------------------------------------------- elements

// Text is put in as text: nothing of a layer's name is ever parsed.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, given] of Object.entries(attributes)) {
    if (given !== null && given !== undefined && given !== false) made.setAttribute(name, given === true ? "" : given);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const facts = (list, entries) => list.replaceChildren(...entries.map(([term, text, small]) =>
  element("div", {}, element("dt", {}, term), element("dd", {}, text, small ? element("small", {}, ` ${small}`) : null))));
