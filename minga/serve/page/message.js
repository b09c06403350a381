// How a message looks, while it arrives and after. What changes is painted in place: nothing that is read, held by the
// focus or unfolded by the reader is made anew.
import { build, el, grow, tell } from "./dom.js";
import { markdown } from "./markdown.js";
import { duration, number, said, t, whole } from "./words.js";

async function copy(text, button) {
	await navigator.clipboard?.writeText(text); // browsers have no clipboard on http: pages of other machines
	if (!navigator.clipboard) return;
	tell(button.textContent = t("copied"));
	setTimeout(() => { button.textContent = t("copy"); }, 2_000);
}

// A code block gets a head with its language and a button.
function dress(node) {
	if (node.localName !== "pre") return node;
	const button = said("button", "copy", { class: "ghost small", type: "button", onclick: () => copy(node.textContent, button) });
	return el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, node.dataset.language ?? ""), button), node);
}

// Markdown that grows: only the blocks that differ from the last painting are built.
class Prose {
	node = el("div", { class: "text" });
	#shown = [];

	show(text) {
		const trees = markdown(text), keys = trees.map((tree) => JSON.stringify(tree));
		trees.forEach((tree, i) => {
			if (keys[i] === this.#shown[i]) return;
			const made = build(tree, dress), old = this.node.children[i];
			if (old) old.replaceWith(made);
			else this.node.append(made);
		});
		while (this.node.children.length > trees.length) this.node.lastElementChild.remove();
		this.#shown = keys;
	}
}

// What the reader said, with a way to say it otherwise: `onedit` gets the new text.
export class Question {
	#text;
	#pen;
	#form = null;

