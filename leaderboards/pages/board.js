// The page: what is chosen, what of it the address keeps, and which rows are shown.

const SELECTS = ["threat", "dataset", "family", "status", "budget"];
const CERTIFIED = "ℓ₂ certificates", AT_ONCE = 60;
const live = el("p", { class: "count", role: "status" });
const empty = el("p", { class: "empty" }, "Nothing matches. ", el("button", { type: "button", click: reset }, "Reset filters"));
let view = fresh();

function fresh() {
  return { q: "", threat: "", dataset: "", family: "", status: "", budget: "", kinds: new Set(CHOICES.filter(own => own[2]).map(own => own[0])), sort: new Map(), by: new Map(), row: "" };
}

// The address

function addressOf(own) {
  const words = new URLSearchParams();
  for (const name of ["q", ...SELECTS, "row"]) if (own[name]) words.set(name, own[name]);
  for (const [kind, , first] of CHOICES) if (own.kinds.has(kind) !== first) words.append(first ? "hide" : "show", kind);
  for (const [table, [key, direction]] of own.sort) words.append("sort", [table, key, direction].join("~"));
  for (const [table, key] of own.by) words.append("by", [table, key].join("~"));
  return words.toString();
}

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1)), own = fresh();
  for (const name of ["q", ...SELECTS, "row"]) own[name] = words.get(name) ?? "";
  for (const kind of words.getAll("hide")) own.kinds.delete(kind);
  for (const kind of words.getAll("show")) own.kinds.add(kind);
  for (const [table, key, direction] of words.getAll("sort").map(text => text.split("~"))) own.sort.set(table, [key, direction === "ascending" ? direction : "descending"]);
  for (const [table, key] of words.getAll("by").map(text => text.split("~"))) own.by.set(table, key);
  return own;
}

function keep() {
  history.replaceState(null, "", `#${addressOf(view)}`);
}

// Boards and tables

