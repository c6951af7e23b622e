// The panel of one entry: diagnosis, plots, records with their commands, environment and hashes.

const panel = el("dialog", { "aria-labelledby": "panel-title" });

/** What is packed beside an entry: its records as text, findings and worst cases. */
async function unpack(number) {
  const packed = document.getElementById(`details-${number}`).textContent;
  const bytes = Uint8Array.from(atob(packed), sign => sign.charCodeAt(0));
  const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  return JSON.parse(text);
}

async function showDetails(board, row, closed) {
  const heading = el("h2", { id: "panel-title" }, row.variant);
  const place = `${board.suite}, version ${board.version}, budget ${board.budget}, ${plural(row.seeds.length, "seed")}: ${row.seeds.join(", ")}`;
  const body = el("div", { class: "body" }, el("p", { class: "note" }, "Unpacking …"));
  panel.replaceChildren(
    el("header", null, el("div", null, heading, el("p", { class: "note" }, place), submitter(row.submitted)), el("button", { type: "button", click: () => panel.close() }, "Close")), body);
  panel.onclose = closed;
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
  try {
    const found = await unpack(row.details);
    const records = found.records.map(own => ({ ...own, ...(own.text ? JSON.parse(own.text) : { lost: true }) }));
    const told = records.filter(own => !own.lost);
    body.replaceChildren(diagnosis(found), ...certificates(told), ...sweeps(found.worst, told), ...transfers(told), ...papers(found.published, board, row), listing(records));
  } catch (error) {
    body.replaceChildren(el("p", { role: "alert" }, `The records of this entry cannot be shown: ${error}`));
  }
}

/** Who submitted an entry; only an address of the web becomes a link. */
function submitter(said) {
  if (!said) return null;
  const link = text => /^https?:\/\//.test(text) ? el("a", { href: text, rel: "noopener noreferrer nofollow" }, brief(text, 80)) : brief(text, 80);
  const told = ["paper", "code", "contact"].flatMap(name => [`; ${name}: `, link(said[name])]);
  return el("p", { class: "note" }, `${said.name}, submitted ${said.date}`, ...told);
}

function section(title, ...children) {
  return el("section", null, el("h3", null, title), ...children);
}

function diagnosis(found) {
  const words = found.status.map(([seed, word]) => el("p", null, statusChip(word), ` seed ${seed}: ${data.statuses[word] ?? ""}`));
  const kinds = [...Map.groupBy(found.findings, own => `${own.flags} ${own.kind} ${own.seed}`).values()].map(finding);
  return section("Diagnosis", ...words, ...(kinds.length ? kinds : [el("p", { class: "note" }, "No findings.")]));
}

/** Findings of one kind and seed, with their evidence. */
function finding(same) {
  const [first] = same;
  const told = same.flatMap(own => [el("p", null, brief(own.detail, 1000)), el("p", { class: "note" }, evidence(own.evidence))]);
  const title = el("p", null, el("b", null, first.kind), ` ${first.means || "for information"}, seed ${first.seed}`);
  const rest = told.length > 2 ? el("details", null, el("summary", null, `and ${same.length - 1} more`), told.slice(2)) : null;
  return el("div", { class: first.flags ? "finding flags" : "finding" }, title, told.slice(0, 2), rest);
}

function evidence({ images, count, ...rest }) {
  const facts = Object.entries(rest).map(([name, value]) => `${name}: ${brief([value].flat().map(own => typeof own === "object" ? JSON.stringify(own) : own).join(", "), 200)}`);
  if (Array.isArray(images) && images.length) facts.push(`images: ${brief(images.join(", "), 200)}${count > images.length ? ` and ${count - images.length} more` : ""}`);
  return facts.join("; ");
}

function finished(records, kind) {
  return records.filter(own => own.status === "success" && own.eval.fields.kind === kind);
}

/** Numbers of several seeds at each x: [[x, mean, lower, upper]], the interval only of one seed. */
function overSeeds(metrics, x) {
  const each = Map.groupBy(metrics.filter(own => own[x] != null), own => own[x]);
  const mean = own => own.reduce((sum, one) => sum + one.value, 0) / own.length;
  return [...each].sort((a, b) => a[0] - b[0]).map(([at, own]) => [at, mean(own), ...(own.length === 1 ? [own[0].lower, own[0].upper] : [null, null])]);
}

