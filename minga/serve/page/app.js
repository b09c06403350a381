// Minga's page: talk to models, watch runs learn. No framework, no build, nothing from elsewhere.
"use strict";

// words
const WORDS = { // English, Spanish
	tagline: ["a model of your own, on the machines you have", "un modelo propio, en las máquinas que tienes"],
	skip: ["Skip to content", "Ir al contenido"], chat: ["Chat", "Chat"], runs: ["Runs", "Corridas"],
	offline: ["The server does not answer. Trying again…", "El servidor no responde. Reintentando…"], model: ["Model", "Modelo"],
	noModel: ["No model is loaded", "No hay modelos cargados"], settings: ["Settings", "Ajustes"], clear: ["Clear", "Borrar"],
	system: ["System prompt", "Instrucción de sistema"],
	temperature: ["Temperature", "Temperatura"], topP: ["Top-p", "Top-p"], maxTokens: ["Most tokens", "Máx. de tokens"],
	conversation: ["Conversation", "Conversación"], say: ["Write a message", "Escribe un mensaje"],
	send: ["Send", "Enviar"], stop: ["Stop", "Parar"],
	keys: ["Enter sends · Shift + Enter new line · Esc stops", "Enter envía · Mayús + Enter nueva línea · Esc detiene"],
	keyTitle: ["This server asks for a key", "Este servidor pide una clave"],
	key: ["Key", "Clave"],
	cancel: ["Cancel", "Cancelar"], continue: ["Continue", "Continuar"],
	welcome: ["It runs here, and what you write stays here.", "Corre aquí, y lo que escribes se queda aquí."],
	ideas: [["Tell me a short story about the sea.", "What is a neural network?"], ["Cuéntame un cuento corto sobre el mar.", "¿Qué es una red neuronal?"]],
	you: ["You", "Tú"], retry: ["Retry", "Reintentar"], stopped: ["stopped", "detenida"],
	cut: ["cut at the limit", "cortada en el límite"], answering: ["Answering", "Respondiendo"], tokens: ["tokens", "tokens"],
	perSecond: ["tokens/s", "tokens/s"], failed: ["The answer did not arrive", "La respuesta no llegó"],
	noRuns: ["No runs yet. Start one:", "Aún no hay corridas. Empieza una:"],
	running: ["training", "entrenando"], done: ["finished", "terminada"], halted: ["stopped", "detenida"], dead: ["interrupted", "interrumpida"],
	deadText: ["Its last checkpoint can be resumed.", "Su último punto de control se puede reanudar."],
	nothing: ["Nothing written yet.", "Todavía no hay nada escrito."], step: ["Step", "Paso"], of: ["of", "de"], loss: ["Loss", "Pérdida"],
	held: ["held-out", "reservado"], smooth: ["training", "entrenamiento"],
	bpb: ["Bits per byte", "Bits por byte"], speed: ["Tokens a second", "Tokens por segundo"], left: ["Time left", "Tiempo restante"],
	elapsed: ["Time", "Tiempo"], seen: ["Tokens seen", "Tokens vistos"], params: ["Parameters", "Parámetros"], active: ["active", "activos"],
	mtp: ["MTP acceptance", "Aceptación MTP"], lossCurve: ["Loss (nats a token)", "Pérdida (nats por token)"],
	experts: ["Expert load", "Carga de expertos"],
	expertsKey: ["more than its share", "más de su parte"], expertsCold: ["less", "menos"],
	worst: ["busiest / mean", "más ocupado / media"], samples: ["Samples", "Muestras"],
	noKey: ["This server needs a key.", "Este servidor pide una clave."],
};
const $ = (id) => document.getElementById(id);
const recall = (store, key, fallback) => { try { return JSON.parse(store.getItem("minga." + key)) ?? fallback; } catch { return fallback; } };
const keep = (store, key, value) => { try { store.setItem("minga." + key, JSON.stringify(value)); } catch { /* a full or closed store: the page works without */ } };
let lang = recall(localStorage, "lang", navigator.language.startsWith("es") ? "es" : "en");
const t = (word) => WORDS[word][+(lang === "es")];

