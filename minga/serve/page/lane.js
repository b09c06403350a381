// One column of the chat: a model, its temperature, and the conversation with it. Sent whole with each message, the
// answer painted as it arrives.
import { api, events } from "./api.js";
import { el, tell } from "./dom.js";
import { Answer, Question } from "./message.js";
import { fields, system } from "./settings.js";
import { said, t } from "./words.js";

const TEMPERATURE = "0.7";

// What the server is told of a message: nothing of how fast it came or how it looked.
function wire({ role, content, reasoning_content, tool_calls, tool_call_id }, whole) {
	return {
		role, content,
		...(reasoning_content && { reasoning_content }), ...(whole && { tool_calls }), ...(tool_call_id && { tool_call_id }),
	};
}

// A stream brings a call's name once and its arguments in pieces.
function gather(calls, pieces) {
	for (const { index, id, function: { name, arguments: part } = {} } of pieces) {
		const call = calls[index] ??= { id: `call_${index}`, type: "function", function: { name: "", arguments: "" } };
		if (id) call.id = id;
		if (name) call.function.name = name;
		call.function.arguments += part ?? "";
	}
}

export class Lane {
	abort = null; // stops the answer under way; null when there is none
	#views = []; // of messages, in their order; a tool's result is part of the answer that asked for it
	#models = el("select", { class: "model" });
	#temperature = el("input", { type: "number", min: 0, max: 2, step: 0.1 });
	log = el("div", { class: "log", role: "log", "aria-live": "off", tabindex: 0, "data-t-label": "conversation" });

