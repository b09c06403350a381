// The chat: one column, or two that are asked the same side by side; what is written for them, and what they cost.
import { read } from "./api.js";
import { $, el, grow, keep, recall, tell } from "./dom.js";
import { Lane } from "./lane.js";
import { startSettings, toggleDrawer } from "./settings.js";
import { cost, showSpent } from "./status.js";
import { said, t } from "./words.js";

const chat = { lanes: [{}, {}], both: false, spent: null, ...recall("chat", {}) };
const save = () => keep("chat", chat);
const lanes = chat.lanes.map((state) => new Lane(state, { changed, used, edit, welcome }));
const shown = () => chat.both ? lanes : lanes.slice(0, 1);
export const busy = () => lanes.some((lane) => lane.abort);
const stop = () => lanes.forEach((lane) => lane.abort?.abort());

export async function loadModels(quiet) {
	if (lanes[0].state.model && document.querySelector(".model").options.length) return;
	const names = (await read("/v1/models", quiet)).data.map((model) => model.id);
	lanes.forEach((lane, i) => lane.offer(names, names[i] ?? names[0]));
	showButtons();
}

function changed() {
	save();
	showButtons();
}

function used(model, usage) {
	const more = cost(model, usage);
	if (!more) return;
	const before = chat.spent?.currency === more.currency ? chat.spent.amount : 0;
	showSpent(chat.spent = { ...more, amount: before + more.amount });
}

function showButtons() {
	const button = $("send"), stops = busy();
	button.dataset.t = stops ? "stop" : "send";
	button.textContent = t(button.dataset.t);
	button.classList.toggle("stop", stops);
	button.disabled = !stops && !(lanes[0].state.model && $("say").value.trim());
	$("clear").disabled = !shown().some((lane) => lane.state.messages.length);
}

function welcome() {
	if (chat.both) return said("p", "compareHint", { class: "welcome" });
	const idea = (word) => said("button", word, { type: "button", onclick: () => send(t(word)) });
	const ideas = el("div", { class: "chips" }, idea("idea1"), idea("idea2"));
	return el("div", { class: "welcome" }, said("h1", "tagline"), said("p", "welcome"), ideas);
}

// ---- what the reader does

export function send(text) {
	if (busy() || !lanes[0].state.model || !text.trim() || shown().some((lane) => lane.blocked)) return false;
	for (const lane of shown()) lane.say(text.trim());
	return true;
}

function submit() {
	if (!send($("say").value)) return;
	$("say").value = "";
	grow($("say"));
	showButtons();
}

// Both columns hold the same questions, so one that is edited in one of them is edited in both.
function edit(n, text) {
	stop();
	for (const lane of shown()) lane.edit(n, text);
	$("say").focus();
}

function clear() {
	for (const lane of lanes) lane.clear();
	showSpent(chat.spent = null);
	changed();
	$("say").focus();
}

// The second column begins with what has been said in the first.
function compare() {
	stop();
	chat.both = !chat.both;
	lanes[1].state.messages = chat.both ? structuredClone(lanes[0].state.messages) : [];
	lanes.forEach((lane) => lane.show());
	showLanes();
	tell(t(chat.both ? "compareOn" : "compareOff"));
	changed();
}

function showLanes() {
	lanes[1].node.hidden = !chat.both;
	$("chat").classList.toggle("both", chat.both);
	$("compare").ariaPressed = chat.both;
	lanes.forEach((lane, i) => { lane.node.ariaLabel = `${t("model")} ${i + 1}`; });
}

export function repaint() {
	lanes.forEach((lane) => lane.repaint());
	showLanes();
	showButtons();
}

const writes = (node) => node.closest("input, textarea, select");

function onKey(event) {
	if (document.querySelector("dialog[open]")) return;
	if (event.key === "Escape") {
		if (busy()) stop();
		else if (!$("drawer").hidden) toggleDrawer();
	} else if (event.key === "?" && !writes(event.target)) $("help-dialog").showModal();
}

function onComposerKey(event) {
	if (event.isComposing) return; // an input method's keys are not ours
	if (event.key === "Enter" && !event.shiftKey) {
		event.preventDefault();
		submit();
	} else if (event.key === "ArrowUp" && !$("say").value) {
		event.preventDefault();
		lanes[0].editLast();
	}
}

export function startChat() {
	$("lanes").append(...lanes.map((lane) => lane.node));
	$("composer").addEventListener("submit", (event) => {
		event.preventDefault();
		if (busy()) stop();
		else submit();
		if (!document.activeElement.closest(".call")) $("say").focus();
	});
	$("say").addEventListener("input", () => { grow($("say")); showButtons(); });
	$("say").addEventListener("keydown", onComposerKey);
	document.addEventListener("keydown", onKey);
	$("compare").addEventListener("click", compare);
	$("clear").addEventListener("click", clear);
	$("help").addEventListener("click", () => $("help-dialog").showModal());
	addEventListener("pagehide", save);
	startSettings();
	lanes.forEach((lane) => lane.show());
	showLanes();
	showButtons();
	showSpent(chat.spent);
}