function el(tag, attributes = {}, ...children) {
	const node = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
	for (const [name, value] of Object.entries(attributes)) {
		if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
		else node.setAttribute(name, value);
	}
	node.append(...children);
	return node;
}
const mark = (link, here) => here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
const finite = (x) => typeof x === "number" && Number.isFinite(x);
const number = (x, digits = 2) => finite(x) ? new Intl.NumberFormat(lang, { maximumFractionDigits: digits, minimumFractionDigits: Math.abs(x) < 100 ? digits : 0 }).format(x) : "–";
const whole = (x) => finite(x) ? new Intl.NumberFormat(lang, { maximumFractionDigits: 0 }).format(x) : "–";
const compact = (x) => finite(x) ? new Intl.NumberFormat(lang, { notation: "compact", maximumSignificantDigits: 3 }).format(x) : "–";
function duration(seconds) {
	if (!finite(seconds)) return "–";
	const s = Math.max(0, Math.round(seconds)), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
	return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

function speak() {
	document.documentElement.lang = lang;
	for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
	for (const node of document.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
	for (const node of document.querySelectorAll("[data-t-hint]")) node.placeholder = t(node.dataset.tHint);
	$("lang").textContent = lang === "en" ? "Español" : "English";
}

// the server
let asking = null, declined = false; // one question for the key, however many requests wait; no nagging after a no
function askKey() {
	asking ??= new Promise((resolve) => {
		const dialog = $("key-dialog");
		dialog.returnValue = "";
		$("key").value = "";
		dialog.addEventListener("close", () => { asking = null; declined = !dialog.returnValue; resolve(!declined); }, { once: true });
		dialog.showModal();
	});
	return asking;
}
$("key-form").addEventListener("submit", (event) => {
	event.preventDefault();
	keep(sessionStorage, "key", $("key").value);
	$("key-dialog").close("ok");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));

async function api(path, options = {}, patient = false) {
	for (;;) {
		const key = recall(sessionStorage, "key", "");
		let reply;
		try {
			reply = await fetch(path, { ...options, headers: { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) } });
		} catch (error) {
			if (error.name !== "AbortError") $("offline").hidden = false;
			throw error;
		}
		$("offline").hidden = true;
		if (reply.ok) return reply;
		if (reply.status === 401) {
			if (recall(sessionStorage, "key", "") !== key) continue; // another request asked meanwhile
			if (!patient && !(declined && !options.method) && await askKey()) continue;
		}
		const body = await reply.json().catch(() => ({}));
		throw Object.assign(new Error(body.error?.message ?? body.error ?? `HTTP ${reply.status}`), { status: reply.status });
	}
}

async function* events(reply) { // server-sent events -> parsed objects
	const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = "";
	for (;;) {
		const { value, done } = await reader.read();
		rest += value ?? "";
		const lines = rest.split(/\r?\n/);
		rest = done ? "" : lines.pop();
		for (const line of lines) {
			if (!line.startsWith("data:")) continue;
			const data = line.slice(5).trim();
			if (data === "[DONE]") return;
			yield JSON.parse(data);
		}
		if (done) return;
	}
}

// Markdown, small and safe: everything is escaped before any tag is made
const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const emphasis = (html) => html
	.replace(/\*\*(?=\S)([^*]+?)\*\*/g, "<strong>$1</strong>")
	.replace(/(^|[^\w*])\*(?=\S)([^*\n]+?)\*(?![\w*])/g, "$1<em>$2</em>");
const inline = (text) => escape(text).split(/(`[^`\n]+`)/).map((part) => /^`.+`$/.test(part) ? `<code>${part.slice(1, -1)}</code>` : emphasis(part)).join("");

function markdown(text) {
	const out = [], lines = text.split("\n");
	for (let i = 0; i < lines.length;) {
		const fence = lines[i].match(/^\s*```/);
		const item = lines[i].match(/^\s*(?:[-*+]|(\d{1,6})[.)])\s+\S/);
		if (fence) {
			const code = [];
			for (i++; i < lines.length && !/^\s*```\s*$/.test(lines[i]); i++) code.push(lines[i]);
			i++;
			out.push(`<pre tabindex="0"><code>${escape(code.join("\n"))}</code></pre>`);
		} else if (item) {
			const tag = item[1] ? "ol" : "ul", mark = item[1] ? /^\s*\d{1,6}[.)]\s+/ : /^\s*[-*+]\s+/, items = [];
			for (; i < lines.length && mark.test(lines[i]); i++) items.push(`<li>${inline(lines[i].replace(mark, ""))}</li>`);
			out.push(`<${tag}${item[1] ? ` start="${Number(item[1])}"` : ""}>${items.join("")}</${tag}>`);
		} else if (!lines[i].trim()) i++;
		else {
			const words = [];
			do words.push(inline(lines[i++])); while (i < lines.length && lines[i].trim() && !/^\s*(```|([-*+]|\d{1,6}[.)])\s+\S)/.test(lines[i]));
			out.push(`<p>${words.join("<br>")}</p>`);
		}
	}
	return out.join("");
}

