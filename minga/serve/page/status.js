// The line at the foot: what the server is doing, the memory of its caches, and what the conversation has cost.
import { read } from "./api.js";
import { $ } from "./dom.js";
import { finite, gigabytes, money, number, percent, t, whole } from "./words.js";

let status = null; // the server's last word

export async function readStatus() {
	status = await read("/api/status", true);
	showStatus();
}

// What an answer's tokens cost, in { amount, currency }; null where the model has no price.
export function cost(name, usage) {
	const { price_per_million_tokens: price, currency } = status?.models?.find((model) => model.name === name) ?? {};
	const tokens = usage.prompt_tokens + usage.completion_tokens;
	return finite(price) && currency ? { amount: price * tokens / 1e6, currency } : null;
}

// One reading for all models: they share the machine's memory.
function showMemory(models) {
	const known = models.filter((model) => finite(model.kv_bytes) && model.kv_bytes_total > 0), meter = $("kv");
	const sum = (key) => known.reduce((sum, model) => sum + model[key], 0), used = sum("kv_bytes"), total = sum("kv_bytes_total");
	$("memory").hidden = !known.length;
	if (!known.length) return;
	meter.value = used / total;
	meter.textContent = percent(used / total);
	meter.title = `${gigabytes(used)} ${t("of")} ${gigabytes(total)}`;
	$("kv-text").textContent = percent(used / total);
}

let spent = null;
export function showSpent(sum) {
	spent = sum;
	showStatus();
}

export function showStatus() {
	if (status) {
		const { models = [], running, waiting, tokens_per_second: rate, version } = status, parts = [];
		showMemory(models);
		if (running) parts.push(`${whole(running)} ${t("atWork")}`);
		if (waiting) parts.push(`${whole(waiting)} ${t("waiting")}`);
		if (running && finite(rate) && rate > 0) parts.push(`${number(rate, 1)} ${t("tokens")}/s`);
		$("load").textContent = parts.join(" · ");
		$("version").textContent = `Minga ${version}`;
	}
	$("spent").textContent = spent ? `${t("cost")} ${money(spent.amount, spent.currency)}` : "";
}
