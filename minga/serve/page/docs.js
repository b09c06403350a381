// The page at /docs: what the server's OpenAPI document says of it, to read and to try.
import { api, read } from "./api.js";
import { $, el, grow, tell } from "./dom.js";
import { lang, number, said, speak, switchLanguage, t } from "./words.js";

let spec = null; // the document
let asksForKey = false;

const resolve = (schema) => schema.$ref ? spec.components.schemas[schema.$ref.split("/").at(-1)] : schema;
const title = (schema) => (schema.$ref?.split("/").at(-1) ?? schema.title ?? "").split("__").at(-1);
const pretty = (value) => JSON.stringify(value, null, 2);

// ---- types

// The forms that a value may have; null only says that the field may be left out.
function forms(schema) {
	const found = schema.anyOf ?? schema.oneOf ?? [schema];
	return found.flatMap((form) => form.anyOf || form.oneOf ? forms(form) : [form]).filter((form) => form.type !== "null");
}

function typeName(schema) {
	if (schema.const !== undefined) return JSON.stringify(schema.const);
	if (schema.enum) return schema.enum.filter((value) => value !== null).map((value) => JSON.stringify(value)).join(" | ");
	if (schema.$ref) return title(schema);
	if (schema.type === "array") {
		const inner = schema.items ? forms(schema.items).map(typeName).join(" | ") : "any";
		return `[${inner}]`;
	}
	return schema.type ?? "any";
}

// What a form is held to, as nodes with a dot before each.
function limits(schema) {
	const { minimum, maximum, exclusiveMinimum: above, exclusiveMaximum: below, pattern } = schema, found = [];
	const bound = (sign, value) => { if (Math.abs(value) < 2 ** 53) found.push([`${sign} ${value}`]); };
	bound("≥", minimum);
	bound(">", above);
	bound("≤", maximum);
	bound("<", below);
	for (const [least, most, unit] of [["minLength", "maxLength", "characters"], ["minItems", "maxItems", "entries"], ["minProperties", "maxProperties", "entries"]]) {
		const [low, high] = [schema[least], schema[most]];
		if (high !== undefined) found.push([`${low ?? 0}–${high} `, said("span", unit)]);
		else if (low !== undefined) found.push([`≥ ${low} `, said("span", unit)]);
	}
	if (pattern) found.push([el("code", {}, pattern)]);
	return found.flatMap((nodes) => [" · ", ...nodes]);
}

// The objects inside a schema, each of which opens to its own fields.
function objects(schema) {
	return forms(schema).flatMap((form) => {
		if (form.type === "array" && form.items) return objects(form.items);
		const whole = resolve(form);
		return whole.properties && Object.keys(whole.properties).length ? [form] : [];
	});
}

// A <details> whose content is made when it is first opened.
function lazy(attributes, summary, make) {
	const node = el("details", attributes, summary);
	node.addEventListener("toggle", () => { if (node.open && node.childElementCount === 1) node.append(...make()); });
	return node;
}

function field(name, schema, required) {
	const kinds = forms(schema), unsupported = !kinds.length;
	const types = kinds.flatMap((form, i) => [i ? " | " : "", typeName(form), ...limits(form)]);
	const head = el("p", {}, el("code", {}, name), " ", el("small", {}, ...types), " ");
	if (required) head.append(said("b", "required"));
	if (unsupported) head.append(said("small", "unsupported"));
	const description = !unsupported && (schema.description ?? kinds.map((form) => form.description).find(Boolean));
	const inner = objects(schema).map((form) => lazy({}, el("summary", {}, title(form) || typeName(form)), () => [fields(form)]));
	return el("li", {}, head, ...(description ? [el("p", { class: "note" }, description)] : []), ...inner);
}

function fields(schema) {
	const { properties, required = [], description } = resolve(schema);
	const names = Object.keys(properties), first = names.filter((name) => required.includes(name));
	const rows = [...first, ...names.filter((name) => !required.includes(name))].map((name) => field(name, properties[name], required.includes(name)));
	return el("div", {}, ...(description ? [el("p", { class: "note" }, description)] : []), el("ul", { class: "fields" }, ...rows));
}

// ---- code and trying

