// One ranking as a table: which columns it has, its rows, their order.

/** Kinds of columns: [kind, what the chooser calls it, shown at first]. */
const CHOICES = [
  ["status", "Status", true], ["family", "Family", false], ["seeds", "Seeds", false], ["members", "Members", true], ["clean", "Clean accuracy", true],
  ["worst", "Worst case", true], ["adaptive", "Adaptive attacks", true], ["autoattack", "AutoAttack", true], ["attack", "Single attacks", false],
  ["acr", "Average certified radius", true], ["certified", "Certified accuracy", true], ["tsr", "Transfer (TSR)", true], ["parameters", "Parameters", true],
  ["forward_milliseconds", "Forward time, ms an image", true], ["training_seconds_per_epoch", "Training time an epoch", true], ["published", "Published values", true],
  ["every", "Every threat and radius", false], ["both", "Attacks and certificates in one table", false],
];

const OWN = {
  rank: { key: "rank", kind: "rank", label: "#", threat: "" }, name: { key: "name", kind: "name", label: "defense", threat: "" },
  status: { key: "status", kind: "status", label: "status", threat: "" }, family: { key: "family", kind: "family", label: "family", threat: "" },
  seeds: { key: "seeds", kind: "seeds", label: "seeds", threat: "" }, members: { key: "members", kind: "members", label: "members", threat: "" },
};

const ATTACKS = ["worst", "adaptive", "autoattack", "attack", "tsr"], CERTIFICATES = ["acr", "certified"], RADII = 6;

/** Columns of a table, that of the ranking first; a column of numbers carries its place in the cells. */
function columnsOf(board, table, ranking, kinds) {
  const filled = board.columns.map((column, at) => ({ ...column, at })).filter(({ at }) => table.rows.some(number => board.rows[number].cells[at]));
  const numbered = filled.filter(column => column.key === ranking?.key || wanted(column, board, table, ranking, kinds));
  const radii = numbered.filter(column => column.kind === "certified"), stride = kinds.has("every") ? 1 : Math.ceil(radii.length / RADII);
  const kept = numbered.filter(column => column.kind !== "certified" || radii.indexOf(column) % stride === 0 || column.key === ranking?.key);
  const [first, rest] = [kept.filter(column => column.key === ranking?.key), kept.filter(column => column.key !== ranking?.key)];
  return [OWN.rank, OWN.name, ...first, ...["status", "family", "seeds", "members"].filter(kind => kinds.has(kind)).map(kind => OWN[kind]), ...rest];
}

function wanted(column, board, table, ranking, kinds) {
  const certified = table.name.startsWith("certified");
  if (!kinds.has(column.kind)) return false;
  if (CERTIFICATES.includes(column.kind)) return certified ? column.of === table.of : kinds.has("both") && board.tables.filter(own => own.of).length === 1;
  if (!ATTACKS.includes(column.kind)) return true;
  if (certified && !kinds.has("both")) return false;
  if (kinds.has("every")) return true;
  if (column.kind === "tsr") return column.key === board.columns.findLast(own => own.kind === "tsr").key;
  const here = board.columns.find(own => own.key === ranking?.key)?.threat || board.columns.find(own => own.kind === "worst")?.threat;
  return column.threat === here || (column.kind === "worst" && groupOf(column.threat) === groupOf(here));
}

/** The norm and classifier of a threat in words, without its radius. */
function groupOf(threat) {
  const [ball, ...of] = (threat ?? "").split(", ");
  return [ball.split(" ")[0], ...of].join(", ");
}

function rankOf(row, ranking) {
  return ranking?.places[row]?.[0] ?? Infinity;
}

/** What a column sorts by: a number or a text; null stays last. */
function sortValue(board, table, ranking, column, number) {
  const row = board.rows[number];
  if (column.kind === "rank") return rankOf(number, ranking);
  if (column.kind === "name") return row.variant;
  if (column.kind === "status") return Object.keys(data.statuses).indexOf(table.status[number]);
  if (column.kind === "seeds") return row.seeds.length;
  if (column.at == null) return row[column.kind];
  return row.cells[column.at]?.[0] ?? null;
}

function sorted(board, table, ranking, columns, [key, direction]) {
  const column = columns.find(own => own.key === key) ?? OWN.rank;
  const sign = direction === "descending" ? -1 : 1, at = board.columns.findIndex(own => own.key === ranking?.key);
  const values = table.rows.map(number => [number, sortValue(board, table, ranking, column, number), board.rows[number].cells[at]?.[0] ?? -1]);
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a - b;
  return values.sort(([a, x, u], [b, y, v]) => {
    if ((x === null) !== (y === null)) return x === null ? 1 : -1;
    return (x === null || x === y ? 0 : sign * compare(x, y)) || v - u || board.rows[a].variant.localeCompare(board.rows[b].variant);
  }).map(([number]) => number);
}