function certificates(records) {
  const each = Map.groupBy(finished(records, "certified"), own => own.eval.name);
  const series = [...each].map(([name, own]) => {
    const points = overSeeds(own.flatMap(one => one.metrics.filter(metric => metric.metric === "certified_accuracy")), "radius");
    const { estimator, sigma, n, alpha } = own[0].eval.fields;
    return { name: `${name}: ${estimator} estimator, σ = ${sigma}, n ≤ ${n}, α = ${alpha}`, points, step: true };
  }).filter(own => own.points.length);
  return series.length ? [section("Certified accuracy", linePlot("Certified accuracy against the ℓ₂ radius, in percent of all images", "radius", series))] : [];
}

function sweeps(worst, records) {
  const clean = overSeeds(finished(records, "clean").flatMap(own => own.metrics.filter(one => one.metric === "clean_accuracy").map(one => ({ ...one, eps: 0 }))), "eps");
  return [...Map.groupBy(worst, own => own.group.join(" "))].map(([, cases]) => {
    const [norm, of] = cases[0].group, known = NORMS[norm] ?? norm;
    const start = of ? [] : clean;
    const own = { name: "worst case", points: [...start, ...cases.map(({ eps, number }) => [eps, number[0], number[1], number[2]])] };
    const title = `Accuracy against ε, ${known}${of ? `, ${of}` : ""}`;
    const attacks = [...new Set(cases.flatMap(one => one.attacks))];
    return section(title, linePlot(`${title}, in percent of all images`, "ε", [own, ...singles(records, norm, of, start)]),
      el("p", { class: "note" }, `Worst case of: ${attacks.map(name => brief(name, 80)).join(", ")}.`));
  });
}

const NORMS = { linf: "ℓ∞", l2: "ℓ₂", l1: "ℓ₁" };

/** The sweep of every single evaluation of a norm on the network as it is, or under noise. */
function singles(records, norm, of, start) {
  const own = [...finished(records, "robust"), ...finished(records, "adaptive")].filter(one => one.eval.fields.norm === norm && noiseOf(one) === of);
  return [...Map.groupBy(own, one => one.eval.name)].map(([name, some]) => {
    const metrics = some.flatMap(one => one.metrics.filter(metric => metric.metric === "robust_accuracy" && metric.denominator !== "clean_correct"));
    return { name: brief(name, 40), points: [...start, ...overSeeds(metrics, "eps")] };
  }).filter(one => one.points.length > start.length);
}

function noiseOf(record) {
  const noise = record.eval.fields.noise || 0;
  if (!noise) return "";
  return noise === record.defense.fields?.sigma ? "smoothed" : `noise ${Number(noise.toPrecision(6))}`;
}

const OF = {
  all: "of all images", source_correct: "of the images that the source gets right", all_correct: "of the images that all members get right",
  successful_at_source: "of the images that fool their source",
};

function transfers(records) {
  const own = finished(records, "transfer");
  return [...Map.groupBy(own, one => one.eval.name)].map(([name, some]) => {
    const metrics = some.flatMap(one => one.metrics.filter(metric => metric.metric === "transfer_rate"));
    const names = [...new Set(metrics.map(one => one.source))];
    const eps = chosen("ε", [...new Set(metrics.map(one => one.eps))].map(value => [value, short(value)]));
    const of = chosen("share", Object.entries(OF).filter(([key]) => metrics.some(one => one.denominator === key)));
    const place = el("div");
    function draw() {
      const here = metrics.filter(one => String(one.eps) === eps.value && one.denominator === of.value);
      const rate = (source, target) => overSeeds(here.filter(one => one.source === source && one.target === target), "eps")[0]?.[1];
      place.replaceChildren(heatMap(`Percent that each target gets wrong of images crafted on each source, ${OF[of.value]}, ε = ${short(Number(eps.value))}`, names, rate));
    }
    for (const own of [eps, of]) own.addEventListener("change", draw);
    draw();
    return section(`Transfer between members (${brief(name, 40)})`, el("p", { class: "note" }, eps.parentNode, " ", of.parentNode), place);
  });
}

/** A labelled choice; the last but for two is the default, which for radii is a middle one. */
function chosen(label, options) {
  const select = el("select", null, options.map(([value, text]) => el("option", { value }, text)));
  select.value = options[Math.floor(options.length / 2)]?.[0] ?? "";
  el("label", null, `${label} `, select);
  return select;
}

