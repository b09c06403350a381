// The drawer: what is asked of each model besides the messages. Kept in this browser; an empty field is not sent.
import { $, keep, recall, tell } from "./dom.js";
import { t } from "./words.js";

const NUMBERS = { top_p: "0.95", max_tokens: "1024", top_k: "", min_p: "", seed: "", thinking_budget: "" };
const TEXTS = { system: "", reasoning_effort: "", tools: "" };
const settings = { ...NUMBERS, ...TEXTS, ...recall("settings", {}) };

export const system = () => settings.system.trim();

// These settings as fields of a request.
export function fields() {
	const body = {};
	for (const name of Object.keys(NUMBERS)) if (settings[name] !== "") body[name] = Number(settings[name]);
	if (settings.reasoning_effort) body.reasoning_effort = settings.reasoning_effort;
	if (settings.tools) body.tools = JSON.parse(settings.tools);
	return body;
}

// What is wrong with a text of tool definitions; nothing if it can be sent.
function complaint(text) {
	if (!text.trim()) return "";
	let tools;
	try { tools = JSON.parse(text); } catch (error) { return `${t("toolsNoJson")}: ${error.message}`; }
	if (!Array.isArray(tools) || !tools.length) return t("toolsNoList");
	const named = (tool) => tool?.type === "function" && typeof tool.function?.name === "string" && tool.function.name;
	const wrong = tools.findIndex((tool) => !named(tool));
	return wrong < 0 ? "" : `${t("toolsWrong")} ${wrong + 1}: {"type": "function", "function": {"name": …}}`;
}

function accept(name) {
	const field = $(name);
	if (name === "tools") {
		const wrong = $("tools-error").textContent = complaint(field.value);
		field.ariaInvalid = !!wrong;
		$("tools-error").scrollIntoView({ block: "nearest" });
		if (wrong) return tell(wrong);
	} else if (!field.reportValidity()) return;
	settings[name] = field.value.trim();
	keep("settings", settings);
}

export function toggleDrawer() {
	const hidden = $("drawer").toggleAttribute("hidden");
	$("settings").ariaExpanded = !hidden;
	$(hidden ? "settings" : "system").focus();
}

export function startSettings() {
	for (const name of Object.keys({ ...NUMBERS, ...TEXTS })) {
		$(name).value = settings[name];
		$(name).addEventListener("change", () => accept(name));
	}
	$("settings").addEventListener("click", toggleDrawer);
}
