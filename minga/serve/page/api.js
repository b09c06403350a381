// The server: requests, its key where it asks for one, and streams.
import { $, keep, recall } from "./dom.js";

const savedKey = () => recall("key", "", sessionStorage);
let asking = null; // one question for the key, however many requests wait for it
let declined = false; // after a no, what refreshes by itself does not ask again

function askKey() {
	asking ??= new Promise((resolve) => {
		const dialog = $("key-dialog");
		dialog.returnValue = $("key").value = "";
		dialog.addEventListener("close", () => {
			asking = null;
			declined = !dialog.returnValue;
			resolve(!declined);
		}, { once: true });
		dialog.showModal();
	});
	return asking;
}
$("key-form").addEventListener("submit", (event) => {
	event.preventDefault();
	keep("key", $("key").value, sessionStorage);
	$("key-dialog").close("ok");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));

// Raises an error with the server's own words, its status and its body. `quiet` requests never ask for the key.
export async function api(path, options = {}, quiet = false) {
	for (;;) {
		const key = savedKey(), headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
		let reply;
		try {
			reply = await fetch(path, { ...options, headers });
		} catch (error) {
			$("offline").hidden = error.name === "AbortError";
			throw error;
		}
		$("offline").hidden = true;
		if (reply.ok) return reply;
		if (reply.status === 401) {
			if (savedKey() !== key) continue; // another request has asked meanwhile
			if (!quiet && !(declined && !options.method) && await askKey()) continue;
		}
		const body = await reply.json().catch(() => ({}));
		throw Object.assign(new Error(body.error?.message ?? `HTTP ${reply.status}`), { status: reply.status, body });
	}
}

export const read = async (path, quiet) => (await api(path, {}, quiet)).json();

// The documents of a stream of server-sent events.
export async function* events(reply) {
	const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = "";
	for (;;) {
		const { value, done } = await reader.read();
		if (done) return;
		const lines = (rest + value).split("\n");
		rest = lines.pop();
		for (const line of lines) {
			if (line === "data: [DONE]") return;
			if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
		}
	}
}