// chat
const DIALS = { system: "", temperature: "0.7", top_p: "0.95", max_tokens: "256" };
const chat = { messages: [], model: "", ...DIALS, ...recall(localStorage, "chat", {}) };
const saveChat = () => keep(localStorage, "chat", chat);
let abort = null; // set while an answer streams

function tell(text) { $("announce").textContent = text; }

async function loadModels() {
	const names = (await (await api("/v1/models")).json()).data.map((model) => model.id);
	if (!names.includes(chat.model)) chat.model = names[0] ?? "";
	$("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
	if (!names.length) $("model").append(el("option", { value: "", "data-t": "noModel" }, t("noModel")));
	$("model").value = chat.model;
	showSend();
}

function showSend() {
	const button = $("send");
	button.dataset.t = abort ? "stop" : "send";
	button.textContent = t(button.dataset.t);
	button.classList.toggle("stop", !!abort);
	button.disabled = !abort && !(chat.model && $("say").value.trim());
}

function footnote(message) {
	const parts = [];
	if (message.tokens) parts.push(`${whole(message.tokens)} ${t("tokens")}`);
	if (finite(message.rate)) parts.push(`${number(message.rate, 1)} ${t("perSecond")}`);
	if (message.end === "length") parts.push(t("cut"));
	if (message.end === "stopped") parts.push(t("stopped"));
	return parts.join(" · ");
}

function paint(node, message) { // the parts of an answer that change while it streams
	const live = abort && message === chat.messages.at(-1);
	const text = node.querySelector(".text");
	if (message.content) text.innerHTML = markdown(message.content);
	else text.replaceChildren(...(live ? [el("span", { class: "wait" })] : []));
	if (message.error) text.append(el("p", { class: "error" }, `${t("failed")}: ${message.error}`));
	node.querySelector(".stats").textContent = footnote(message);
}

function bubble(message, last) {
	if (message.role === "user") return el("article", { class: "msg user" }, el("span", { class: "sr" }, t("you") + ": "), el("div", { class: "text" }, message.content));
	const foot = el("div", { class: "foot" }, el("span", { class: "stats" }));
	if (last && !abort) foot.append(el("button", { class: "ghost small", type: "button", onclick: retry }, t("retry")));
	const node = el("article", { class: "msg bot" }, el("p", { class: "who" }, message.model ?? ""), el("div", { class: "text" }), foot);
	paint(node, message);
	return node;
}

function showChat() {
	const log = $("log");
	if (chat.messages.length) log.replaceChildren(...chat.messages.map((message, i) => bubble(message, i === chat.messages.length - 1)));
	else log.replaceChildren(el("div", { class: "welcome" }, el("h1", {}, `Minga: ${t("tagline")}`), el("p", {}, t("welcome")),
		el("div", { class: "chips" }, ...t("ideas").map((idea) => el("button", { type: "button", onclick: () => send(idea) }, idea)))));
	log.scrollTop = log.scrollHeight;
	$("clear").disabled = !chat.messages.length;
	showSend();
}

function send(text) {
	if (abort || !chat.model || !text.trim()) return;
	chat.messages.push({ role: "user", content: text.trim() });
	answer();
}

function retry() {
	if (abort) return;
	if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
	answer();
	$("say").focus();
}

function request() {
	const body = { model: chat.model, messages: [{ role: "system", content: chat.system.trim() }, ...chat.messages].filter((m) => m.content).map(({ role, content }) => ({ role, content })), stream: true, stream_options: { include_usage: true } };
	for (const dial of ["temperature", "top_p", "max_tokens"]) if (chat[dial] !== "") body[dial] = Number(chat[dial]);
	return body;
}

async function answer() {
	const body = request();
	const message = { role: "assistant", content: "", model: chat.model, tokens: 0 };
	const control = abort = new AbortController();
	chat.messages.push(message);
	showChat();
	tell(t("answering"));
	const log = $("log"), node = log.lastElementChild;
	let began = 0, elapsed = 0, frame = 0;
	const follow = (change) => { // to the end, unless the reader scrolled away
		const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
		change();
		if (atEnd) log.scrollTop = log.scrollHeight;
	};
	const draw = () => { frame = 0; follow(() => paint(node, message)); };
	try {
		const reply = await api("/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: control.signal });
		for await (const event of events(reply)) {
			if (event.error) throw new Error(event.error.message ?? event.error);
			const choice = event.choices?.[0];
			if (choice?.delta?.content) {
				message.content += choice.delta.content;
				message.tokens++;
				began ||= performance.now();
				elapsed = performance.now() - began;
			}
			if (choice?.finish_reason) message.end = choice.finish_reason;
			if (event.usage) message.tokens = event.usage.completion_tokens; // exact: a piece of text may hold several
			if (elapsed > 50) message.rate = (message.tokens - 1) / elapsed * 1000;
			frame ||= requestAnimationFrame(draw);
		}
	} catch (error) {
		if (control.signal.aborted) message.end = "stopped";
		else message.error = error.message;
	}
	cancelAnimationFrame(frame);
	abort = null;
	if (!chat.messages.includes(message)) return showSend(); // cleared meanwhile
	saveChat();
	follow(() => node.replaceWith(bubble(message, true)));
	showSend();
	tell(message.error ? `${t("failed")}: ${message.error}` : message.content || t("stopped"));
}

function grow() {
	const box = $("say");
	box.style.height = "auto";
	box.style.height = box.scrollHeight + "px";
}

function submit() {
	const text = $("say").value;
	if (abort || !chat.model) return;
	$("say").value = "";
	grow();
	send(text);
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); if (abort) abort.abort(); else submit(); $("say").focus(); });
$("say").addEventListener("input", () => { grow(); showSend(); });
$("say").addEventListener("keydown", (event) => {
	if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method's Enter is not ours
	event.preventDefault();
	submit();
});
document.addEventListener("keydown", (event) => {
	if (event.key !== "Escape" || $("key-dialog").open) return;
	if (abort) abort.abort();
	else if (!$("drawer").hidden) { toggleDrawer(); $("settings").focus(); }
});
function toggleDrawer() {
	$("drawer").hidden = !$("drawer").hidden;
	$("settings").setAttribute("aria-expanded", String(!$("drawer").hidden));
}
$("settings").addEventListener("click", () => { toggleDrawer(); if (!$("drawer").hidden) $("system").focus(); });
$("drawer").addEventListener("submit", (event) => event.preventDefault());
for (const dial of Object.keys(DIALS)) {
	$(dial).value = chat[dial];
	$(dial).addEventListener("change", () => { if ($(dial).checkValidity()) { chat[dial] = $(dial).value; saveChat(); } else $(dial).reportValidity(); });
}
$("model").addEventListener("change", () => { chat.model = $("model").value; saveChat(); showSend(); });
$("clear").addEventListener("click", () => { abort?.abort(); chat.messages = []; saveChat(); showChat(); $("say").focus(); });
addEventListener("pagehide", saveChat);