	constructor(message, onedit) {
		this.message = message;
		this.onedit = onedit;
		this.#text = el("div", { class: "text" }, message.content);
		this.#pen = said("button", "edit", { class: "ghost small", type: "button", onclick: () => this.edit() });
		this.node = el("article", { class: "msg user" }, said("span", "you", { class: "sr" }), this.#pen, this.#text);
	}

	edit() {
		if (this.#form) return;
		const box = el("textarea", { rows: 1, "aria-label": t("edit"), oninput: () => grow(box) });
		const close = () => { this.#form.replaceWith(this.#pen, this.#text); this.#form = null; };
		box.value = this.message.content;
		box.addEventListener("keydown", (event) => {
			if (event.key === "Escape") {
				event.stopPropagation();
				close();
				this.#pen.focus();
			} else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
				event.preventDefault();
				this.#form.requestSubmit();
			}
		});
		const cancel = said("button", "cancel", { class: "ghost small", type: "button", onclick: () => { close(); this.#pen.focus(); } });
		const submit = said("button", "send", { class: "solid small", type: "submit" });
		this.#form = el("form", { class: "edit" }, box, el("p", { class: "row" }, cancel, submit));
		this.#form.addEventListener("submit", (event) => {
			event.preventDefault();
			if (box.value.trim()) this.onedit(box.value.trim());
		});
		this.#pen.remove();
		this.#text.replaceWith(this.#form);
		grow(box);
		box.focus();
	}

	paint() {}
}

// JSON on one line where it is short; what is no JSON, or not yet, as it is.
function pretty(json) {
	try {
		const value = JSON.parse(json), line = JSON.stringify(value, null, 1).replace(/\n\s*/g, " ");
		return line.length <= 64 ? line : JSON.stringify(value, null, 2);
	} catch { return json; }
}

// A function that the model wants called: its name, its arguments, and what it gave or a place to write that.
class Call {
	#name = el("b");
	#arguments = el("code");
	#result = el("div", { class: "result" });
	#asked = false;

	constructor(call, onresult) {
		this.call = call;
		this.onresult = onresult;
		this.node = el("section", { class: "call" },
			el("p", { class: "call-head" }, said("span", "call"), this.#name),
			el("pre", { tabindex: 0 }, this.#arguments), this.#result);
	}

	// `result` is the text that was given, or null; `open`: one is waited for.
	paint(result, open) {
		this.#name.textContent = this.call.function.name;
		this.#arguments.textContent = pretty(this.call.function.arguments);
		if (result !== null) {
			const text = el("pre", { tabindex: 0 }, el("code", {}, pretty(result)));
			this.#result.replaceChildren(said("p", "result", { class: "label" }), text);
		} else if (open && !this.#asked) this.#ask();
		else if (!open) this.#result.replaceChildren();
		this.#asked = open && result === null;
	}

	#ask() {
		const box = el("textarea", { rows: 2, class: "mono", oninput: () => grow(box) });
		const form = el("form", {}, el("label", {}, said("span", "result", { class: "label" }), box),
			said("button", "sendResult", { class: "solid small", type: "submit" }));
		form.addEventListener("submit", (event) => {
			event.preventDefault();
			this.onresult(this.call, box.value);
		});
		this.#result.replaceChildren(form);
	}
}

function footnote({ tokens, rate, end, usage }) {
	const parts = tokens ? [`${whole(tokens)} ${t(tokens === 1 ? "token" : "tokens")}`] : [];
	if (rate) parts.push(`${number(rate, 1)} ${t("tokens")}/s`);
	const thinking = usage?.completion_tokens_details?.reasoning_tokens, cached = usage?.prompt_tokens_details?.cached_tokens;
	if (thinking) parts.push(`${whole(thinking)} ${t("ofThem")}`);
	if (cached) parts.push(`${whole(cached)} ${t("of")} ${whole(usage.prompt_tokens)} ${t("cached")}`);
	if (end === "length") parts.push(t("cut"));
	if (end === "stopped") parts.push(t("stopped"));
	return parts.join(" · ");
}

// `actions`: retry(), result(call, text), given(call) -> text or null, waits(message) -> whether it waits for results.
export class Answer {
	live = false;
	#thought = new Prose();
	#think = el("details", { class: "think", hidden: "" });
	#summary = el("summary");
	#wait = el("span", { class: "wait" });
	#answer = new Prose();
	#calls = el("div", { class: "calls" });
	#cards = [];
	#notice = el("p", { class: "notice", hidden: "" });
	#error = el("p", { class: "error", hidden: "" });
	#stats = el("span", { class: "stats" });
	#folded = false;

	constructor(message, actions) {
		this.message = message;
		this.actions = actions;
		this.#think.append(this.#summary, this.#thought.node);
		const button = (word, onclick) => said("button", word, { class: `ghost small ${word}`, type: "button", onclick });
		const copied = button("copy", () => copy(message.content, copied));
		const foot = el("div", { class: "foot" }, this.#stats, button("retry", actions.retry), copied);
		this.node = el("article", { class: "msg bot" }, el("p", { class: "who" }, message.model), this.#think, this.#wait,
			this.#answer.node, this.#calls, this.#notice, this.#error, foot);
	}

	paint() {
		const { content, reasoning_content: thought, tool_calls: calls = [], error, end, seconds } = this.message;
		const thinking = this.live && !content && !calls.length;
		this.node.classList.toggle("live", this.live);
		this.node.classList.toggle("mute", !content);
		this.#wait.hidden = !this.live || !!(content || thought || calls.length);
		if (thought) {
			if (this.#think.hidden) this.#think.open = thinking;
			this.#think.hidden = false;
			const thoughts = seconds >= 0 ? `${t("thought")} ${duration(seconds, 1)}` : t("thoughts");
			this.#summary.textContent = thinking ? `${t("thinking")}…` : thoughts;
			this.#thought.show(thought);
			if (!thinking && !this.#folded) this.#think.open = false; // once: the reader may open it again
			this.#folded ||= !thinking;
		}
		this.#answer.show(content);
		calls.forEach((call, i) => {
			if (!this.#cards[i]) {
				this.#cards[i] = new Call(call, this.actions.result);
				this.#calls.append(this.#cards[i].node);
			}
			this.#cards[i].paint(this.actions.given(call), !this.live && this.actions.waits(this.message));
		});
		this.#notice.hidden = end !== "content_filter";
		this.#notice.textContent = t("filtered");
		this.#error.hidden = !error;
		this.#error.textContent = `${t("failed")}: ${error}`;
		this.#stats.textContent = footnote(this.message);
	}

	// The field that waits for a tool's result.
	askResult() { this.#calls.querySelector("textarea")?.focus(); }
}
