// The box in which an image is tried on a base model or on saved weights: one request to v1/chat/completions.
// What comes back enters the page as text only.

const LOCAL_KEY = "tml-local"; // as in page.js
const STORED = "kshot-key";
const PATIENCE = 120000; // ms that an answer may take
const SHOWN = 10; // classes
const TOKENS = 128; // of a free answer, at most

const byId = (id) => document.getElementById(id);

function element(tag, attributes, text) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

// ---- What can be asked: the base models and the newest saved weights

let offered = "";

// Saved weights by their own name first, since a select cuts what is long.
function called(name) {
  const [, run, weights] = name.match(/^tinker:\/\/(.+?)\/sampler_weights\/(.+)$/) ?? [];
  return weights ? `${weights} of ${run}` : name;
}

document.addEventListener("kshot-overview", ({ detail: { models, checkpoints } }) => {
  const saved = checkpoints.filter(({ kind }) => kind === "sampler_weights").sort((a, b) => b.created - a.created);
  const names = [...models.map(({ name }) => name), ...saved.map(({ path }) => path)];
  if (names.join("\n") === offered) return; // what is chosen stays chosen
  offered = names.join("\n");
  const select = byId("try-model"), chosen = select.value;
  select.replaceChildren(...names.map((name) => element("option", { value: name }, called(name))));
  if (names.includes(chosen)) select.value = chosen;
  byId("try").hidden = !names.length;
});

// ---- The request

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

const classes = () => byId("try-classes").value.split(",").map((name) => name.trim()).filter(Boolean);

async function answerTo(file) {
  const content = [{ type: "image_url", image_url: { url: await dataUrl(file) } },
    { type: "text", text: byId("try-question").value }];
  const body = { model: byId("try-model").value, messages: [{ role: "user", content }], temperature: 0, max_tokens: TOKENS };
  if (classes().length) body.structured_outputs = { choice: classes() };
  const headers = { "Content-Type": "application/json", "X-API-Key": sessionStorage.getItem(STORED) ?? LOCAL_KEY };
  const request = { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(PATIENCE) };
  const response = await fetch("v1/chat/completions", request);
  const answer = await response.json().catch(() => ({})); // a proxy's own page is none
  if (!response.ok) throw new Error(answer.error?.message ?? `the server answers with status ${response.status}`);
  return answer.choices[0];
}

// ---- The answer

function bars(logProbs) {
  const list = element("ul", { class: "bars" }, "");
  const likeliest = Object.entries(logProbs).sort(([, a], [, b]) => b - a).slice(0, SHOWN);
  for (const [name, logProb] of likeliest) {
    const share = Math.exp(logProb), row = element("li", {}, "");
    row.append(element("span", {}, name), element("meter", { value: share, "aria-label": name }, ""),
      element("span", { class: "soft" }, `${(100 * share).toFixed(1)} %`));
    list.append(row);
  }
  return list;
}

byId("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = byId("try-image").files, button = byId("try-ask"), answer = byId("try-answer");
  button.disabled = true;
  answer.replaceChildren(element("p", { class: "soft" }, "The model is asked …"));
  try {
    const { message, choice_log_probs: logProbs } = await answerTo(file);
    const said = element("p", {}, message.content || "(an empty answer)");
    answer.replaceChildren(said, ...(logProbs ? [bars(logProbs)] : []));
  } catch (error) {
    const why = error.name === "TimeoutError" ? "it takes more than two minutes" : error.message;
    answer.replaceChildren(element("p", { class: "note" }, `No answer: ${why}`));
  } finally {
    button.disabled = false;
  }
});
