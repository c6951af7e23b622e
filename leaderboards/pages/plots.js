// Line plots and heat maps, drawn from records; each with a table of its numbers.

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#a6761d", "#66a61e", "#7570b3"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const HEIGHT = 300, LEFT = 48, RIGHT = 12, TOP = 12, BOTTOM = 40;
// As wide as the panel allows when the page opens, so that no text is scaled down on a phone.
const WIDTH = Math.max(280, Math.min(760, innerWidth - 40));

/**
 * Percentages against a radius. Series: {name, points: [[x, value, lower, upper]], step}; the first is drawn on top.
 * The plot takes the focus: the arrow keys walk along the radii, and the numbers there are read out.
 */
function linePlot(caption, xLabel, series) {
  const xs = [...new Set(series.flatMap(own => own.points.map(point => point[0])))].sort((a, b) => a - b);
  const largest = xs.at(-1) || 1;
  const x = value => LEFT + (WIDTH - LEFT - RIGHT) * value / largest;
  const y = value => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value);
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", tabindex: "0", "aria-label": `${caption}. Arrow keys read the numbers.` });
  svg.append(...axes(xs, x, y, xLabel));
  series.map((own, place) => [own, place]).reverse().forEach(([own, place]) => svg.append(...curve(own, place, x, y)));
  const cursor = el("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const reading = el("p", { class: "reading", "aria-live": "polite" }, "Point at the plot, or focus it and use the arrow keys, to read numbers.");
  let at = -1;
  function read(place) {
    at = Math.max(0, Math.min(xs.length - 1, place));
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(xs[at]));
    cursor.setAttribute("visibility", "visible");
    const told = series.flatMap(own => own.points.filter(point => point[0] === xs[at]).map(point => `${own.name} ${percent(point[1])}`));
    reading.textContent = `${xLabel} ${short(xs[at])}: ${told.join(", ")}`;
  }
  svg.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { read(at + step); event.preventDefault(); }
  });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), value = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * largest;
    read(xs.reduce((best, own, place) => Math.abs(own - value) < Math.abs(xs[best] - value) ? place : best, 0));
  });
  return el("figure", null, el("figcaption", null, caption), svg, reading, legend(series), numbersTable(xLabel, xs, series));
}

function axes(xs, x, y, xLabel) {
  const parts = [];
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    parts.push(el("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, `${100 * value}${value === 1 ? " %" : ""}`));
  }
  let last = -100;
  for (const value of xs) {
    if (x(value) - last < 40) continue;
    last = x(value);
    parts.push(el("text", { x: last, y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, short(value)));
  }
  parts.push(el("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xLabel));
  return parts;
}

function curve(own, place, x, y) {
  const points = own.points, colour = COLOURS[place % COLOURS.length];
  const line = points.map(([at, value], number) => {
    if (!number) return `M${x(at)} ${y(value)}`;
    // What is certified at a radius is certified at every smaller one: the curve falls behind the radius before.
    return (own.step ? `L${x(points[number - 1][0])} ${y(value)}` : "") + `L${x(at)} ${y(value)}`;
  }).join("");
  const parts = points.filter(point => point[2] != null && place === 0).map(([at, , lower, upper]) =>
    el("line", { x1: x(at), x2: x(at), y1: y(lower), y2: y(upper), stroke: colour, "stroke-opacity": 0.45, "stroke-width": 5 }));
  parts.push(el("path", { d: line, fill: "none", stroke: colour, "stroke-width": place ? 1.75 : 2.5, "stroke-dasharray": dash(place) }));
  parts.push(...points.map(([at, value]) => el("circle", { cx: x(at), cy: y(value), r: place ? 2.5 : 3.5, fill: colour })));
  return parts;
}

function dash(place) {
  return DASHES[place % DASHES.length];
}

function legend(series) {
  return el("ul", { class: "legend", "aria-hidden": "true" }, series.map((own, place) => el("li", null,
    el("svg", { viewBox: "0 0 36 12" }, el("line", { x1: 0, x2: 36, y1: 6, y2: 6, stroke: COLOURS[place % COLOURS.length], "stroke-width": place ? 2 : 3, "stroke-dasharray": dash(place) })),
    own.name)));
}

function numbersTable(xLabel, xs, series) {
  const head = el("tr", null, el("th", { scope: "col", class: "name" }, xLabel), xs.map(value => el("th", { scope: "col" }, short(value))));
  const rows = series.map(own => el("tr", null, el("th", { scope: "row", class: "name" }, own.name), xs.map(value => {
    const point = own.points.find(one => one[0] === value);
    return el("td", null, point ? percent(point[1]) : "");
  })));
  return el("details", null, el("summary", null, "As a table"), scrollable("The plot as a table, percent", el("table", null, el("thead", null, head), el("tbody", null, rows))));
}

/** A table that scrolls by itself where it is too wide, also by keyboard. */
function scrollable(label, table) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}

/** Numbers of sources (rows) and targets (columns): share(source, target) is in [0,1] or null. */
function heatMap(caption, names, share) {
  const head = el("tr", null, el("th", { scope: "col", class: "name" }, "crafted on"), names.map(name => el("th", { scope: "col", class: "heat" }, name)));
  const rows = names.map(source => el("tr", null, el("th", { scope: "row", class: "name" }, source), names.map(target => {
    const value = share(source, target);
    const cell = el("td", { class: "heat" }, value == null ? "–" : percent(value));
    cell.style.setProperty("--share", `${Math.round(100 * (value ?? 0))}%`);
    return cell;
  })));
  return el("figure", null, el("figcaption", null, caption), scrollable(caption, el("table", null, el("thead", null, head), el("tbody", null, rows))));
}

function percent(value) {
  return (100 * value).toFixed(1);
}

/** 0.25 as it is, 0.0313725 as 8/255. */
function short(value) {
  const parts = Math.round(255 * value);
  return parts > 0 && Math.abs(255 * value - parts) < 1e-4 && String(Number(value.toPrecision(6))).length > 6 ? `${parts}/255` : String(Number(value.toPrecision(4)));
}