/** Where the first click on a column sorts to: good numbers on top. */
function firstDirection(column) {
  const lower = ["rank", "name", "family", "status", "tsr", "parameters", "forward_milliseconds", "training_seconds_per_epoch"];
  return lower.includes(column.kind) ? "ascending" : "descending";
}

function headings(columns, [key, direction], sort) {
  return el("tr", null, columns.map(column => {
    const threat = column.threat ? el("span", { class: "over" }, column.threat) : null;
    const button = el("button", { type: "button", click: () => sort(column), "aria-label": column.kind === "rank" ? "rank" : null }, threat, el("span", null, brief(column.label, 40)));
    return el("th", { scope: "col", class: side(column), "aria-sort": column.key === key ? direction : "none" }, button);
  }));
}

function side(column) {
  return { rank: "rank", name: "name", status: "word", family: "word", members: "brief", seeds: "brief" }[column.kind] ?? "";
}

function rowOf(board, table, ranking, columns, number, kinds, open) {
  const row = board.rows[number];
  return el("tr", null, columns.map(column => {
    if (column.kind === "rank") return rankCell(ranking, number);
    if (column.kind === "name") return nameCell(row, open);
    if (column.kind === "status") return statusCell(table, row, number);
    if (column.kind === "family") return el("td", { class: "word" }, row.family);
    if (column.kind === "seeds") return el("td", null, String(row.seeds.length));
    if (column.kind === "members") return el("td", null, String(row.members));
    return numberCell(row, column, column.key === ranking?.key, kinds.has("published"));
  }));
}

function rankCell(ranking, number) {
  const [rank, tied] = ranking?.places[number] ?? [];
  const why = ranking?.without[number];
  return el("td", { class: "rank", title: rank ? null : why, "aria-label": rank ? `rank ${rank}${tied ? ", shared" : ""}` : `no rank${why ? `: ${why}` : ""}` }, rank ? `${rank}${tied ? "=" : ""}` : "–");
}

function nameCell(row, open) {
  const [name, ...fields] = row.variant.split("@");
  const more = [fields.join("@").replaceAll(",", ", "), row.submitted?.name, row.store ? "not committed" : ""].filter(Boolean).join("; ");
  return el("th", { scope: "row", class: "name" }, el("button", { type: "button", class: "open", click: open, "aria-haspopup": "dialog" }, name || row.variant), more ? el("span", { class: "more" }, more) : null);
}

function statusCell(table, row, number) {
  const notes = [table.findings[number] ? plural(table.findings[number], "finding") : "", ...row.unfinished.length ? [plural(row.unfinished.length, "evaluation") + " without result"] : []];
  return el("td", { class: "word" }, statusChip(table.status[number]), el("span", { class: "small", title: row.unfinished.join(", ") }, notes.filter(Boolean).join(", ")));
}

function numberCell(row, column, ranked, published) {
  const cell = row.cells[column.at];
  if (!cell) return el("td", { "aria-label": "not measured" });
  const claims = published ? row.claims.filter(([at]) => at === column.at) : [];
  return el("td", { class: ranked ? "lead-cell" : null }, ranked ? el("b", null, shown(cell[0], column)) : shown(cell[0], column), ranked && column.unit === "%" ? whisker(cell) : null,
    el("span", { class: "small" }, spread(cell, column)), claims.map(([, claim]) => claimed(claim, column)));
}

/** A published number, with what is wrong with it. */
function claimed([value, source, flag], column) {
  return el("span", { class: "small claim", title: source }, `paper ${shown(value, column)}`, flag ? el("span", { class: "warn" }, ` ${flag}`) : null);
}

/** Value and interval on a line from 0 to 100 %. */
function whisker([value, lower, upper, deviation]) {
  const bar = el("i"), dot = el("b");
  const low = Math.max(0, lower ?? value - (deviation ?? 0)), high = Math.min(1, upper ?? value + (deviation ?? 0));
  bar.style.left = `${100 * low}%`;
  bar.style.width = `${100 * (high - low)}%`;
  dot.style.left = `${100 * value}%`;
  return el("span", { class: "whisker", "aria-hidden": "true" }, bar, dot);
}
