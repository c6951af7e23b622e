// Elements and texts. What a record says becomes a text node, never markup.

const data = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes, ...children) {
  const node = tag === "svg" || svgTags.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child != null));
  return node;
}

const svgTags = new Set(["g", "path", "line", "circle", "rect", "polygon", "text"]);

/** A text, or its beginning and how long it is. */
function brief(text, longest = 400) {
  text = String(text);
  return text.length <= longest ? text : `${text.slice(0, longest)}… (${text.length.toLocaleString("en")} characters)`;
}

const DIGITS = { acr: 3, certified: 1, tsr: 1 };

/** A number of a column as text. */
function shown(value, column) {
  if (column.unit === "%") return (100 * value).toFixed(1);
  if (column.unit === "count") return counted(value);
  if (column.unit === "ms" || column.unit === "s") return `${Number(value.toPrecision(3))} ${column.unit}`;
  return value.toFixed(DIGITS[column.kind] ?? 3);
}

function counted(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(2)} M`;
  return value >= 1e3 ? `${(value / 1e3).toFixed(1)} k` : String(value);
}

/** The uncertainty of a cell as text: an interval over images, or a deviation over seeds. */
function spread([, lower, upper, deviation, seeds], column) {
  if (seeds > 1) return `± ${shown(deviation, column)}, ${seeds} seeds`;
  return lower == null || upper == null ? "" : `${shown(lower, column)} – ${shown(upper, column)}`;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function statusChip(word) {
  return el("span", { class: `status ${Object.hasOwn(data.statuses, word) ? word : ""}`, title: data.statuses[word] }, word);
}
