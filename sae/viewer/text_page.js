"use strict";
// All text from the model or its data goes through `element`, which adds it as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const parts = Object.fromEntries(["meta", "choice", "which", "space", "features", "text", "legend", "token", "where"]
  .map(id => [id, document.getElementById(id)]));
let text = data.texts[0];
let feature = text.features[0] ?? null;
let place = 0;

function element(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  for (const child of children) if (child !== null) node.append(child);
  return node;
}

const count = number => number.toLocaleString("en");
const rounded = number => number < 1000 ? number.toPrecision(3) : count(Math.round(number));
const percent = share => `${share >= 0.1 ? Math.round(share * 100) : Number((share * 100).toPrecision(2))} %`;
const SIGNS = {"\n": "↵", "\t": "→", "\r": "␍", " ": "·", "\u00a0": "⍽"};
const CONTROL = /[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
function visible(piece) {
  const signs = parts.space.checked ? /[\n\t\r \u00a0]/g : /[\n\t\r]/g;
  return (piece || "◌").replace(signs, sign => SIGNS[sign]).replace(CONTROL, "�");
}

const activations = one => new Map(one.a.map(([where, value]) => [where, value]));

function chooser(one) {
  const about = element("span", "about");
  if (one.d !== undefined) {
    about.append(one.d ? `on ${percent(one.d)} of tokens, usually ${rounded(one.m)} ` : "dead in the feature store");
    for (const piece of one.p) about.append(element("span", "tok", visible(piece)));
  }
  const amount = one.a.length ? `${rounded(one.x)}, ${count(one.a.length)} ${one.a.length === 1 ? "token" : "tokens"}` : "does not fire";
  const button = element("button", "", element("span", "number", String(one.i)), element("span", "amount", amount), about);
  button.type = "button";
  button.setAttribute("aria-pressed", String(one === feature));
  button.addEventListener("click", () => choose(one));
  return element("li", "", button);
}

function showFeatures() {
  parts.features.replaceChildren(...text.features.map(chooser));
  if (!text.features.length) parts.features.append(element("li", "hint", "No feature fires on this text."));
}

function showText() {
  const shown = feature ? activations(feature) : new Map();
  const masked = new Set(text.masked);
  parts.text.replaceChildren(...text.tokens.flatMap((piece, number) => {
    const activation = shown.get(number);
    const token = element("span", "", visible(piece));
    token.id = `token-${number}`;
    token.setAttribute("role", "option");
    if (masked.has(number)) { token.classList.add("masked"); token.title = "masked"; }
    if (activation !== undefined) {
      token.classList.add("fires");
      if (activation === feature.x) token.classList.add("peak");
      token.style.setProperty("--share", (0.12 + 0.88 * activation / feature.x).toFixed(3));
      token.title = rounded(activation);
      token.setAttribute("aria-label", `${visible(piece)}, ${rounded(activation)}`);
    }
    token.addEventListener("click", () => { place = number; showToken(); });
    return piece.includes("\n") ? [token, element("br")] : [token, element("wbr")];
  }));
  parts.legend.textContent = feature
    ? `Feature ${feature.i}: ${feature.a.length ? `up to ${rounded(feature.x)}` : "does not fire"}. ` +
      (text.masked.length ? `${count(text.masked.length)} of ${count(text.tokens.length)} tokens masked (struck through).` : "")
    : "";
}

function firing(label, index, value, most, one) {
  const button = element("button", "", label);
  button.type = "button";
  button.disabled = one === null;
  if (one === null) button.title = "not among the features of this page";
  button.addEventListener("click", index);
  const bar = element("span", "bar");
  bar.style.setProperty("--share", (value / most).toFixed(3));
  return element("li", "", button, element("span", "amount", rounded(value)), bar);
}

function showToken() {
  parts.text.querySelector(".chosen")?.removeAttribute("aria-selected");
  parts.text.querySelector(".chosen")?.classList.remove("chosen");
  const node = document.getElementById(`token-${place}`);
  node.classList.add("chosen");
  node.setAttribute("aria-selected", "true");
  parts.text.setAttribute("aria-activedescendant", node.id);
  const pairs = text.firing[place];
  const rest = text.fire[place] > pairs.length ? `; the ${pairs.length} strongest are shown` : "";
  const heading = element("p", "hint", `${place}: `, element("span", "tok", visible(text.tokens[place])),
    text.masked.includes(place) ? " masked: left out of training as such tokens were" : ` ${count(text.fire[place])} features fire${rest}`);
  const most = pairs.length ? pairs[0][1] : 1;
  const rows = pairs.map(([number, value]) => {
    const one = text.features.find(other => other.i === number) ?? null;
    return firing(String(number), () => choose(one), value, most, one);
  });
  parts.token.replaceChildren(heading, element("ol", "firing", ...rows));
}

function showWhere() {
  const list = element("ol", "firing");
  if (feature) {
    const strongest = [...feature.a].sort((one, other) => other[1] - one[1] || one[0] - other[0]).slice(0, 50);
    list.append(...strongest.map(([number, value]) =>
      firing(visible(text.tokens[number]), () => { place = number; showToken(); }, value, feature.x, feature)));
  }
  parts.where.replaceChildren(feature && feature.a.length ? list : element("p", "hint", "Nowhere in this text."));
}

function choose(one) {
  feature = one;
  parts.features.querySelectorAll("button").forEach((button, number) =>
    button.setAttribute("aria-pressed", String(text.features[number] === feature)));
  if (feature && feature.a.length) place = feature.a.reduce((best, pair) => pair[1] > best[1] ? pair : best)[0];
  showText();
  showToken();
  showWhere();
}

function showAll() {
  showFeatures();
  choose(feature);
}

parts.text.addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  place = Math.min(text.tokens.length - 1, Math.max(0, place + step));
  showToken();
  document.getElementById(`token-${place}`).scrollIntoView({block: "nearest"});
});
parts.space.addEventListener("change", showAll);
parts.which.addEventListener("change", () => {
  text = data.texts[Number(parts.which.value)];
  feature = text.features[0] ?? null;
  place = 0;
  showAll();
});
data.texts.forEach((one, number) => {
  const start = visible(one.tokens.filter((_, position) => !one.masked.includes(position)).slice(0, 8).join("")).trim();
  const option = element("option", "", `${number + 1}: ${start.slice(0, 40)}`);
  option.value = String(number);
  parts.which.append(option);
});
parts.choice.hidden = data.texts.length < 2;
parts.meta.textContent = `${data.hook} · ${count(data.d_sae)} features`;
showAll();
