// The server's page: asks api/v1/overview every two seconds and puts the answer into nodes that stay.
// What the server sends comes from its clients: it enters the page as text only.

const PERIOD = 2000; // ms from one answer to the next question
const PATIENCE = 10000; // ms that an answer may take
const NEWEST = 50; // runs and checkpoints that are shown
const LOCAL_KEY = "tml-local"; // any key will do for a server without a key file
const STORED = "kshot-key";
const HEIGHT = 160, LEFT = 54, RIGHT = 14, TOP = 10, BOTTOM = 24; // of a chart, px
const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
const STATES = ["active", "idle", "finished", "lost"];
const ACTIVE = 60; // s after a run's last request in which it is called active
const NAMES = ["name", "run_name", "wandb_name", "experiment_name", "experiment", "recipe", "log_path"]; // of metadata

const byId = (id) => document.getElementById(id);

// ---- Nodes

function filled(node, attributes, children) {
  set(node, attributes);
  node.append(...children);
  return node;
}

const element = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
const drawn = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  }
}

// Only where it changes: a text that the reader has selected stays selected.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A list that shows one node for each item, in the items' order. make() gives {node, update}; nodes are kept by key.
function shelf(list, key, make) {
  const shown = new Map();
  return (items, now) => {
    const wanted = new Map(items.map((item) => [key(item), item]));
    for (const [name, { node }] of shown) {
      if (!wanted.has(name) && shown.delete(name)) node.remove();
    }
    let place = list.firstElementChild;
    for (const [name, item] of wanted) {
      if (!shown.has(name)) shown.set(name, make(item));
      const { node, update } = shown.get(name);
      update(item, now);
      if (node === place) place = place.nextElementSibling;
      else list.insertBefore(node, place);
    }
  };
}

// A <dl> of named values, which keeps its nodes.
function factList(list) {
  return shelf(list, ([name]) => name, ([name]) => {
    const value = element("dd");
    return { node: element("div", {}, element("dt", {}, name), value), update: ([, text]) => say(value, text) };
  });
}

// ---- Words