// charts
function ticks(low, high, count) {
	const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
	const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.7);
	const out = [];
	for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) out.push(i * step);
	return { step, out };
}
function thin(points, most = 500) { // means of equal buckets: thousands of steps stay light
	if (points.length <= most) return points;
	const out = [], size = points.length / most;
	for (let i = 0; i < most; i++) {
		const part = points.slice(Math.floor(i * size), Math.floor((i + 1) * size));
		out.push([part.at(-1)[0], mean(part)]);
	}
	return out;
}
const mean = (points) => points.reduce((sum, p) => sum + p[1], 0) / points.length;
const smooth = (points) => points.map(([x], i) => { // a centred mean does not lag behind a falling curve
	const half = Math.min(12, i, points.length - 1 - i);
	return [x, mean(points.slice(i - half, i + half + 1))];
});
function nearest(points, x) { return points.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best); }

function makeChart(title) {
	const svg = el("svg:svg", { role: "img", tabindex: "0", "aria-label": t(title) });
	const readout = el("p", { class: "readout" });
	const chart = { node: el("div", { class: "card" }, el("h3", {}, t(title)), readout, svg), svg, readout, at: null, series: [], title };
	const move = (x) => { chart.at = x; drawChart(chart); };
	svg.addEventListener("pointermove", (event) => chart.invert && move(chart.invert(event.clientX - svg.getBoundingClientRect().left)));
	svg.addEventListener("pointerleave", () => move(null));
	svg.addEventListener("keydown", (event) => {
		const points = chart.series.at(-1)?.points, way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
		if (!points?.length || !way) return;
		event.preventDefault();
		const i = chart.at == null ? points.length - 1 : points.indexOf(nearest(points, chart.at)) + way;
		move(points[Math.min(points.length - 1, Math.max(0, i))][0]);
		tell(readout.textContent);
	});
	return chart;
}

