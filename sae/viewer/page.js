"use strict";
// All text from the model or its data goes through `element`, which adds it as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byIndex = new Map(data.features.map(feature => [feature.i, feature]));
const controls = Object.fromEntries(["search", "sort", "dead", "space", "found", "list", "feature", "meta"]
  .map(id => [id, document.getElementById(id)]));
const items = new Map();
let order = [];
let current = null;

function element(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  for (const child of children) if (child !== null) node.append(child);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";
function drawing(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const isDead = feature => feature.c === undefined;
const count = number => number.toLocaleString("en");
const digits = number => Number(number.toPrecision(3)).toLocaleString("en", {maximumSignificantDigits: 3});
const rounded = number => number < 1000 ? number.toPrecision(3) : count(Math.round(number));
const percent = share => `${share >= 0.1 ? Math.round(share * 100) : Number((share * 100).toPrecision(2))} %`;

const SIGNS = {"\n": "↵", "\t": "→", "\r": "␍", " ": "·", "\u00a0": "⍽"};
const CONTROL = /[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
function visible(text) {
  const signs = controls.space.checked ? /[\n\t\r \u00a0]/g : /[\n\t\r]/g;
  return (text || "◌").replace(signs, sign => SIGNS[sign]).replace(CONTROL, "�");
}

function tokenChip(text) {
  return element("span", "tok", /^ +$/.test(text) ? "·".repeat(text.length) : visible(text));
}

function pieces(text, lengths) {
  const tokens = [];
  let place = 0, length = 0;
  for (const letter of lengths) {
    if (letter === "-") { length += data.lengths.length - 1; continue; }
    length += data.lengths.indexOf(letter);
    tokens.push(text.slice(place, place + length));
    place += length;
    length = 0;
  }
  return tokens;
}

function contextText(feature, [, , , position, text, lengths, firing]) {
  const activations = new Map();
  for (let place = 0; place < firing.length; place += 2) activations.set(firing[place], firing[place + 1]);
  const line = element("div", "text");
  pieces(text, lengths).forEach((piece, place) => {
    const activation = activations.get(place);
    if (activation === undefined) {
      if (piece) line.append(...marked(piece));
      return;
    }
    const token = element("span", place === position ? "fires peak" : "fires", ...marked(piece || "◌"));
    token.style.setProperty("--share", (0.12 + 0.88 * Math.min(1, activation / feature.x)).toFixed(3));
    token.title = rounded(activation);
    line.append(token);
  });
  return line;
}

function marked(piece) {
  return visible(piece).split(/([↵→␍·⍽]+)/).filter(Boolean)
    .flatMap(part => /^[↵→␍·⍽]/.test(part) ? [element("span", "sign", part), element("wbr")] : [part]);
}

function exampleList(title, note, feature, examples) {
  const rows = examples.map(example => {
    const where = element("span", "where", element("bdi", "", data.documents[example[1]]));
    where.title = `${data.documents[example[1]]}, row ${count(example[2])}`;
    return element("li", "", element("span", "value", rounded(example[0])), contextText(feature, example), where);
  });
  const heading = element("h3", "", element("b", "", title), note);
  return element("section", "examples", heading, element("ol", "", ...rows));
}

function histogram([edges, counts]) {
  const width = 300, height = 74, base = 58, step = width / counts.length, most = Math.max(...counts);
  const label = `Histogram of ${counts.length} bins from ${digits(edges[0])} to ${digits(edges.at(-1))}`;
  const image = drawing("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label});
  counts.forEach((number, bin) => {
    const tall = number ? Math.max(1, number / most * (base - 4)) : 0;
    const bar = drawing("rect", {x: bin * step + 0.5, y: base - tall, width: Math.max(0.5, step - 1), height: tall, rx: 1});
    bar.append(drawing("title", {}, `${digits(edges[bin])} – ${digits(edges[bin + 1])}: ${count(number)}`));
    image.append(bar);
  });
  image.append(drawing("line", {x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5}));
  const middle = Math.floor(counts.length / 2);
  image.append(drawing("text", {x: 0, y: height - 2}, digits(edges[0])));
  if (counts.length > 3) image.append(drawing("text", {x: middle * step, y: height - 2, "text-anchor": "middle"}, digits(edges[middle])));
  image.append(drawing("text", {x: width, y: height - 2, "text-anchor": "end"}, digits(edges.at(-1))));
  return image;
}

function statsCard(feature) {
  const rows = [
    ["density", percent(feature.d)],
    ["fires on", feature.d > 0.5 ? "most tokens" : `1 in ${count(Math.round(1 / feature.d))} tokens`],
    ["firings", count(feature.c)], ["max", rounded(feature.x)], ["mean", rounded(feature.m)],
  ];
  const list = element("dl", "stats", ...rows.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
  return element("section", "card", element("h3", "", "Activations"), list,
    element("figure", "", histogram(feature.h), element("figcaption", "", "firings by activation, log scale")));
}

function logitList(entries, kind) {
  const rows = [];
  for (let place = 0; place < entries.length; place += 2) {
    const value = (entries[place + 1] > 0 ? "+" : "") + entries[place + 1].toFixed(2).replace("-", "−");
    rows.push(element("li", "", tokenChip(entries[place]), element("span", kind, value)));
  }
  return element("ol", "", ...rows);
}

function logitsCard(feature) {
  if (!feature.u) return element("section", "card wide", element("h3", "", "Logits"),
    element("p", "dim", "Unknown: this hook point is not in the residual stream, or the store was made without a model."));
  const column = (title, entries, kind) => element("div", "", element("h3", "", title), logitList(entries, kind));
  return element("section", "card wide", element("div", "logits",
    column("Raises next token", feature.u, "up"), column("Lowers next token", feature.l, "down")));
}

function neighboursCard(feature) {
  const rows = feature.n.map(([index, cosine, dead]) => {
    const name = byIndex.has(index) ? element("a", "", String(index)) : element("span", "", String(index));
    if (byIndex.has(index)) name.href = `#${index}`;
    return element("li", "", name, element("span", "dim", `${dead ? "dead  " : ""}${cosine.toFixed(2).replace("-", "−")}`));
  });
  return element("section", "card", element("h3", "", "Nearest by cosine"), element("ol", "near", ...rows));
}

function effectCard(feature) {
  const rows = feature.e.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value.replace("-", "−"))));
  return element("section", "card effect", element("h3", "", `Effect on the model, ${data.changed}, nats`), element("dl", "", ...rows));
}

function showFeature(feature) {
  const head = element("header", "head", element("h2", "", `Feature ${feature.i}`));
  const parts = [head];
  if (feature.w) head.append(element("span", "label", visible(feature.w)));
  if (isDead(feature)) {
    head.append(element("span", "badge", "dead"));
    parts.push(element("div", "overview", logitsCard(feature), neighboursCard(feature)));
    if (feature.e) parts.push(effectCard(feature));
    parts.push(element("p", "empty", `It never fired in ${count(data.tokens)} tokens, so there are no examples.`));
  } else {
    head.append(...feature.p.map(tokenChip));
    parts.push(element("div", "overview", statsCard(feature), logitsCard(feature), neighboursCard(feature)));
    if (feature.e) parts.push(effectCard(feature));
    parts.push(exampleList("Strongest", " · one per document", feature, feature.t));
    feature.q.forEach((examples, number) => {
      const share = 100 / feature.q.length, low = Math.round(100 - (number + 1) * share), high = Math.round(100 - number * share);
      const range = examples.length ? ` · ${rounded(examples.at(-1)[0])} to ${rounded(examples[0][0])}` : "";
      if (examples.length) parts.push(exampleList(`${low}–${high} %`, ` of non-zero activations, random${range}`, feature, examples));
    });
  }
  controls.feature.replaceChildren(...parts);
  controls.feature.scrollTop = 0;
}

// Tokens that the feature fires on, strongest first, then those it raises and those it lowers; in lower case.
function tokensOf(feature) {
  if (feature.tokens) return feature.tokens;
  const logits = [feature.u, feature.l].flatMap(entries => (entries ?? []).filter((_, place) => place % 2 === 0));
  const fires = new Set([...feature.p ?? [], ...firingTokens(feature).flatMap(tokens => [...tokens])]);
  return feature.tokens = [[...fires], logits].map(tokens => tokens.map(token => token.toLowerCase()));
}

// For each example, strongest and random ones, the tokens on which the feature fires.
function firingTokens(feature) {
  return feature.firing ??= [...feature.t ?? [], ...(feature.q ?? []).flat()].map(([, , , position, text, lengths, firing]) => {
    const tokens = pieces(text, lengths);
    return new Set([position, ...firing.filter((_, place) => place % 2 === 0)].map(place => tokens[place]));
  });
}

function matcher(query, kind) {
  const wording = query.toLowerCase(), bare = wording === wording.trim();
  const fits = [token => token === wording, token => token.startsWith(wording), token => token.includes(wording)][kind];
  return token => fits(bare ? token.toLowerCase().trim() : token.toLowerCase());
}

// How well a feature matches a query; 0 is best. An equal number comes first, then labels that have it, then tokens that
// equal the query, that begin with it and that contain it; each time tokens the feature fires on before those it raises
// or lowers, stronger ones first. Spaces around a token count only if the query has them.
const NO_MATCH = 99;
function distance(feature, query) {
  if (!query.trim()) return 0;
  const number = query.trim().replace(/^#/, "");
  if (/^\d+$/.test(number) && String(feature.i) === number) return 0;
  if (feature.w?.toLowerCase().includes(query.trim().toLowerCase())) return 0.5;
  for (const kind of [0, 1, 2])
    for (const [place, tokens] of tokensOf(feature).entries()) {
      const rank = tokens.findIndex(matcher(query, kind));
      if (rank >= 0) return 1 + 2 * kind + place + rank / (tokens.length + 1);
    }
  return /^\d+$/.test(number) && String(feature.i).startsWith(number) ? 7 : NO_MATCH;
}

// Why a feature matches a query, as one line.
function why(feature, query) {
  if (!query.trim() || distance(feature, query) === NO_MATCH) return "";
  const reasons = [];
  for (const kind of [0, 1, 2]) {
    const fits = matcher(query, kind), examples = firingTokens(feature);
    const firing = examples.map(tokens => [...tokens].find(fits)).filter(token => token !== undefined);
    const logit = entries => (entries ?? []).filter((_, place) => place % 2 === 0).find(fits);
    if (firing.length) reasons.push(`fires on '${visible(firing[0])}' in ${firing.length} of ${examples.length} examples`);
    for (const [verb, entries] of [["promotes", feature.u], ["suppresses", feature.l]])
      if (logit(entries) !== undefined) reasons.push(`${verb} '${visible(logit(entries))}'`);
    if (reasons.length) break;
  }
  return reasons.join("; ");
}

function item(feature) {
  if (items.has(feature.i)) return items.get(feature.i);
  const peek = isDead(feature) ? element("span", "dim", "dead") : element("span", "peek", ...feature.p.map(tokenChip));
  if (feature.w) peek.prepend(element("span", "label", visible(feature.w)));
  const link = element("a", "", element("span", "number", String(feature.i)), peek, element("span", "amount"), element("span", "why"));
  link.href = `#${feature.i}`;
  items.set(feature.i, element("li", "", link));
  return items.get(feature.i);
}

function refreshList() {
  const key = controls.sort.value, query = controls.search.value;
  const sign = key === "i" ? 1 : -1;
  const fit = new Map(data.features.map(feature => [feature, distance(feature, query)]));
  order = data.features.filter(feature => (controls.dead.checked || !isDead(feature)) && fit.get(feature) < NO_MATCH);
  order.sort((a, b) => isDead(a) - isDead(b) || fit.get(a) - fit.get(b) || sign * ((a[key] ?? 0) - (b[key] ?? 0)) || a.i - b.i);
  controls.list.replaceChildren(...order.map(feature => {
    const row = item(feature);
    row.querySelector(".amount").textContent = isDead(feature) ? "" : key === "x" || key === "m" ? rounded(feature[key]) : percent(feature.d);
    row.querySelector(".why").textContent = why(feature, query);
    return row;
  }));
  const dead = data.features.filter(isDead).length;
  const hidden = dead && !controls.dead.checked ? `, ${count(dead)} dead hidden` : "";
  const onPage = data.features.length < data.d_sae ? `, on this page of ${count(data.d_sae)}` : "";
  controls.found.textContent = `${count(order.length)} of ${count(data.features.length)} features${onPage}${hidden}`;
}

function markCurrent(scroll) {
  controls.list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  const row = current && items.get(current.i);
  if (!row) return;
  row.firstChild.setAttribute("aria-current", "true");
  if (scroll) row.scrollIntoView({block: "nearest"});
}

function openFromAddress() {
  const address = decodeURIComponent(location.hash.slice(1));
  const feature = address === "" ? order[0] ?? data.features[0] : byIndex.get(Number(address));
  current = feature ?? null;
  document.title = feature ? `${feature.i} · ${data.title}` : data.title;
  if (feature) showFeature(feature);
  else controls.feature.replaceChildren(element("p", "empty", address ? `Feature ${address} is not on this page.` : "There are no features on this page."));
  markCurrent(true);
}

function move(step) {
  const place = order.indexOf(current);
  const next = order[place < 0 ? 0 : Math.min(order.length - 1, Math.max(0, place + step))];
  if (next && next !== current) location.hash = String(next.i);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { document.activeElement.blur(); return; }
  if (/^(INPUT|SELECT)$/.test(event.target.tagName) && event.target.type !== "checkbox") {
    if (event.target === controls.search && event.key === "Enter" && order.length) location.hash = String(order[0].i);
    return;
  }
  if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
  else if (event.key === "/") { event.preventDefault(); controls.search.focus(); }
});
for (const [name, event] of [["search", "input"], ["sort", "change"], ["dead", "change"]])
  controls[name].addEventListener(event, () => { refreshList(); markCurrent(false); });
controls.space.addEventListener("change", () => { items.clear(); refreshList(); openFromAddress(); });
window.addEventListener("hashchange", openFromAddress);

controls.meta.textContent = [data.model, data.hook, `${count(data.tokens)} tokens`].filter(Boolean).join(" · ");
refreshList();
openFromAddress();
