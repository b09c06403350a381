// What the page says, in English and Spanish, and how it writes numbers.
import { $, keep, recall } from "./dom.js";

const WORDS = {
	tagline: ["a model of your own, on the machines you have", "un modelo propio, en las máquinas que tienes"],
	skip: ["Skip to content", "Ir al contenido"],
	offline: ["The server does not answer. Trying again…", "El servidor no responde. Reintentando…"],
	keyTitle: ["This server asks for a key", "Este servidor pide una clave"],
	key: ["Key", "Clave"],
	cancel: ["Cancel", "Cancelar"],
	continue: ["Continue", "Continuar"],

	chat: ["Chat", "Chat"],
	model: ["Model", "Modelo"],
	settings: ["Settings", "Ajustes"],
	clear: ["Clear", "Borrar"],
	system: ["System prompt", "Instrucción de sistema"],
	temperature: ["Temperature", "Temperatura"],
	topP: ["Top-p", "Top-p"],
	maxTokens: ["Most tokens", "Máx. de tokens"],
	conversation: ["Conversation", "Conversación"],
	say: ["Write a message", "Escribe un mensaje"],
	send: ["Send", "Enviar"],
	stop: ["Stop", "Parar"],
	keys: ["Enter sends · Shift + Enter new line · Esc stops", "Enter envía · Mayús + Enter nueva línea · Esc detiene"],
	welcome: ["It runs here, and what you write stays here.", "Corre aquí, y lo que escribes se queda aquí."],
	idea1: ["Tell me a short story about the sea.", "Cuéntame un cuento corto sobre el mar."],
	idea2: ["What is a neural network?", "¿Qué es una red neuronal?"],
	you: ["You", "Tú"],
	retry: ["Retry", "Reintentar"],
	copy: ["Copy", "Copiar"],
	copied: ["Copied", "Copiado"],
	stopped: ["stopped", "detenida"],
	cut: ["cut at the limit", "cortada en el límite"],
	answering: ["Answering", "Respondiendo"],
	failed: ["The answer did not arrive", "La respuesta no llegó"],
	tokens: ["tokens", "tokens"],

	runs: ["Runs", "Corridas"],
	noRuns: ["No runs yet. Start one:", "Aún no hay corridas. Empieza una:"],
	running: ["training", "entrenando"],
	done: ["finished", "terminada"],
	halted: ["stopped", "detenida"],
	dead: ["interrupted", "interrumpida"],
	deadText: ["Its last checkpoint can be resumed.", "Su último punto de control se puede reanudar."],
	nothing: ["Nothing written yet.", "Todavía no hay nada escrito."],
	step: ["Step", "Paso"],
	of: ["of", "de"],
	loss: ["Loss", "Pérdida"],
	bpb: ["Bits per byte", "Bits por byte"],
	speed: ["Tokens a second", "Tokens por segundo"],
	speedCurve: ["Speed (tokens a second)", "Velocidad (tokens por segundo)"],
	mfu: ["MFU", "MFU"],
	mfuCurve: ["MFU (share of the peak in its precision)", "MFU (parte del máximo en su precisión)"],
	memory: ["Memory", "Memoria"],
	lr: ["Learning rate", "Tasa de aprendizaje"],
	norm: ["Gradient norm", "Norma del gradiente"],
	skipped: ["skipped steps", "pasos omitidos"],
	left: ["Time left", "Tiempo restante"],
	elapsed: ["Time", "Tiempo"],
	seen: ["Tokens seen", "Tokens vistos"],
	params: ["Parameters", "Parámetros"],
	active: ["active", "activos"],
	mtp: ["MTP acceptance", "Aceptación MTP"],
	mtpCurve: ["MTP acceptance (share of drafts)", "Aceptación MTP (parte de los borradores)"],
	lossCurve: ["Loss (nats a token)", "Pérdida (nats por token)"],
	smooth: ["training", "entrenamiento"],
	held: ["held-out", "reservado"],
	experts: ["Expert load", "Carga de expertos"],
	expertsOverTime: ["Expert load over time (bands: layers)", "Carga de expertos en el tiempo (bandas: capas)"],
	hot: ["twice its share", "el doble de su parte"],
	cold: ["half", "la mitad"],
	worst: ["busiest / mean", "más ocupado / media"],
	samples: ["Samples", "Muestras"],
};

export let lang = recall("lang", navigator.language.startsWith("es") ? "es" : "en");
export const t = (word) => WORDS[word][lang === "es" ? 1 : 0];

export function speak(language) {
	document.documentElement.lang = lang = language;
	for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
	for (const node of document.querySelectorAll("[data-t-label]")) node.ariaLabel = t(node.dataset.tLabel);
	for (const node of document.querySelectorAll("[data-t-hint]")) node.placeholder = t(node.dataset.tHint);
	$("lang").textContent = lang === "en" ? "Español" : "English";
}
export function switchLanguage() {
	speak(lang === "en" ? "es" : "en");
	keep("lang", lang);
}

export const finite = Number.isFinite; // of numbers only: null, a text and a list are not
const format = (x, options) => finite(x) ? new Intl.NumberFormat(lang, options).format(x) : "–";
export const number = (x, digits = 2) => format(x, { maximumFractionDigits: digits, minimumFractionDigits: Math.abs(x) < 100 ? digits : 0 });
export const whole = (x) => format(x, { maximumFractionDigits: 0 });
export const compact = (x) => format(x, { notation: "compact", maximumSignificantDigits: 3 });
export const percent = (x) => format(x, { style: "percent" });
export const gigabytes = (x) => finite(x) ? `${number(x / 1e9)} GB` : "–";
export function duration(seconds) {
	if (!finite(seconds)) return "–";
	const s = Math.max(0, Math.round(seconds)), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
	return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}