const boards = data.boards.map((board, number) => {
  const twins = data.boards.filter(own => own.suite === board.suite && own.version === board.version && own.budget === board.budget);
  const name = [board.suite, board.version, board.budget, ...(twins.length > 1 ? [board.data] : [])].join("/");
  const tables = board.tables.map(table => {
    const id = `${name}/${table.name}`, box = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${board.suite}: ${table.title}` });
    const note = el("p", { class: "note" }, table.note);
    const choice = el("select", { change: event => { view.by.set(id, event.target.value); keep(); draw(); } });
    const heading = el("header", null, el("h3", null, table.title), note, table.rankings.length ? el("label", null, "Ranked by", choice) : null);
    return { ...table, id, box, note, choice, drawn: "", node: el("section", { class: "ranking" }, heading, box) };
  });
  const head = [el("h2", null, board.suite), factsOf(board)];
  return { ...board, name, number, tables, node: el("section", { class: "board", id: `board-${number}` }, head, tables.map(own => own.node)) };
});

function factsOf(board) {
  const reduced = board.budget === "paper" ? "published size" : "reduced";
  const facts = [board.dataset, `version ${board.version}`, `budget ${board.budget} (${reduced})`, board.architecture, board.train_images && `${board.train_images} training images`, board.epochs && `${board.epochs} epochs`].filter(Boolean).join(" · ");
  return el("p", { class: "facts" }, `${facts} · `, el("span", { class: /re-encoding/.test(board.data) ? "warn" : "" }, board.data));
}

/** What a table is ranked by: as chosen, else its default, else the first of the threat that is filtered for. */
function rankingOf(table) {
  const allowed = table.rankings.filter(own => !view.threat || table.name !== "attack" || groupOf(own.label) === view.threat);
  return [allowed.find(own => own.key === view.by.get(table.id)) ?? allowed[0], allowed];
}

function isShown(board, table) {
  if ((view.dataset && board.dataset !== view.dataset) || (view.budget && board.budget !== view.budget)) return false;
  if (!view.threat) return true;
  return view.threat === CERTIFIED ? table.name.startsWith("certified") : table.name === "attack" && rankingOf(table)[1].length > 0;
}

function matches(board, table, number) {
  const row = board.rows[number];
  if ((view.family && row.family !== view.family) || (view.status && table.status[number] !== view.status)) return false;
  return view.q.toLowerCase().split(/\s+/).every(word => [row.variant, row.family, row.submitted?.name ?? "", board.suite, board.dataset].some(text => text.toLowerCase().includes(word)));
}

/** Fill a table anew if its columns or what ranks it changed; then show the rows that match, in their order. */
function drawTable(board, table) {
  const [ranking, allowed] = rankingOf(table), columns = columnsOf(board, table, ranking, view.kinds);
  const order = view.sort.get(table.id) ?? ["rank", "ascending"], drawn = [ranking?.key, ...view.kinds].join(" ");
  if (table.drawn !== drawn) {
    Object.assign(table, { drawn, lines: new Map(), body: el("tbody") });
    table.choice.replaceChildren(...allowed.map(own => el("option", { value: own.key, selected: own === ranking }, own.label)));
    table.box.replaceChildren(el("table", null, el("thead"), table.body));
  }
  table.box.firstChild.tHead.replaceChildren(headings(columns, order, column => sort(board, table, column)));
  const hits = sorted(board, table, ranking, columns, order).filter(number => matches(board, table, number));
  fill(table, hits, number => rowOf(board, table, ranking, columns, number, view.kinds, () => open(board, number)));
  table.node.hidden = !hits.length;
  return hits.length;
}

/** Put rows into a table: a screenful at once, the others in the moments after, so that nobody waits for a thousand. */
function fill(table, numbers, make) {
  const line = number => table.lines.get(number) ?? table.lines.set(number, make(number)).get(number);
  clearTimeout(table.timer);
  table.body.replaceChildren(...numbers.slice(0, AT_ONCE).map(line));
  function more(from) {
    if (from >= numbers.length) return;
    table.body.append(...numbers.slice(from, from + 2 * AT_ONCE).map(line));
    table.timer = setTimeout(more, 0, from + 2 * AT_ONCE);
  }
  table.timer = setTimeout(more, 30, AT_ONCE);
}

function sort(board, table, column) {
  const [key, direction] = view.sort.get(table.id) ?? ["rank", "ascending"];
  const other = direction === "ascending" ? "descending" : "ascending";
  const place = [...table.box.querySelectorAll("thead button")].indexOf(document.activeElement);
  view.sort.set(table.id, [column.key, key === column.key ? other : firstDirection(column)]);
  drawTable(board, table);
  table.box.querySelectorAll("thead button")[place]?.focus();
  keep();
}

function draw() {
  let count = 0, total = 0;
  for (const board of boards) {
    let own = 0;
    for (const table of board.tables) {
      total += table.rows.length;
      table.node.hidden = !isShown(board, table);
      if (!table.node.hidden) own += drawTable(board, table);
    }
    board.node.hidden = !own;
    count += own;
  }
  live.textContent = count === total ? plural(total, "row") : `${count} of ${plural(total, "row")}`;
  empty.hidden = count > 0 || !total;
}

function open(board, number) {
  view.row = `${board.name}:${board.rows[number].store}:${board.rows[number].variant}`;
  keep();
  showDetails(board, board.rows[number], () => { view.row = ""; keep(); });
}

function openAddressed() {
  for (const board of boards) {
    const number = board.rows.findIndex(row => view.row === `${board.name}:${row.store}:${row.variant}`);
    if (number >= 0) return open(board, number);
  }
  if (panel.open) panel.close();
}

// Controls

const search = el("input", { type: "search", placeholder: "defense or suite", input: () => change("q", search.value.trim()) });
const choices = Object.fromEntries(SELECTS.map(name => [name, el("select", { change: event => change(name, event.target.value) })]));
const boxes = new Map(CHOICES.map(([kind]) => [kind, el("input", { type: "checkbox", change: event => { view.kinds[event.target.checked ? "add" : "delete"](kind); keep(); draw(); } })]));

function change(name, value) {
  view[name] = value;
  keep();
  draw();
}

function optionsOf(name) {
  if (name === "threat") {
    const attacks = boards.flatMap(board => board.tables.filter(own => own.name === "attack").flatMap(own => own.rankings.map(one => groupOf(one.label))));
    return [...new Set(attacks), ...(boards.some(board => board.tables.some(own => own.of)) ? [CERTIFIED] : [])];
  }
  if (name === "status") return Object.keys(data.statuses);
  return [...new Set(boards.flatMap(board => name === "family" ? board.rows.map(row => row.family) : [board[name]]))].filter(Boolean).sort();
}

function controls() {
  const labels = { threat: "Threat", dataset: "Data set", family: "Family", status: "Status", budget: "Budget" };
  const selects = SELECTS.map(name => {
    choices[name].append(el("option", { value: "" }, "any"), ...optionsOf(name).map(value => el("option", { value }, value)));
    return el("label", null, labels[name], choices[name]);
  });
  const chooser = el("details", { class: "chooser", keydown: event => { if (event.key === "Escape") { event.currentTarget.open = false; event.currentTarget.firstChild.focus(); } } },
    el("summary", null, "Columns"), el("fieldset", null, el("legend", null, "Columns of the tables"), CHOICES.map(([kind, text]) => el("label", null, boxes.get(kind), text))));
  document.addEventListener("click", event => { if (!chooser.contains(event.target)) chooser.open = false; });
  return el("div", { class: "bar", role: "search" }, el("label", null, "Search", search), selects, chooser, el("button", { type: "button", click: reset }, "Reset"), live);
}

function showChoices() {
  search.value = view.q;
  for (const name of SELECTS) choices[name].value = view[name];
  for (const [kind, box] of boxes) box.checked = view.kinds.has(kind);
}

function reset() {
  view = fresh();
  keep();
  showChoices();
  draw();
}

const THEMES = ["system", "light", "dark"];

function themes() {
  const button = document.getElementById("theme");
  function show(name) {
    document.documentElement.toggleAttribute("data-theme", name !== "system");
    if (name !== "system") document.documentElement.setAttribute("data-theme", name);
    button.textContent = `Theme: ${name}`;
    button.value = name;
  }
  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch { /* a browser may keep nothing for files */ }
  show(THEMES.includes(kept) ? kept : "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    show(THEMES[(THEMES.indexOf(button.value) + 1) % THEMES.length]);
    try { localStorage.setItem("theme", button.value); } catch { /* then it lasts until the page is left */ }
  });
}

function start() {
  themes();
  document.getElementById("statuses").open = innerWidth > 704;
  if (!boards.length) return;
  const main = document.getElementById("boards");
  document.body.append(panel);
  main.before(controls());
  view = readAddress();
  showChoices();
  draw();
  main.replaceChildren(empty, ...boards.map(board => board.node));
  openAddressed();
  addEventListener("hashchange", () => { view = readAddress(); showChoices(); draw(); openAddressed(); });
}

start();