function drawChart(chart) {
	const shown = chart.series.filter((series) => series.points.length), all = shown.flatMap((series) => series.points);
	chart.node.hidden = !all.length;
	if (!all.length || !chart.svg.clientWidth) return;
	const W = chart.svg.clientWidth, H = 210, left = 38, right = 8, top = 10, bottom = 24;
	const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
	let [x0, x1, y0, y1] = [xs, ys].flatMap((v) => [v.reduce((a, b) => Math.min(a, b)), v.reduce((a, b) => Math.max(a, b))]);
	if (x0 === x1) x1 = x0 + 1;
	const pad = (y1 - y0) * 0.06 || Math.abs(y0) * 0.1 || 1;
	y0 -= pad; y1 += pad;
	const X = (x) => left + (x - x0) / (x1 - x0) * (W - left - right), Y = (y) => H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom);
	chart.invert = (px) => x0 + (px - left) / (W - left - right) * (x1 - x0);
	const parts = [], yt = ticks(y0, y1, 5), digits = Math.max(0, -Math.floor(Math.log10(yt.step)));
	for (const y of yt.out) parts.push(el("svg:line", { class: "grid", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }), el("svg:text", { x: left - 7, y: Y(y) + 4, "text-anchor": "end" }, number(y, digits)));
	for (const x of ticks(x0, x1, W / 90).out) parts.push(el("svg:text", { x: X(x), y: H - 6, "text-anchor": X(x) > W - 20 ? "end" : "middle" }, x < 1e5 ? whole(x) : compact(x)));
	for (const { points, kind, dots } of shown) {
		parts.push(el("svg:polyline", { class: `curve ${kind}`, points: points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ") }));
		if (dots && points.length <= 40) for (const [x, y] of points) parts.push(el("svg:circle", { class: `dot ${kind}`, cx: X(x), cy: Y(y), r: 3 }));
	}
	const said = [];
	if (chart.at != null) {
		const x = nearest(all, chart.at)[0];
		said.push(`${t("step").toLowerCase()} ${whole(x)}`);
		parts.push(el("svg:line", { class: "cursor", x1: X(x), x2: X(x), y1: top, y2: H - bottom }));
		for (const { points, kind, name } of shown) {
			const p = nearest(points, x);
			if (!name) continue;
			said.push(`${t(name)} ${number(p[1], 3)}`);
			parts.push(el("svg:circle", { class: `dot ${kind}`, cx: X(p[0]), cy: Y(p[1]), r: 4 }));
		}
		chart.readout.textContent = said.join(" · ");
	} else chart.readout.replaceChildren(...shown.filter((s) => s.name).flatMap((s) => [el("span", { class: `key ${s.kind}` }), t(s.name)]));
	chart.svg.setAttribute("height", H);
	chart.svg.setAttribute("aria-label", `${t(chart.title)}: ${shown.filter((s) => s.name).map((s) => `${t(s.name)} ${number(s.points[0][1])} → ${number(s.points.at(-1)[1])}`).join("; ")}`);
	chart.svg.replaceChildren(...parts);
}

function drawHeat(view, state) { // rows are layers, columns are experts; colour is the distance from an even share
	view.heat.hidden = !state.load?.length;
	if (view.heat.hidden || view.heatStep === state.loadStep) return;
	view.heatStep = state.loadStep;
	const columns = Math.max(...state.load.map((row) => row.length)), cell = 100 / columns, rows = state.load.length, high = rows > 12 ? 9 : 20;
	view.heatRead.replaceChildren(el("span", { class: "key held" }), t("expertsKey"), el("span", { class: "key cool" }), t("expertsCold"), ` · ${t("worst")} ${number(state.worst)}`);
	const svg = el("svg:svg", { viewBox: `0 0 100 ${rows * high}`, preserveAspectRatio: "none", height: rows * high, role: "img", "aria-label": t("experts") });
	state.load.forEach((row, l) => row.forEach((load, e) => {
		const box = { x: e * cell + cell * 0.04, y: l * high + 0.75, width: cell * 0.92, height: high - 1.5 };
		const far = Math.min(1, Math.abs(Math.log2(Math.max(load, 0.05))) / 2);
		svg.append(el("svg:rect", { ...box, class: "cell" }), el("svg:rect", { ...box, class: load > 1 ? "hot" : "cold", "fill-opacity": far.toFixed(2) }, el("svg:title", {}, `${l + 1}/${e + 1}: ${number(load)}×`)));
	}));
	view.heatMap.replaceChildren(svg);
}

// runs
const rows = new Map(); // run name -> its row in the list, updated in place so that focus stays
let runs = [], open = null; // open: { name, next, state, view }

const condition = (run) => run.alive ? "running" : run.ended === "stopped" ? "halted" : run.ended ? "done" : "dead";

function showList() {
	const list = $("run-list");
	for (const [name, row] of rows) if (!runs.some((run) => run.name === name)) { row.remove(); rows.delete(name); }
	runs.forEach((run, i) => {
		let row = rows.get(run.name);
		if (!row) rows.set(run.name, row = el("li", {}, el("a", { href: `#runs/${encodeURIComponent(run.name)}` }, el("b", {}, run.name), el("small"), el("span"))));
		if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
		const [small, state] = [row.querySelector("small"), row.querySelector("span")], facts = [`${t("step").toLowerCase()} ${whole(run.step)}`];
		if (finite(run.loss)) facts.push(`${t("loss").toLowerCase()} ${number(run.loss)}`);
		if (finite(run.bits_per_byte)) facts.push(`${number(run.bits_per_byte)} b/B`);
		small.textContent = facts.join(" · ");
		state.className = `state ${condition(run)}`;
		state.textContent = t(condition(run));
		mark(row.firstChild, run.name === open?.name);
	});
}

const fresh = () => ({ config: {}, loss: [], held: [], bpb: [], clock: [], samples: [], last: {}, evaluation: {} });
function put(points, x, y) { // a resumed run says its steps again: the newer word counts
	if (!finite(x) || !finite(y)) return;
	while (points.length && points.at(-1)[0] >= x) points.pop();
	points.push([x, y]);
}
function absorb(state, line) {
	if (line.kind === "start") { state.start = line; state.config = line.config ?? {}; state.end = null; state.clock = []; }
	if (line.kind === "step") {
		state.last = line;
		put(state.loss, line.step, line.loss);
		put(state.clock, line.step, line.seconds);
		if (finite(line.expert_max_over_mean)) state.worst = line.expert_max_over_mean;
		const load = (line.expert_load ?? []).filter((row) => row?.length);
		if (load.length) [state.load, state.loadStep] = [load, line.step];
	}
	if (line.kind === "eval") {
		state.evaluation = line;
		put(state.held, line.step, line.val_loss);
		put(state.bpb, line.step, line.bits_per_byte);
	}
	if (line.kind === "sample") state.samples.push(line);
	if (line.kind === "end") state.end = line;
}

function timeLeft(state) {
	const { steps, hours } = state.config, recent = state.clock.slice(-30), [a, b] = [recent[0], recent.at(-1)];
	if (steps > 0) return recent.length > 1 ? (steps - b[0]) * (b[1] - a[1]) / (b[0] - a[0]) : null;
	return hours > 0 && b ? hours * 3600 - b[1] : null;
}
function share(state) {
	const { steps, hours } = state.config;
	return steps > 0 ? state.last.step / steps : hours > 0 ? state.last.seconds / (hours * 3600) : null;
}

function makeView(name) {
	const view = {
		state: el("span", { class: "state" }), bar: el("progress", { max: 1, "aria-label": name }), note: el("p", { class: "note" }), tiles: el("dl", { class: "tiles" }),
		loss: makeChart("lossCurve"), bpb: makeChart("bpb"), heatRead: el("p", { class: "readout" }), heatMap: el("div"), samples: el("div", { class: "card" }),
	};
	view.heat = el("div", { class: "card" }, el("h3", {}, t("experts")), view.heatRead, view.heatMap);
	$("run").replaceChildren(el("div", { class: "title" }, el("h2", {}, name), view.state), view.bar, view.note, view.tiles, el("div", { class: "pair" }, view.loss.node, view.bpb.node), view.heat, view.samples);
	return view;
}

function showRun() {
	const { state, view, name } = open, { last, evaluation, start, end } = state;
	const how = condition({ ...runs.find((run) => run.name === name), ...(end && { alive: false, ended: end.reason }) });
	view.state.className = `state ${how}`;
	view.state.textContent = t(how);
	const done = share(state);
	view.bar.hidden = !finite(done);
	view.bar.value = how === "done" ? 1 : Math.min(1, done || 0);
	view.note.hidden = start && how !== "dead";
	view.note.textContent = start ? t("deadText") : t("nothing");
	const params = start?.parameters ?? {}, steps = state.config.steps > 0 ? ` ${t("of")} ${whole(state.config.steps)}` : "";
	const facts = [
		[t("step") + steps, whole(last.step)], [t("loss"), number(state.loss.at(-1)?.[1])], [t("bpb"), number(evaluation.bits_per_byte, 3)], [t("speed"), whole(last.tokens_per_second)],
		how === "running" ? [t("left"), duration(timeLeft(state))] : [t("elapsed"), duration(end?.seconds ?? last.seconds)], [t("seen"), compact(last.tokens)],
		[t("params") + (finite(params.active) ? ` (${compact(params.active)} ${t("active")})` : ""), compact(params.total)], [t("mtp"), finite(evaluation.mtp_acceptance) ? number(evaluation.mtp_acceptance * 100, 0) + " %" : "–"],
	].filter(([, value]) => value !== "–");
	view.tiles.replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
	const points = thin(state.loss);
	view.loss.series = [{ points, kind: "raw" }, { points: smooth(points), kind: "", name: "smooth" }, { points: state.held, kind: "held", name: "held", dots: true }];
	view.bpb.series = [{ points: state.bpb, kind: "held", name: "held", dots: true }];
	drawChart(view.loss);
	drawChart(view.bpb);
	drawHeat(view, state);
	view.samples.hidden = !state.samples.length;
	if (view.said !== state.samples.length) {
		view.said = state.samples.length;
		view.samples.replaceChildren(el("h3", {}, t("samples")), ...state.samples.slice(-6).reverse().map(({ step, prompt, text }) => {
			const [lead, words] = [String(prompt ?? ""), String(text ?? "")];
			return el("div", { class: "sample" }, el("small", {}, `${t("step").toLowerCase()} ${whole(step)}`), el("p", {}, el("b", {}, lead), words.startsWith(lead) ? words.slice(lead.length) : words));
		}));
	}
}

function openRun(name) {
	if (open?.name !== name) open = { name, next: 0, state: fresh(), view: null };
	open.view = makeView(name);
	showRun();
}

function emptyRuns(...content) { $("run").replaceChildren(el("div", { class: "empty" }, ...content)); }

async function refreshRuns() {
	runs = (await (await api("/api/runs")).json()).runs;
	const wanted = decodeURIComponent(location.hash.split("/")[1] ?? "");
	const name = wanted || open?.name || (runs.find((run) => run.alive) ?? runs[0])?.name;
	if (!name) { showList(); return emptyRuns(el("p", {}, t("noRuns")), el("p", {}, el("code", {}, "minga train --data data --out runs/mine"))); }
	if (open?.name !== name || !open.view) openRun(name);
	showList();
	const mine = open;
	let lines, next;
	do { // the server hands out a long run in parts
		({ lines, next } = await (await api(`/api/runs/${encodeURIComponent(name)}?after=${mine.next}`)).json());
		if (mine !== open) return; // another run was chosen meanwhile
		if (next < mine.next) { mine.state = fresh(); mine.next = 0; return; } // the file was begun anew
		for (const line of lines) absorb(mine.state, line);
		mine.next = next;
	} while (lines.length > 99);
	showRun();
}

// the page
const onRuns = () => location.hash.startsWith("#runs");
function route() {
	const on = onRuns();
	$("chat").hidden = on;
	$("runs").hidden = !on;
	mark($("nav-chat"), !on);
	mark($("nav-runs"), on);
	if (on) tick();
}
let ticking = false;
async function tick() {
	if (ticking || document.hidden || !onRuns()) return;
	ticking = true;
	try { await refreshRuns(); } catch (error) { 
		if (error.status === 404) history.replaceState(null, "", "#runs"); // the run is gone: show another
		if (error.status) { open = null; emptyRuns(el("p", {}, error.message)); }
	}
	ticking = false;
}
async function pulse() { // is the server there; which Minga is it
	if (document.hidden) return;
	try {
		const status = await (await api("/api/status", {}, true)).json();
		if (status.version) $("version").textContent = `Minga ${status.version}`;
		if (!chat.model) await loadModels();
	} catch { /* api() has shown the banner; the next pulse takes it away */ }
}

addEventListener("hashchange", () => { if (location.hash !== "#main") route(); });
addEventListener("resize", () => { if (open?.view && onRuns()) { drawChart(open.view.loss); drawChart(open.view.bpb); } });
$("lang").addEventListener("click", () => {
	lang = lang === "en" ? "es" : "en";
	keep(localStorage, "lang", lang);
	speak();
	if (!abort) showChat();
	if (open?.view) openRun(open.name);
	route();
});

async function begin() {
	speak();
	showChat();
	route();
	setInterval(tick, 2000);
	setInterval(pulse, 10000);
	pulse();
	try { await loadModels(); } catch (error) { return tell(error.message); }
	const address = new URL(location.href), say = address.searchParams.get("say");
	if (!say) return;
	address.searchParams.delete("say"); // a reload must not say it twice
	history.replaceState(null, "", address);
	send(say);
}
begin();