	// `hooks`: changed() after each change, edit(n, text) for the reader's n-th message, used(model, usage), welcome().
	constructor(state, hooks) {
		this.state = state;
		this.hooks = hooks;
		state.messages ??= [];
		state.temperature ??= TEMPERATURE;
		const head = el("div", { class: "lane-head" },
			el("label", { class: "picker" }, said("span", "model", { class: "sr" }), this.#models),
			el("label", { class: "heat" }, said("span", "temperature"), this.#temperature));
		this.node = el("section", { class: "lane" }, head, this.log);
		this.#temperature.value = state.temperature;
		this.#models.addEventListener("change", () => { state.model = this.#models.value; hooks.changed(); });
		this.#temperature.addEventListener("change", () => {
			if (this.#temperature.reportValidity()) state.temperature = this.#temperature.value;
			hooks.changed();
		});
	}

	offer(names, preferred) {
		if (!names.includes(this.state.model)) this.state.model = preferred;
		this.#models.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
		this.#models.value = this.state.model;
	}

	// ---- what is on the page

	show() {
		this.#views = [];
		this.log.replaceChildren();
		for (const message of this.state.messages) this.#add(message);
		if (!this.#views.length) this.log.append(this.hooks.welcome());
		this.log.scrollTop = this.log.scrollHeight;
	}

	// In another language, say.
	repaint() {
		if (this.#views.length) for (const view of this.#views) view.paint();
		else this.show();
	}

	#add(message) {
		if (message.role === "tool") return;
		const { messages } = this.state;
		const view = message.role === "user"
			? new Question(message, (text) => this.hooks.edit(messages.filter(({ role }) => role === "user").indexOf(message), text))
			: new Answer(message, {
				retry: () => this.retry(),
				result: (call, text) => this.#takeResult(call, text),
				given: (call) => this.#result(message, call),
				waits: (message) => this.#waits(message),
			});
		if (!this.#views.length) this.log.replaceChildren();
		this.#views.push(view);
		this.log.append(view.node);
		view.paint();
		return view;
	}

	#follow(change) { // to the end, unless the reader has scrolled away
		const { log } = this, atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
		change();
		if (atEnd) log.scrollTop = log.scrollHeight;
	}

	// ---- tools

	// What the tools gave stands right after the answer that asked for it.
	#results(message) {
		const { messages } = this.state, rest = messages.slice(messages.indexOf(message) + 1);
		const end = rest.findIndex(({ role }) => role !== "tool");
		return end < 0 ? rest : rest.slice(0, end);
	}

	#result(message, call) { return this.#results(message).find(({ tool_call_id }) => tool_call_id === call.id)?.content ?? null; }

	// Calls that a stop or a limit has cut are shown, and neither answered nor sent back.
	#whole({ tool_calls, end }) { return !!tool_calls?.length && (end === "tool_calls" || end === "stop"); }

	#waits(message) { return this.#whole(message) && this.#results(message).length < message.tool_calls.length; }

	#takeResult(call, text) {
		const view = this.#views.at(-1);
		if (this.abort || !this.#waits(view.message)) return;
		this.state.messages.push({ role: "tool", tool_call_id: call.id, content: text });
		view.paint();
		if (this.#waits(view.message)) view.askResult();
		else this.answer();
		this.hooks.changed();
	}

	// Does the last answer wait for a tool's result? Then the focus goes there.
	get blocked() {
		const view = this.#views.at(-1);
		if (!(view instanceof Answer) || !this.#waits(view.message)) return false;
		view.askResult();
		tell(t("resultFirst"));
		return true;
	}

	// ---- asking

	say(text) {
		const message = { role: "user", content: text };
		this.state.messages.push(message);
		this.#add(message);
		this.answer();
	}

	// The last answer anew; what tools gave before it stays.
	retry() {
		const { messages } = this.state;
		if (this.abort) return;
		messages.length = messages.findLastIndex(({ role }) => role === "assistant");
		this.show();
		this.answer();
	}

	// The conversation up to the reader's n-th message, which becomes `text`.
	edit(n, text) {
		const { messages } = this.state, asked = messages.filter(({ role }) => role === "user")[n];
		this.abort?.abort();
		messages.length = messages.indexOf(asked);
		this.show();
		this.say(text);
	}

	editLast() { this.#views.findLast((view) => view instanceof Question)?.edit(); }

	clear() {
		this.abort?.abort();
		this.state.messages = [];
		this.show();
	}

	#request(signal) {
		const messages = this.state.messages.filter((message) => message.content || message.role === "tool" || this.#whole(message));
		const told = messages.map((message) => wire(message, this.#whole(message)));
		if (system()) told.unshift({ role: "system", content: system() });
		const body = { model: this.state.model, messages: told, stream: true, stream_options: { include_usage: true }, ...fields() };
		if (this.state.temperature !== "") body.temperature = Number(this.state.temperature);
		return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
	}

	async answer() {
		const control = this.abort = new AbortController(), asked = this.#request(control.signal), { messages } = this.state;
		const message = { role: "assistant", content: "", model: this.state.model, tokens: 0 };
		messages.push(message);
		const view = this.#add(message);
		view.live = true;
		view.paint();
		this.log.scrollTop = this.log.scrollHeight;
		this.hooks.changed();
		tell(t("answering"));
		let began = 0, frame = 0;
		const draw = () => { frame = 0; this.#follow(() => view.paint()); };
		try {
			for await (const event of events(await api("/v1/chat/completions", asked))) {
				if (event.error) throw new Error(event.error.message);
				const { delta = {}, finish_reason } = event.choices?.[0] ?? {}, now = performance.now();
				message.end = finish_reason ?? message.end;
				if (delta.reasoning_content || delta.content || delta.tool_calls) {
					message.tokens++;
					began ||= now;
				}
				if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
				else if (message.reasoning_content && (delta.content || delta.tool_calls)) message.seconds ??= (now - began) / 1000;
				message.content += delta.content ?? "";
				if (delta.tool_calls) gather(message.tool_calls ??= [], delta.tool_calls);
				if (event.usage) {
					message.usage = event.usage;
					message.tokens = event.usage.completion_tokens; // exact: a piece may hold several
				}
				if (began && now - began > 50) message.rate = (message.tokens - 1) / (now - began) * 1000;
				frame ||= requestAnimationFrame(draw);
			}
		} catch (error) {
			if (control.signal.aborted) message.end = "stopped";
			else message.error = error.message;
		}
		cancelAnimationFrame(frame);
		if (this.abort === control) this.abort = null;
		if (message.usage) this.hooks.used(message.model, message.usage);
		view.live = false;
		this.#follow(() => view.paint());
		this.hooks.changed();
		if (!this.state.messages.includes(message)) return; // cleared meanwhile
		if (this.#waits(message) && !document.activeElement.value) view.askResult(); // who is writing goes on writing
		tell(this.#told(message));
	}

	#told({ error, content, tool_calls, end, model }) {
		if (error) return `${t("failed")}: ${error}`;
		const calls = (tool_calls ?? []).map((call) => `${t("call")}: ${call.function.name}`);
		const words = [content, ...calls, end === "content_filter" ? t("filtered") : "", end === "stopped" ? t("stopped") : ""];
		return `${model}: ${words.filter(Boolean).join(" ")}`;
	}
}