function short(value) {
  if (value === null) return "not a number";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

const whole = (value) => Math.round(value).toLocaleString("en");
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

// 3700 → "1 h", with two parts "1 h 1 min".
function span(seconds, parts = 1) {
  let left = Math.max(0, Math.floor(seconds));
  const words = [];
  for (const [unit, size] of UNITS) {
    if (left >= size || (unit === "s" && !words.length)) words.push(`${Math.floor(left / size)} ${unit}`);
    left %= size;
  }
  return words.slice(0, parts).join(" ");
}

const ago = (then, now) => `${span(now - then)} ago`;

function bytes(count, thousand = 1000) {
  const power = Math.min(4, Math.floor(Math.log(Math.max(1, count)) / Math.log(thousand) + 1e-9));
  const scaled = count / thousand ** power;
  return `${power && scaled < 100 ? scaled.toFixed(1) : Math.round(scaled)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function expiry(expires, now) {
  if (expires === null) return "does not expire";
  return expires > now ? `expires in ${span(expires - now)}` : "expired";
}

const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const cut = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);

// The key of the client's metadata by which a run is called.
const nameKey = (run) => NAMES.find((key) => !["", null, undefined].includes(run.user_metadata?.[key]));

function named(run) {
  const key = nameKey(run);
  if (key === undefined) return `Run of ${clock(run.created)}`;
  const name = plain(run.user_metadata[key]);
  return cut(key === "log_path" ? name.replace(/\/+$/, "").split("/").pop() : name, 120);
}

// A live run is active or idle, by its last request.
function activity(run, now) {
  if (run.state !== "live") return [run.state, run.state];
  const quiet = now - run.last_request;
  return quiet <= ACTIVE ? ["active", "active"] : ["idle", `idle for ${span(quiet)}`];
}

function notes(run) {
  const others = Object.entries(run.user_metadata ?? {}).filter(([name]) => name !== nameKey(run));
  return cut(others.map(([name, value]) => `${name}: ${plain(value)}`).join(" · "), 400);
}

const pointWords = ([step, time, loss]) => [`step ${whole(step)}`, `loss ${short(loss)}`, clock(time)];

// ---- Axes

// A round distance (1, 2 or 5 times a power of ten) that divides high - low into at most about `count` parts.
function stride([low, high], count, least = 0) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return Math.max(least, power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.999));
}

// The multiples of `step` in [low, high]; by their number, not by addition: a step may be too small to be added.
function ticks([low, high], step) {
  const first = Math.ceil(low / step - 1e-9), number = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: Math.min(20, number) }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

// Grown to multiples of `step`, so that the curve lies between two lines.
const widened = ([low, high], step) => [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];

// In full where there is room, since neighbours may differ in a late digit.
const tickText = (value) => (String(value).length <= 7 ? String(value) : value.toExponential(2));

// The least and the greatest, moved apart where they are (nearly) the same: an axis needs a length.
function bounds(values, apart) {
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  return high - low > 1e-9 * Math.abs(high) ? [low, high] : [low - apart(low), high + apart(high)];
}

const onto = ([low, high], start, end) => (value) => start + ((value - low) / (high - low)) * (end - start);
const finite = (points) => points.filter(([, , loss]) => loss !== null);

function axes(points, width) {
  const steps = bounds(points.map(([step]) => step), () => 1);
  const values = bounds(finite(points).map(([, , loss]) => loss), (loss) => Math.abs(loss) * 0.1 || 1);
  const rise = stride(values, 3), losses = widened(values, rise);
  const x = onto(steps, LEFT, width - RIGHT), y = onto(losses, HEIGHT - BOTTOM, TOP);
  return { x, y, rows: ticks(losses, rise), columns: ticks(steps, stride(steps, Math.max(3, width / 110), 1)) };
}

const label = (text, attributes) => drawn("text", attributes, text);

function gridOf({ x, y, rows, columns }, width) {
  const lines = rows.flatMap((value) => [
    drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
    label(tickText(value), { class: "end y", x: LEFT - 6, y: y(value) + 4 }),
  ]);
  return [...lines, ...columns.map((step) => label(whole(step), { class: "middle x", x: x(step), y: HEIGHT - 6 }))];
}

// Where a loss is not a number the curve has a gap; a point alone between gaps is a dot.
function curveOf(points, { x, y }) {
  const part = ([step, , loss], n) => {
    if (loss === null) return "";
    const at = `${x(step).toFixed(2)} ${y(loss).toFixed(2)}`;
    return n > 0 && points[n - 1][2] !== null ? `L${at}` : `M${at}h0`;
  };
  return points.map(part).join("");
}

// ---- A run's curve

let charts = 0;

// To assistive technology the curve is a slider over its points: arrow keys then reach it, and each point is read out.
function chart() {
  const id = `chart-${++charts}`;
  const title = drawn("title", { id: `${id}-title` }), desc = drawn("desc", { id: `${id}-desc` });
  const grid = drawn("g", { "aria-hidden": "true" }), curve = drawn("path", { class: "curve" });
  const guide = drawn("line", { class: "guide", y1: TOP, y2: HEIGHT - BOTTOM }), dot = drawn("circle", { class: "dot", r: 4 });
  const picture = drawn("svg", {
    class: "chart", role: "slider", "aria-labelledby": title.id, "aria-describedby": desc.id,
  }, title, desc, grid, curve, guide, dot);
  const readout = element("p", { class: "readout soft" });
  let points = [], chosen = null, scale = null, sketch = "";

  const place = () => (chosen === null ? -1 : points.findIndex(([step, time]) => step === chosen[0] && time === chosen[1]));

  function choose(index) {
    chosen = index === null ? null : points[Math.min(points.length - 1, Math.max(0, index))] ?? null;
    mark();
  }

  function mark() {
    if (!points.length) return say(readout, "");
    const index = place(), point = points[index < 0 ? points.length - 1 : index];
    say(readout, (index < 0 ? "last: " : "") + pointWords(point).join(" · "));
    set(picture, { "aria-valuemin": 1, "aria-valuemax": points.length, "aria-valuetext": pointWords(point).join(", "),
      "aria-valuenow": index < 0 ? points.length : index + 1 });
    if (!scale) return;
    const x = scale.x(point[0]), visible = (yes) => (yes ? "visible" : "hidden");
    set(guide, { x1: x, x2: x, visibility: visible(index >= 0) });
    set(dot, { visibility: visible(point[2] !== null), ...(point[2] === null ? {} : { cx: x, cy: scale.y(point[2]) }) });
  }

  function draw() {
    const width = Math.round(picture.getBoundingClientRect().width);
    const now = JSON.stringify([width, points.length, points[0], points.at(-1)]); // curves only grow or lose their start
    if (!width || now === sketch) return;
    sketch = now;
    scale = finite(points).length ? axes(points, width) : null;
    set(picture, { viewBox: `0 0 ${width} ${HEIGHT}` });
    const empty = label(points.length ? "no loss is a number" : "no losses yet", { class: "middle", x: width / 2, y: HEIGHT / 2 });
    grid.replaceChildren(...(scale ? gridOf(scale, width) : [empty]));
    set(curve, { d: scale ? curveOf(points, scale) : "" });
    for (const node of [guide, dot]) set(node, { visibility: "hidden" });
  }

  function under(event) {
    if (!scale) return;
    const at = event.clientX - picture.getBoundingClientRect().left;
    const far = points.map(([step]) => Math.abs(scale.x(step) - at));
    choose(far.indexOf(far.reduce((a, b) => Math.min(a, b))));
  }

  function pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !points.length) return;
    const index = place() < 0 ? points.length - 1 : place(), far = Math.ceil(points.length / 10);
    const moves = { ArrowLeft: index - 1, ArrowDown: index - 1, ArrowRight: index + 1, ArrowUp: index + 1,
      PageDown: index - far, PageUp: index + far, Home: 0, End: points.length - 1, Escape: null };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    choose(moves[event.key]);
  }

  function update(run) {
    points = run.losses;
    set(picture, { tabindex: points.length ? 0 : -1, "aria-disabled": !points.length });
    say(title, `Loss over steps: ${named(run)}`);
    say(desc, described(points));
    redraw();
  }

  function redraw() {
    draw();
    mark();
  }

  for (const kind of ["pointermove", "pointerdown"]) picture.addEventListener(kind, under);
  const focused = () => document.activeElement === picture;
  picture.addEventListener("pointerleave", () => { if (!focused()) choose(null); });
  picture.addEventListener("focus", () => { if (chosen === null) choose(points.length - 1); }); // and stays while it grows
  picture.addEventListener("blur", () => choose(null));
  picture.addEventListener("keydown", pressed);
  new ResizeObserver(redraw).observe(picture);
  return { nodes: [picture, readout], update };
}

function described(points) {
  const known = finite(points);
  if (!known.length) return points.length ? `${points.length} values, none of them a number.` : "No values yet.";
  const least = known.reduce((best, point) => (point[2] < best[2] ? point : best));
  const [first, last] = [points[0], points.at(-1)];
  return `${points.length} values: ${short(first[2])} at step ${first[0]}, ${short(last[2])} at step ${last[0]}, ` +
    `lowest ${short(least[2])} at step ${least[0]}. Arrow keys, Home and End move along the curve.`;
}

// ---- Rows and cards

function modelRow() {
  const name = element("strong"), about = element("span", { class: "soft" });
  const update = (model) => {
    say(name, model.name);
    const threads = model.threads ? ` · ${model.threads > 1 ? `${whole(model.threads)} threads` : "1 thread"}` : "";
    say(about, `context ${whole(model.context)} tokens · ${model.loaded ? "loaded" : "loaded at its first use"}${threads}`);
  };
  return { node: element("li", {}, name, " ", about), update };
}

function runCard() {
  const title = element("h3"), state = element("span"), id = element("code", { class: "soft" });
  const about = element("p", { class: "soft small" }), list = element("dl", { class: "facts" });
  const curve = chart(), facts = factList(list);
  const update = (run, now) => {
    say(title, named(run));
    const [kind, words] = activity(run, now);
    say(state, words);
    set(state, { class: `state ${STATES.includes(kind) ? kind : ""}` });
    say(id, run.id);
    const none = run.losses.length ? "" : `no step yet · ${run.base_model} · created ${ago(run.created, now)}`;
    say(about, [none, notes(run)].filter(Boolean).join(" · "));
    const all = [
      ["Loss", run.losses.length ? short(run.losses.at(-1)[2]) : "–"], ["Steps", whole(run.steps)],
      ["Created", ago(run.created, now)], ["Last request", ago(run.last_request, now)],
      ["Rank", whole(run.rank)], ["Base model", run.base_model],
    ];
    const empty = !run.losses.length; // a run without a step is a line
    for (const node of curve.nodes) node.toggleAttribute("hidden", empty);
    facts(empty ? [] : all, now);
    curve.update(run);
  };
  const head = element("div", { class: "split" }, title, state);
  return { node: element("li", { class: "run" }, head, id, about, ...curve.nodes, list), update };
}

function checkpointRow() {
  const path = element("code"), about = element("p", { class: "soft small" });
  const button = element("button", { type: "button" }, "Copy");
  button.addEventListener("click", () => copy(path, button));
  const update = (checkpoint, now) => {
    say(path, checkpoint.path);
    set(button, { "aria-label": `Copy ${checkpoint.path}` });
    say(about, [checkpoint.kind, bytes(checkpoint.size_bytes), ago(checkpoint.created, now),
      expiry(checkpoint.expires, now)].join(" · "));
  };
  return { node: element("li", {}, element("div", { class: "split" }, path, button), about), update };
}

// Browsers give the clipboard to pages of https and of this machine; elsewhere the path is selected for Ctrl+C.
async function copy(path, button) {
  getSelection().selectAllChildren(path);
  const write = navigator.clipboard?.writeText(path.textContent) ?? Promise.reject();
  const done = await write.then(() => true, () => false);
  say(button, done ? "Copied" : "Ctrl+C");
  say(byId("said"), done ? "Path copied." : "The path is selected; press Ctrl+C.");
  setTimeout(() => [say(button, "Copy"), say(byId("said"), "")], 2000);
}

// ---- The page

const showFacts = factList(byId("facts"));
const showModels = shelf(byId("models"), (model) => model.name, modelRow);
const showRuns = shelf(byId("runs"), (run) => run.id, runCard);
const showCheckpoints = shelf(byId("checkpoints"), (checkpoint) => checkpoint.path, checkpointRow);
const NOTHING = {
  models: "This server has no model; start it with --model NAME=PATH.",
  runs: "No training run yet. One begins when a client connects, as above, and creates a training client.",
  checkpoints: "No checkpoint yet. A training client saves one with save_state or save_weights_for_sampler.",
};

function show(answer) {
  const { now, queue } = answer;
  say(byId("address"), answer.address);
  say(byId("version"), `version ${answer.version}`);
  showFacts([
    ["Up for", span(now - answer.started, 2)], ["Busy", `${Math.round(100 * queue.busy_share)} %`],
    ["Queue", `${whole(queue.jobs)} ${queue.jobs === 1 ? "job" : "jobs"}`], ["Samples", whole(queue.samples)],
    ["Sequences", whole(queue.sequences)], ["Tokens sampled", whole(queue.tokens_sampled)],
    ["Memory", memoryText(answer.memory)],
  ], now);
  showModels(answer.models, now);
  showRuns(newest("runs", answer.runs, (run) => run.id), now);
  showCheckpoints(newest("checkpoints", answer.checkpoints, (checkpoint) => checkpoint.path), now);
  for (const [kind, words] of Object.entries(NOTHING)) say(byId(`no-${kind}`), answer[kind].length ? "" : words);
  connectText(answer.address);
  document.dispatchEvent(new CustomEvent("kshot-overview", { detail: answer }));
}

function memoryText({ limit, taken }) { // in powers of 1,024, as --memory takes them
  const kinds = Object.entries(taken).filter(([, size]) => size), total = kinds.reduce((sum, [, size]) => sum + size, 0);
  const parts = kinds.map(([kind, size]) => `${kind} ${bytes(size, 1024)}`).join(", ");
  return `${bytes(total, 1024)} of ${bytes(limit, 1024)}${parts ? ` (${parts})` : ""}`;
}

function newest(kind, items, key) {
  const order = [...items].sort((a, b) => b.created - a.created || (key(a) < key(b) ? -1 : 1));
  const count = items.length > NEWEST ? `the newest ${NEWEST} of ${whole(items.length)}` : whole(items.length);
  say(byId(`${kind}-count`), items.length ? count : "");
  return order.slice(0, NEWEST);
}

function connectText(address) {
  const key = JSON.stringify(typed() === null ? LOCAL_KEY : "YOUR-KEY");
  const given = typed() === null ? "" : `, api_key=${key}`;
  const url = JSON.stringify(address), openai = JSON.stringify(`${address.replace(/\/+$/, "")}/v1`);
  say(byId("with-kshot"), `import kshot\nservice = kshot.connect(${url}${given})`);
  say(byId("with-tinker"), `import tinker\nservice = tinker.ServiceClient(base_url=${url}, api_key=${key})`);
  say(byId("with-openai"), `from openai import OpenAI\nclient = OpenAI(base_url=${openai}, api_key=${key})`);
}

// ---- The key

const typed = () => sessionStorage.getItem(STORED);

function askKey() {
  say(byId("why"), typed() === null
    ? "This server wants a key. It is kept until this tab is closed and goes to this server only."
    : "This server does not accept that key. Type another one.");
  byId("ask").hidden = false;
  if (document.activeElement === document.body) byId("key").focus();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(STORED, byId("key").value);
  byId("key").value = "";
  poll();
});

// ---- Asking

let timer = 0, asking = false, again = false, answered = Date.now() / 1000;

// {answer}, {denied: true}, or {trouble: why there is no answer}.
async function ask() {
  const request = { headers: { "X-API-Key": typed() ?? LOCAL_KEY }, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) };
  let response;
  try {
    response = await fetch("api/v1/overview", request);
    if (response.ok) return { answer: await response.json() };
  } catch (error) {
    if (error instanceof SyntaxError) return { trouble: "what it says is not JSON" };
    return { trouble: error.name === "TimeoutError" ? "it takes too long" : "the server cannot be reached" };
  }
  return response.status === 401 ? { denied: true } : { trouble: `it answers with status ${response.status}` };
}

// What is wrong with an answer, if anything: the server may be newer than a page that was left open.
function tryShowing(answer) {
  byId("ask").hidden = true;
  try {
    show(answer);
    return "";
  } catch (error) {
    console.error(error);
    return "this page does not understand what it says; load it again";
  }
}

async function poll() {
  clearTimeout(timer);
  again = asking; // asked to ask meanwhile: with another key, perhaps
  if (asking) return;
  asking = true;
  let denied = false;
  try {
    const found = await ask();
    denied = found.denied ?? false; // then the next question waits for a key
    if (denied) askKey();
    const trouble = found.trouble ?? (denied ? "" : tryShowing(found.answer));
    if (!trouble) answered = Date.now() / 1000;
    say(byId("trouble"), trouble && `No answer since ${clock(answered)}: ${trouble}. Still asking.`);
  } finally {
    asking = false;
    if (again) poll();
    else if (!document.hidden && !denied) timer = setTimeout(poll, PERIOD);
  }
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
poll();
