// Minga's page: talk to models, watch runs learn. No framework, no build, nothing from elsewhere.
import { read } from "./api.js";
import * as chat from "./chat.js";
import { $, tell } from "./dom.js";
import * as runs from "./runs.js";
import { readStatus, showStatus } from "./status.js";
import { lang, speak, switchLanguage } from "./words.js";

const TICK = 2_000; // milliseconds
const REST = 5; // ticks between two looks at a server that answers nobody here

// The part of the address after # says what is shown: #chat, #runs or #runs/NAME.
function route() {
	if (location.hash === "#main") return; // the link that skips to the content
	const onRuns = location.hash.startsWith("#runs");
	for (const [name, shown] of [["chat", !onRuns], ["runs", onRuns]]) {
		$(name).hidden = !shown;
		$(`nav-${name}`).ariaCurrent = shown ? "page" : null;
	}
	runs.tick();
}

// Is the server there, and how is it? api() shows the banner and takes it away. While it answers us it is asked more often.
let beats = 0;
async function pulse() {
	if (document.hidden || !chat.busy() && beats++ % REST) return;
	try {
		await readStatus();
		await chat.loadModels(true);
	} catch { /* the next pulse tries again */ }
}

// ?say=... sends a first message; a reload does not send it again.
async function begin() {
	try { await chat.loadModels(); } catch (error) { return tell(error.message); }
	performance.mark("ready"); // what is written can be sent
	const address = new URL(location), say = address.searchParams.get("say");
	if (!say) return;
	address.searchParams.delete("say");
	history.replaceState(null, "", address);
	chat.send(say);
}

addEventListener("hashchange", route);
addEventListener("resize", runs.redraw);
$("lang").addEventListener("click", () => {
	switchLanguage();
	chat.repaint();
	runs.repaint();
	showStatus();
});
chat.startChat();
speak(lang);
route();
begin();
pulse();
setInterval(runs.tick, TICK);
setInterval(pulse, TICK);
