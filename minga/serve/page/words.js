// What the page says, in English and Spanish, and how it writes numbers.
import { $, el, keep, recall } from "./dom.js";

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
	temperature: ["Temperature", "Temperatura"],
	conversation: ["Conversation", "Conversación"],
	say: ["Write a message", "Escribe un mensaje"],
	send: ["Send", "Enviar"],
	stop: ["Stop", "Parar"],
	clear: ["Clear", "Borrar"],
	welcome: ["It runs here, and what you write stays here.", "Corre aquí, y lo que escribes se queda aquí."],
	idea1: ["Tell me a short story about the sea.", "Cuéntame un cuento corto sobre el mar."],
	idea2: ["What is a neural network?", "¿Qué es una red neuronal?"],
	compare: ["Compare", "Comparar"],
	compareHint: ["The same question to both, side by side.", "La misma pregunta a los dos, lado a lado."],
	compareOn: ["Two models are asked side by side", "Se pregunta a dos modelos lado a lado"],
	compareOff: ["One model is asked", "Se pregunta a un modelo"],

	settings: ["Settings", "Ajustes"],
	more: ["More", "Más"],
	system: ["System prompt", "Instrucción de sistema"],
	topP: ["Top-p", "Top-p"],
	topK: ["Top-k", "Top-k"],
	minP: ["Min-p", "Min-p"],
	seed: ["Seed", "Semilla"],
	maxTokens: ["Most tokens", "Máx. de tokens"],
	thinkingSwitch: ["Thinking", "Razonamiento"],
	asModel: ["As the model does", "Como haga el modelo"],
	on: ["On", "Sí"],
	off: ["Off", "No"],
	budget: ["Thinking budget (tokens)", "Tope de razonamiento (tokens)"],
	tools: ["Tools (a JSON list, as in OpenAI's API)", "Herramientas (una lista JSON, como en la API de OpenAI)"],
	toolsNoJson: ["This is not JSON", "Esto no es JSON"],
	toolsNoList: ["Write a list of tools: [ … ]", "Escribe una lista de herramientas: [ … ]"],
	toolsWrong: ["The list needs this shape at tool", "La lista necesita esta forma en la herramienta"],

	you: ["You", "Tú"],
	edit: ["Edit", "Editar"],
	retry: ["Retry", "Reintentar"],
	copy: ["Copy", "Copiar"],
	copied: ["Copied", "Copiado"],
	answering: ["Answering", "Respondiendo"],
	thinking: ["Thinking", "Razonando"],
	thought: ["Thought for", "Razonó"],
	thoughts: ["Thoughts", "Razonamiento"],
	call: ["Tool call", "Llamada a herramienta"],
	result: ["Result", "Resultado"],
	sendResult: ["Send result", "Enviar resultado"],
	resultFirst: ["The model waits for the tool's result", "El modelo espera el resultado de la herramienta"],
	filtered: ["The server's content filter has withheld this answer.", "El filtro de contenido del servidor ha retenido esta respuesta."],
	stopped: ["stopped", "detenida"],
	cut: ["cut at the limit", "cortada en el límite"],
	failed: ["The answer did not arrive", "La respuesta no llegó"],
	token: ["token", "token"],
	tokens: ["tokens", "tokens"],
	ofThem: ["for thinking", "para razonar"],
	cached: ["of the prompt cached", "de la entrada en caché"],

	kv: ["KV memory", "Memoria KV"],
	atWork: ["answering", "respondiendo"],
	waiting: ["waiting", "en espera"],
	cost: ["Cost", "Costo"],

	help: ["Keyboard", "Teclado"],
	close: ["Close", "Cerrar"],
	shift: ["Shift", "Mayús"],
	keySend: ["Send the message", "Enviar el mensaje"],
	keyLine: ["New line", "Nueva línea"],
	keyStop: ["Stop the answer, or close what is open", "Detener la respuesta, o cerrar lo abierto"],
	keyEdit: ["In an empty field: edit your last message", "En el campo vacío: editar tu último mensaje"],
	keyCurve: ["On a curve: read its values", "En una curva: leer sus valores"],
	keyHelp: ["This list", "Esta lista"],

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

	api: ["API", "API"],
	apiText: ["What this server answers to. The texts of the fields come from the server, in English.", "Lo que este servidor responde. Los textos de los campos vienen del servidor, en inglés."],
	operations: ["Operations", "Operaciones"],
	example: ["Example", "Ejemplo"],
	fields: ["Fields of the body", "Campos del cuerpo"],
	required: ["required", "obligatorio"],
	unsupported: ["not supported", "no admitido"],
	errors: ["Errors", "Errores"],
	tryIt: ["Try it", "Probar"],
	body: ["Body (JSON)", "Cuerpo (JSON)"],
	characters: ["characters", "caracteres"],
	entries: ["entries", "elementos"],
};

export let lang = recall("lang", navigator.language.startsWith("es") ? "es" : "en");
export const t = (word) => WORDS[word][lang === "es" ? 1 : 0];

// An element that says a word, also after the language has changed.
export const said = (tag, word, attributes = {}) => el(tag, { ...attributes, "data-t": word }, t(word));

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
export function money(amount, currency) { // of less than a cent as much as says something
	const digits = amount < 0.01 ? { maximumSignificantDigits: 2 } : {};
	try { return format(amount, { style: "currency", currency, ...digits }); } catch { return `${number(amount, 4)} ${currency}`; }
}
export function duration(seconds, digits = 0) { // with `digits`, of less than a minute
	if (!finite(seconds)) return "–";
	if (digits && seconds < 60) return `${number(seconds, digits)} s`;
	const s = Math.max(0, Math.round(seconds)), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
	return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}