function code(text) {
	const copy = said("button", "copy", { class: "ghost small", type: "button" });
	copy.addEventListener("click", async () => {
		await navigator.clipboard.writeText(text);
		tell(t("copied"));
	});
	return el("div", { class: "code" }, el("div", { class: "code-head" }, "curl", copy), el("pre", { tabindex: "0" }, el("code", {}, text)));
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
function curl({ method, path, isPublic }, body) {
	const words = [`curl ${location.origin}${path}`];
	if (method === "delete") words.push("-X DELETE");
	if (asksForKey && !isPublic) words.push('-H "Authorization: Bearer $MINGA_API_KEY"');
	if (body) words.push(`-d ${quoted(JSON.stringify(body))}`);
	return words.join(" \\\n  ");
}

// What came back, as it comes.
async function show(reply, out) {
	const isJson = reply.headers.get("content-type")?.includes("json");
	if (isJson) out.textContent = pretty(await reply.json());
	else for await (const piece of reply.body.pipeThrough(new TextDecoderStream())) out.textContent += piece;
}

function tryIt({ method, path, parameters, example }) {
	const inputs = parameters.map((parameter) => el("input", { name: parameter.name, "aria-label": parameter.name, placeholder: parameter.description, ...(parameter.required && { required: "" }) }));
	const box = example && el("textarea", { class: "mono body", rows: "3", spellcheck: "false", autocapitalize: "off" });
	if (box) box.value = pretty(example);
	const send = said("button", "send", { class: "solid", type: "submit" }), status = el("span", { class: "label" });
	const out = el("pre", { class: "reply", tabindex: "0", hidden: "" });
	const form = el("form", { class: "try" }, ...inputs.map((input) => el("label", {}, el("span", { class: "label" }, input.name), input)));
	if (box) form.append(el("label", {}, said("span", "body", { class: "label" }), box));
	form.append(el("p", { class: "row" }, status, send), out);

	let running = null;
	form.addEventListener("submit", async (event) => {
		event.preventDefault();
		if (running) return running.abort();
		running = new AbortController();
		const query = new URLSearchParams();
		let address = path;
		for (const [i, { name, in: where }] of parameters.entries()) {
			if (where === "path") address = address.replace(`{${name}}`, encodeURIComponent(inputs[i].value));
			else if (inputs[i].value) query.set(name, inputs[i].value);
		}
		const began = performance.now(), options = { method: method.toUpperCase(), signal: running.signal, ...(box && { body: box.value }) };
		out.textContent = status.textContent = "";
		out.hidden = false;
		send.dataset.t = "stop";
		send.textContent = t("stop");
		try {
			const reply = await api(query.size ? `${address}?${query}` : address, options);
			status.textContent = reply.status;
			await show(reply, out);
		} catch (error) {
			status.textContent = error.status ?? "";
			out.textContent += error.body ? pretty(error.body) : error.message;
		}
		status.textContent += ` · ${number((performance.now() - began) / 1000)} s`;
		running = null;
		send.dataset.t = "send";
		send.textContent = t("send");
		tell(status.textContent);
	});
	box?.addEventListener("input", () => grow(box));
	box?.addEventListener("keydown", (event) => { // Enter is a new line here
		if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
	});
	return form;
}

// ---- operations

function content(operation) {
	const { body, example, responses } = operation;
	const errors = Object.entries(responses).filter(([status]) => status >= "400");
	const parts = [said("h3", "example"), code(curl(operation, example))];
	if (body) parts.push(said("h3", "fields"), fields(body));
	if (errors.length) {
		const rows = errors.map(([status, { description }]) => el("tr", {}, el("td", {}, status), el("td", {}, description)));
		parts.push(said("h3", "errors"), el("table", {}, el("tbody", {}, ...rows)));
	}
	const form = tryIt(operation);
	requestAnimationFrame(() => form.querySelectorAll("textarea").forEach(grow));
	return [...parts, said("h3", "tryIt"), form];
}

function operationsOf(paths) {
	return Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, about]) => {
		const json = about.requestBody?.content["application/json"];
		return {
			...about, method, path, body: json?.schema, example: json?.example, parameters: about.parameters ?? [],
			isPublic: about.security?.length === 0, id: `${method}${path.replace(/\W+/g, "-").replace(/-$/, "")}`,
		};
	}));
}

function draw() {
	const operations = operationsOf(spec.paths);
	$("contents").replaceChildren(...operations.map(({ id, method, path }) =>
		el("li", {}, el("a", { href: `#${id}` }, el("b", { class: `verb ${method}` }, method.toUpperCase()), " ", path))));
	$("operations").replaceChildren(...operations.map((operation) => {
		const { id, method, path, summary } = operation;
		const head = el("summary", {}, el("b", { class: `verb ${method}` }, method.toUpperCase()), " ", el("code", {}, path), " ", el("span", {}, summary));
		return lazy({ class: "card op", id }, head, () => content(operation));
	}));
	open();
}

// What the part of the address after # names.
function open() {
	const node = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
	if (node?.tagName !== "DETAILS") return;
	node.open = true;
	node.scrollIntoView();
	node.firstElementChild.focus({ preventScroll: true });
}

addEventListener("hashchange", open);
$("lang").addEventListener("click", switchLanguage);
speak(lang);
try {
	asksForKey = (await fetch("/v1/models")).status === 401; // asked without one
	spec = await read("/openapi.json");
	draw();
} catch (error) {
	$("operations").replaceChildren(el("p", { class: "error" }, error.message));
}
