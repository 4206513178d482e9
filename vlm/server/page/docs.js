// The description of the API: openapi.json of this server as a page, without any library. All enters as text.

const LOCAL_KEY = "tml-local"; // as in page.js
const STORED = "kshot-key";
const GROUPS = [["OpenAI", "/v1"], ["OpenAI, at the address of the hosted service", "/oai"], ["Tinker", "/api"], ["Others", ""]];

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A schema in one line: type, or the names of its parts; what is referred to is looked up once.
function typeOf(schema, all) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map((each) => typeOf(each, all)).join(" or ");
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  return schema.type === "array" ? `list of ${typeOf(schema.items, all) || "values"}` : schema.type ?? "any";
}

function fields(schema, all) {
  const found = schema?.$ref ? all[schema.$ref.split("/").pop()] : schema;
  const rows = Object.entries(found?.properties ?? {}).map(([name, each]) => {
    const needed = found.required?.includes(name) ? "" : " (may be left out)";
    return element("li", {}, element("code", {}, name), ` ${typeOf(each, all)}${needed}`);
  });
  return rows.length ? [element("ul", { class: "rows small" }, ...rows)] : [];
}

function operation(method, path, what, all) {
  const inputs = (what.parameters ?? []).map(({ name, in: where, schema }) =>
    element("li", {}, element("code", {}, name), ` in the ${where}, ${typeOf(schema, all)}`));
  const bodies = Object.entries(what.requestBody?.content ?? {}).flatMap(([kind, { schema }]) =>
    [element("p", { class: "small soft" }, `body: ${kind}`), ...fields(schema, all)]);
  const summary = element("summary", {}, element("code", {}, `${method.toUpperCase()} ${path}`), ` ${what.summary ?? ""}`);
  const text = what.description ? [element("p", {}, what.description)] : [];
  const more = [...text, ...(inputs.length ? [element("ul", { class: "rows small" }, ...inputs)] : []), ...bodies];
  return more.length ? element("details", {}, summary, ...more) : element("p", { class: "plain" }, ...summary.childNodes);
}

function show({ info, paths, components }) {
  byId("version").textContent = `version ${info.version}`;
  const left = new Set(Object.keys(paths)), all = components?.schemas ?? {};
  for (const [title, prefix] of GROUPS) {
    const own = [...left].filter((path) => path.startsWith(prefix));
    own.forEach((path) => left.delete(path));
    const operations = own.flatMap((path) => Object.entries(paths[path])
      .map(([method, what]) => operation(method, path, what, all)));
    if (operations.length) byId("groups").append(element("section", {}, element("h2", {}, title), ...operations));
  }
}

try {
  const headers = { "X-API-Key": sessionStorage.getItem(STORED) ?? LOCAL_KEY };
  const response = await fetch("openapi.json", { headers, cache: "no-store" });
  if (response.ok) show(await response.json());
  byId("state").textContent = response.ok ? "" : response.status === 401
    ? "This server wants a key: give it on the page of kshot serve, in this tab, and come back."
    : `The server answers with status ${response.status}.`;
} catch (error) {
  byId("state").textContent = `The description cannot be read: ${error.message}`;
}