/** What papers print, beside what was measured. */
function papers(published, board, row) {
  if (!published.length) return [];
  const lines = published.map(own => {
    const at = board.columns.findIndex(column => column.key === own.column), column = board.columns[at];
    return el("tr", null, el("th", { scope: "row", class: "name" }, own.what), el("td", null, `${own.printed} ${own.unit}`),
      el("td", null, column ? shown(row.cells[at][0], column) : ""), el("td", { class: "word", title: own.title }, own.where), el("td", { class: "prose" }, own.flag ? el("b", { class: "warn" }, `${own.flag}: `) : null, own.remark));
  });
  const head = el("tr", null, ["quantity", "published", "measured", "source", "remark"].map((name, at) => el("th", { scope: "col", class: { 0: "name", 3: "word", 4: "prose" }[at] }, name)));
  const reduced = board.budget === "paper" ? "" : " This budget is reduced: measured numbers are no reproduction of the paper's.";
  return [section("Published values", el("p", { class: "note" }, `As papers print them, whatever was measured here.${reduced}`),
    scrollable("Published values", el("table", { class: "published" }, el("thead", null, head), el("tbody", null, lines))))];
}

function listing(records) {
  return section(`Records (${records.length})`, ...records.map(own => own.lost ? lost(own) : record(own)));
}

function lost(own) {
  return el("p", { class: "record" }, `${brief(own.file)} is too large for this page; it is in the store.`);
}

function record(own) {
  const seconds = own.cost.seconds == null ? "" : `, ${Number(own.cost.seconds.toPrecision(3))} s${own.cost.measured_together > 1 ? ` for ${own.cost.measured_together} defenses` : ""}`;
  const facts = {
    command: el("code", { class: "command" }, command(own)),
    settings: pairs(own.eval.fields), defense: pairs(own.defense.fields ?? {}), training: pairs({ ...own.task, ...own.task.recipe, recipe: null, roles: null }),
    numerics: pairs(own.numerics), environment: environment(own.made), hashes: pairs(own.hashes), cost: pairs(own.cost),
  };
  const list = el("dl", null, Object.entries(facts).flatMap(([name, value]) => [el("dt", null, name), el("dd", null, value)]));
  const download = el("button", { type: "button", click: () => save(own) }, `Download record${own.whole ? "" : " (long texts cut)"}`);
  const told = own.metrics.length ? el("details", { toggle: event => tell(event.target, own) }, el("summary", null, `All ${plural(own.metrics.length, "number")}`)) : null;
  return el("details", { class: "record" }, el("summary", null, `${brief(own.eval.name, 80)}, seed ${own.seed} `, el("span", null, `${own.status}${seconds}`)),
    list, own.error ? el("pre", null, brief(own.error, 2000)) : null, told, el("p", null, download));
}

/** The numbers of a record, made when they are asked for. */
function tell(place, own) {
  if (place.childElementCount > 1) return;
  const names = ["metric", "value", "lower", "upper", "n", "unit", ...["eps", "radius", "members", "draws", "estimator", "denominator", "source", "target"].filter(name => own.metrics.some(one => one[name] != null))];
  const cell = value => typeof value === "number" ? String(Number(value.toPrecision(6))) : brief(value ?? "", 80);
  const rows = own.metrics.map(one => el("tr", null, names.map(name => name === "metric" ? el("th", { scope: "row", class: "name" }, cell(one[name])) : el("td", null, cell(one[name])))));
  place.append(scrollable("All numbers of the record", el("table", null, el("thead", null, el("tr", null, names.map(name => el("th", { scope: "col" }, name)))), el("tbody", null, rows))));
}

function pairs(fields) {
  const told = Object.entries(fields).filter(([, value]) => value != null && value.length !== 0 && !(typeof value === "object" && !Array.isArray(value)));
  return told.map(([name, value]) => `${name} ${brief(Array.isArray(value) ? value.join(", ") : value, 300)}`).join("; ") || "–";
}

function environment(made) {
  const code = made.commit ? `commit ${made.commit}${made.dirty ? " (changed)" : ""}` : "no commit";
  return [code, pairs(made.versions ?? {}), brief(made.device ?? "unknown device")].join("; ");
}

/** What makes the record again, quoted for a shell. */
function command(own) {
  const quoted = word => /^[\w@=,.+:/-]+$/.test(word) ? word : `'${String(word).replaceAll("'", `'\\''`)}'`;
  const words = ["--defense", own.defense.variant, "--suite", own.suite.name, "--budget", own.suite.budget, "--seeds", own.seed, "--only", own.eval.name];
  return ["bench run", ...words.map(quoted)].join(" ");
}

function save(own) {
  const url = URL.createObjectURL(new Blob([own.text], { type: "application/json" }));
  el("a", { href: url, download: own.file.replaceAll("/", "_") }).click();
  URL.revokeObjectURL(url);
}
