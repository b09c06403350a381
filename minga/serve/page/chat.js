// The conversation: kept in this browser, sent whole with each message, the answer painted as it arrives.
import { api, events, read } from "./api.js";
import { $, build, el, keep, recall, tell } from "./dom.js";
import { markdown } from "./markdown.js";
import { number, t, whole } from "./words.js";

const DIALS = { system: "", temperature: "0.7", top_p: "0.95", max_tokens: "256" };
const chat = { messages: [], model: "", ...DIALS, ...recall("chat", {}) };
const save = () => keep("chat", chat);
let abort = null; // stops the answer under way; null when there is none

export async function loadModels(quiet) {
	if (chat.model && $("model").options.length) return;
	const names = (await read("/v1/models", quiet)).data.map((model) => model.id);
	if (!names.includes(chat.model)) chat.model = names[0];
	$("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
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

// ---- what is on the page

function footnote({ tokens, rate, end }) {
	const parts = tokens ? [`${whole(tokens)} ${t("tokens")}`] : [];
	if (rate) parts.push(`${number(rate, 1)} ${t("tokens")}/s`);
	if (end === "length") parts.push(t("cut"));
	if (end === "stopped") parts.push(t("stopped"));
	return parts.join(" · ");
}

// The parts of an answer that change while it arrives.
function paint(node, message) {
	const waiting = abort && !message.content && message === chat.messages.at(-1);
	const text = waiting ? [el("span", { class: "wait" })] : markdown(message.content).map(build);
	if (message.error) text.push(el("p", { class: "error" }, `${t("failed")}: ${message.error}`));
	node.querySelector(".text").replaceChildren(...text);
	node.querySelector(".stats").textContent = footnote(message);
}

function bubble(message, last) {
	const text = el("div", { class: "text" });
	if (message.role === "user") {
		text.append(message.content);
		return el("article", { class: "msg user" }, el("span", { class: "sr" }, t("you")), text);
	}
	const foot = el("div", { class: "foot" }, el("span", { class: "stats" }));
	const button = (word, onclick) => foot.append(el("button", { class: "ghost small", type: "button", onclick }, t(word)));
	if (last && !abort) button("retry", retry);
	if (!(last && abort) && message.content) button("copy", ({ target }) => copy(message.content, target));
	const node = el("article", { class: "msg bot" }, el("p", { class: "who" }, message.model), text, foot);
	paint(node, message);
	return node;
}

async function copy(text, button) {
	await navigator.clipboard?.writeText(text); // browsers have no clipboard on http: pages of other machines
	if (navigator.clipboard) tell(button.textContent = t("copied"));
}

function welcome() {
	const ideas = [t("idea1"), t("idea2")].map((idea) => el("button", { type: "button", onclick: () => send(idea) }, idea));
	return el("div", { class: "welcome" }, el("h1", {}, `Minga: ${t("tagline")}`), el("p", {}, t("welcome")),
		el("div", { class: "chips" }, ...ideas));
}

function showChat() {
	const log = $("log"), { messages } = chat;
	log.replaceChildren(...(messages.length ? messages.map((message) => bubble(message, message === messages.at(-1))) : [welcome()]));
	log.scrollTop = log.scrollHeight;
	$("clear").disabled = !messages.length;
	showSend();
}

// In another language, say. An answer that is arriving keeps its place on the page.
export const repaint = () => abort ? showSend() : showChat();

// ---- asking

export function send(text) {
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
	const told = [{ role: "system", content: chat.system.trim() }, ...chat.messages].filter((message) => message.content);
	const messages = told.map(({ role, content }) => ({ role, content }));
	const body = { model: chat.model, messages, stream: true, stream_options: { include_usage: true } };
	for (const dial of ["temperature", "top_p", "max_tokens"]) if (chat[dial] !== "") body[dial] = Number(chat[dial]);
	return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

async function answer() {
	const asked = request(), control = abort = new AbortController(), log = $("log");
	const message = { role: "assistant", content: "", model: chat.model, tokens: 0 };
	chat.messages.push(message);
	showChat();
	tell(t("answering"));
	const node = log.lastElementChild;
	let began = 0, frame = 0;
	const follow = (change) => { // to the end, unless the reader has scrolled away
		const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
		change();
		if (atEnd) log.scrollTop = log.scrollHeight;
	};
	const draw = () => { frame = 0; follow(() => paint(node, message)); };
	try {
		for await (const event of events(await api("/v1/chat/completions", { ...asked, signal: control.signal }))) {
			if (event.error) throw new Error(event.error.message);
			const choice = event.choices[0], text = choice?.delta.content;
			message.end = choice?.finish_reason ?? message.end;
			if (text) {
				message.content += text;
				message.tokens++;
				began ||= performance.now();
			}
			if (event.usage) message.tokens = event.usage.completion_tokens; // exact: a piece may hold several
			const elapsed = performance.now() - began;
			if (began && elapsed > 50) message.rate = (message.tokens - 1) / elapsed * 1000;
			frame ||= requestAnimationFrame(draw);
		}
	} catch (error) {
		if (control.signal.aborted) message.end = "stopped";
		else message.error = error.message;
	}
	cancelAnimationFrame(frame);
	abort = null;
	if (!chat.messages.includes(message)) return showSend(); // cleared meanwhile
	save();
	follow(() => node.replaceWith(bubble(message, true)));
	showSend();
	tell(message.error ? `${t("failed")}: ${message.error}` : message.content || t("stopped"));
}

// ---- what the reader does

function submit() {
	const text = $("say").value;
	if (abort || !chat.model) return;
	$("say").value = "";
	grow();
	send(text);
}

function grow() {
	const box = $("say");
	box.style.height = "auto";
	box.style.height = `${box.scrollHeight}px`;
}

function toggleDrawer() {
	const hidden = $("drawer").toggleAttribute("hidden");
	$("settings").ariaExpanded = !hidden;
	$(hidden ? "settings" : "system").focus();
}

export function startChat() {
	$("composer").addEventListener("submit", (event) => {
		event.preventDefault();
		if (abort) abort.abort();
		else submit();
		$("say").focus();
	});
	$("say").addEventListener("input", () => { grow(); showSend(); });
	$("say").addEventListener("keydown", (event) => {
		if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method's Enter is not ours
		event.preventDefault();
		submit();
	});
	document.addEventListener("keydown", (event) => {
		if (event.key !== "Escape" || $("key-dialog").open) return;
		if (abort) abort.abort();
		else if (!$("drawer").hidden) toggleDrawer();
	});
	$("settings").addEventListener("click", toggleDrawer);
	for (const dial of Object.keys(DIALS)) {
		$(dial).value = chat[dial];
		$(dial).addEventListener("change", () => {
			if ($(dial).reportValidity()) chat[dial] = $(dial).value;
			save();
		});
	}
	$("model").addEventListener("change", () => { chat.model = $("model").value; save(); });
	$("clear").addEventListener("click", () => {
		abort?.abort();
		chat.messages = [];
		save();
		showChat();
		$("say").focus();
	});
	addEventListener("pagehide", save);
	showChat();
}
