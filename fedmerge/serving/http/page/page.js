"use strict";
// State: the history that is put together here, and the key, both in this tab's memory alone. What the server answers
// becomes text, never markup.
const byId = (id) => document.getElementById(id);
const history_ = []; // {title, item: an id or attributes}, oldest first
let key = null;
let about = null; // the answer of /page
let read = null; // number of the latest items that text models read; null: not known yet
let example = 0;
let searching = new AbortController();
let comparing = new AbortController();

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "click") node.addEventListener("click", value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

class Refused extends Error {}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    const asked = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    answer = await fetch(path, { ...asked, headers, signal, credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    askForKey(true);
    throw new Refused("The server does not accept this key.");
  }
  const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status} without a reason.` }));
  if (!answer.ok) throw new Refused(found.error);
  return found;
}

function say(problem) {
  byId("problem").textContent = problem ?? "";
  byId("problem").hidden = !problem;
}

async function trying(work) {
  try {
    await work();
    say(null);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    say(error.message);
  }
}

function askForKey(again) {
  byId("key-section").hidden = false;
  byId("work").hidden = true;
  if (again) byId("key").focus();
}

const named = (item) => item.title || item.item_id;

// What the page is about

async function start() {
  about = await ask("/page");
  byId("key-section").hidden = true;
  byId("work").hidden = false;
  document.title = `${about.domain} – fedmerge`;
  byId("domain").textContent = about.domain;
  const from = about.run === null ? "" : ` Run ${about.run}.`;
  byId("lead").textContent = `${about.items.toLocaleString("en")} items.${from} Put a history together, and see what each model recommends.`;
  byId("synthetic").hidden = !about.synthetic;
  byId("attributes").replaceChildren(
    ...about.attributes.map((name) => {
      const input = make("input", { type: "text", name, maxlength: 16384, autocomplete: "off" });
      return make("label", {}, name, input);
    }),
  );
  const first = about.models[0].title;
  byId("legend").textContent =
    (about.models.length > 1 ? `▲ and ▼: places up and down against ${first}; new: not in its first 100. ` : "") +
    "Near: the items of the history with the largest cosine under the model, by their numbers there. Choose an item of a list to add it to the history.";
  byId("absent").replaceChildren(
    ...about.absent.map((model) => make("div", {}, make("dt", {}, `No ${model.title}`), make("dd", {}, model.reason))),
  );
  showHistory();
}

// The history

function add(title, item) {
  history_.push({ title, item });
  showHistory();
}

function move(place, by) {
  const [moved] = history_.splice(place, 1);
  history_.splice(place + by, 0, moved);
  showHistory();
  const buttons = byId("history").children[place + by].querySelectorAll("button");
  (buttons[by < 0 ? 0 : 1].disabled ? buttons[by < 0 ? 1 : 0] : buttons[by < 0 ? 0 : 1]).focus();
}

function remove(place) {
  history_.splice(place, 1);
  showHistory();
  const next = byId("history").children[Math.min(place, history_.length - 1)];
  (next ? next.querySelector("button:last-child") : byId("search")).focus();
}

function showHistory() {
  read = null;
  drawHistory();
  trying(compare);
}

function drawHistory() {
  const unread = read === null ? 0 : history_.length - read;
  byId("history").replaceChildren(
    ...history_.map(({ title, item }, place) => {
      const button = (sign, label, click, disabled = false) =>
        make("button", { type: "button", "aria-label": label, title: label, click, disabled }, sign);
      const told = typeof item === "string" ? item : "described here";
      return make(
        "li",
        { class: place < unread ? "unread" : null },
        make("span", {}, title, " ", make("small", {}, place < unread ? `${told}, not read` : told)),
        make(
          "div",
          {},
          button("↑", `Move ${title} up`, () => move(place, -1), place === 0),
          button("↓", `Move ${title} down`, () => move(place, 1), place === history_.length - 1),
          button("✕", `Remove ${title}`, () => remove(place)),
        ),
      );
    }),
  );
  byId("clear").disabled = history_.length === 0;
  const order = "The oldest item first, the latest last.";
  byId("history-hint").textContent =
    history_.length === 0
      ? "No items yet: find some, or take an example, which is made of similar items of the catalog."
      : unread > 0
        ? `${order} Text models read the latest ${read}: no more fit into the tokens of a history.`
        : order;
}

async function search() {
  searching.abort();
  searching = new AbortController();
  const query = byId("search").value.trim();
  if (!query) {
    byId("found").replaceChildren();
    byId("search-status").textContent = "";
    return;
  }
  const { items, total } = await ask(`/items?${new URLSearchParams({ q: query, k: 8 })}`, undefined, searching.signal);
  byId("search-status").textContent =
    total === 0
      ? "No item has these words in its title."
      : total > items.length
        ? `${items.length} of ${total.toLocaleString("en")} items; choose one to add it.`
        : "Choose one to add it.";
  byId("found").replaceChildren(
    ...items.map((item) => {
      const click = () => add(named(item), item.item_id);
      return make("li", {}, make("button", { type: "button", click }, named(item), " ", make("small", {}, item.item_id)));
    }),
  );
}

function describe() {
  const texts = [...byId("attributes").querySelectorAll("input")].filter((input) => input.value.trim());
  byId("describe-status").textContent = texts.length === 0 ? "Fill at least one of these." : "";
  if (texts.length === 0) return;
  const attributes = Object.fromEntries(texts.map((input) => [input.name, input.value]));
  add(attributes[about.title_attribute] ?? texts[0].value, attributes);
  for (const input of texts) input.value = "";
}

async function takeExample() {
  const { history } = await ask(`/example?${new URLSearchParams({ number: example })}`);
  example += 1;
  history_.splice(0, Infinity, ...history.map((item) => ({ title: named(item), item: item.item_id })));
  showHistory();
}

// The lists

async function compare() {
  comparing.abort();
  comparing = new AbortController();
  if (history_.length === 0) {
    byId("lists").replaceChildren();
    byId("lists").removeAttribute("aria-busy");
    byId("lists-status").textContent = "";
    return;
  }
  const { signal } = comparing;
  const asked = history_.map((each) => each.item);
  const titles = history_.map((each) => each.title);
  byId("lists").setAttribute("aria-busy", "true");
  const begun = performance.now();
  try {
    const answer = await ask("/compare", { history: asked, k: Number(byId("length").value) }, signal);
    const asBefore = answer.lists.every((list, place) => list.title === about.models[place]?.title);
    if (!asBefore || answer.run !== about.run) return await start(); // the server serves another run by now
    read = answer.read;
    drawLists(answer.lists, titles);
    markUnread();
    const seconds = ((performance.now() - begun) / 1000).toFixed(2);
    byId("lists-status").textContent = `${answer.lists.length === 1 ? "1 list" : `${answer.lists.length} lists`} in ${seconds} s`;
  } catch (error) {
    if (error instanceof Refused) byId("lists").replaceChildren();
    throw error;
  } finally {
    if (!signal.aborted) byId("lists").removeAttribute("aria-busy");
  }
}

function markUnread() {
  if (history_.length === read) return;
  const place = [...byId("history").querySelectorAll("button")].indexOf(document.activeElement);
  drawHistory();
  if (place >= 0) byId("history").querySelectorAll("button")[place].focus();
}

function drawLists(lists, titles) {
  const focused = [...byId("lists").querySelectorAll("button")].indexOf(document.activeElement);
  byId("lists").replaceChildren(
    ...lists.map((list, place) => {
      const model = about.models[place];
      const id = `list-${place}`;
      const tag = model.served ? make("span", { class: "tag" }, "served") : null;
      const heading = make("h3", { id }, symbol(model), make("span", {}, model.title, tag));
      const parts = [heading, make("p", { class: "note" }, model.meaning)];
      if (list.refused !== null) parts.push(make("p", {}, list.refused));
      else parts.push(drawList(list, id, place > 0, titles));
      if (list.gone.length > 0) parts.push(drawGone(list.gone));
      return make("article", { class: `p${model.colour}`, "aria-labelledby": id }, ...parts);
    }),
  );
  const buttons = byId("lists").querySelectorAll("button");
  if (focused >= 0) buttons[Math.min(focused, buttons.length - 1)]?.focus();
}

function drawList(list, id, compared, titles) {
  const rows = list.recommendations.map((item, rank) => drawItem(list, item, rank + 1, compared, titles));
  return make("ol", { "aria-labelledby": id }, ...rows);
}

function drawGone(items) {
  const told = `Of the list of ${about.models[0].title}, ${items.length} ${items.length === 1 ? "is" : "are"} not here`;
  const rows = items.map((item) => make("li", {}, make("span", {}, `${item.before}.`), make("div", {}, named(item))));
  return make("details", {}, make("summary", {}, told), make("ol", {}, ...rows));
}

function drawItem(list, item, rank, compared, titles) {
  const near = item.near.map(({ place, cosine }, order) => {
    const called = order === 0 ? ` ${shortened(titles[place])} ` : "\u00a0";
    return `${place + 1}.${called}(${cosine.toFixed(3)})`;
  });
  const kind = list.score_kind === "cosine" ? "cosine" : "score";
  const title = named(item);
  return make(
    "li",
    {},
    make("span", {}, `${rank}.`),
    make(
      "div",
      {},
      make("button", { type: "button", title: "Add to the history", click: () => add(title, item.item_id) }, title),
      make("small", {}, compared ? moved(item.before, rank) : null, `${kind} ${item.score.toFixed(3)}`),
      make("small", {}, `near ${near.join(", ")}`),
    ),
  );
}

function shortened(title) {
  const letters = [...title];
  return letters.length > 28 ? `${letters.slice(0, 27).join("").trimEnd()}…` : title;
}

function moved(before, rank) {
  if (before === rank) return make("span", {}, "same place · ");
  const sign = before === null ? "new" : `${before > rank ? "▲" : "▼"} ${Math.abs(before - rank)}`;
  const told = before === null ? "" : `, from ${before}`;
  return make("span", {}, make("span", { class: "moved" }, sign), `${told} · `);
}

function symbol({ colour, shape }) {
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  const path = document.createElementNS(ns, "path");
  for (const [name, value] of [["viewBox", "-7 -7 14 14"], ["aria-hidden", "true"], ["class", "symbol"]]) svg.setAttribute(name, value);
  path.setAttribute("d", shape);
  path.setAttribute("class", `p${colour} f`);
  svg.append(path);
  return svg;
}

// Wiring

function onSubmit(id, work) {
  byId(id).addEventListener("submit", (event) => {
    event.preventDefault();
    work();
  });
}

let typed = 0;
byId("search").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => trying(search), 150);
});
onSubmit("search-form", () => trying(search));
onSubmit("describe-form", describe);
onSubmit("key-form", () => {
  key = byId("key").value.trim();
  byId("key").value = "";
  trying(start);
});
byId("example").addEventListener("click", () => trying(takeExample));
byId("clear").addEventListener("click", () => {
  history_.length = 0;
  showHistory();
  byId("search").focus();
});
if (matchMedia("(max-width: 40rem)").matches) byId("length").value = "5"; // the lists are one below the other
byId("length").addEventListener("change", () => trying(compare));
if (document.body.dataset.key === "yes") askForKey(false);
else trying(start);
