// Training runs: the list, and one of them in full, read again every two seconds from where the last reading ended.
import { read } from "./api.js";
import { Chart, HeatHistory, HeatMap, smooth, thin } from "./charts.js";
import { $, el } from "./dom.js";
import { compact, duration, finite, gigabytes, number, percent, t, whole } from "./words.js";

const MOST_SAMPLES = 6;
const STEP_KEYS = ["loss", "train_bits_per_byte", "tokens_per_second", "mfu", "lr", "grad_norm", "seconds"];
const EVAL_KEYS = ["val_loss", "bits_per_byte", "mtp_acceptance"];
const rows = new Map(); // run name -> its row in the list, changed in place so that the focus stays
let runs = []; // the server's summaries, the latest written first
let open = null; // the run on the page

const condition = (run) => run.alive ? "running" : run.ended === "stopped" ? "halted" : run.ended ? "done" : "dead";

// What the lines of one run.jsonl say so far.
class Run {
	next = 0; // the line to go on reading at
	read = false; // have we had a look?
	config = {};
	last = {}; // step
	samples = [];
	loads = []; // [[step, layers x experts]]
	skips = []; // steps
	curves = Object.fromEntries([...STEP_KEYS, ...EVAL_KEYS].map((key) => [key, []])); // [[step, value]]

	constructor(name) { this.name = name; }

	absorb(line) {
		if (line.kind === "start") Object.assign(this, { start: line, config: line.config ?? {}, end: null });
		if (line.kind === "step") {
			this.last = line;
			this.#put(line, ...STEP_KEYS);
			const load = line.expert_load?.filter((row) => row?.length);
			if (load?.length) this.loads = [...this.loads.filter(([step]) => step < line.step), [line.step, load]];
		}
		if (line.kind === "eval") {
			this.mtp = line.mtp_acceptance;
			this.#put(line, ...EVAL_KEYS);
		}
		if (line.kind === "skip") this.skips = [...this.skips.filter((step) => step < line.step), line.step];
		if (line.kind === "sample") this.samples.push(line);
		if (line.kind === "end") this.end = line;
	}

	#put(line, ...keys) {
		for (const key of keys.filter((key) => finite(line.step) && finite(line[key]))) {
			const points = this.curves[key];
			while (points.at(-1)?.[0] >= line.step) points.pop(); // a resumed run says its steps again: the newer word counts
			points.push([line.step, line[key]]);
		}
	}

	get share() {
		const { steps, hours } = this.config;
		return steps > 0 ? this.last.step / steps : hours > 0 ? this.last.seconds / (hours * 3600) : NaN;
	}

	get secondsLeft() {
		const { steps, hours } = this.config, recent = this.curves.seconds.slice(-30);
		if (!(steps > 0)) return hours * 3600 - this.last.seconds;
		const [step0, seconds0] = recent[0] ?? [], [step1, seconds1] = recent.at(-1) ?? [];
		return (steps - step1) * (seconds1 - seconds0) / (step1 - step0);
	}
}

// ---- the page

const CHARTS = [ // title, curve of the steps, curve of the evaluations
	["lossCurve", "loss", "val_loss"], ["bpb", "train_bits_per_byte", "bits_per_byte"], ["speedCurve", "tokens_per_second"],
	["mfuCurve", "mfu"], ["lr", "lr"], ["norm", "grad_norm"], ["mtpCurve", null, "mtp_acceptance"],
];

function showList() {
	for (const [name, row] of rows) if (!runs.some((run) => run.name === name)) { row.remove(); rows.delete(name); }
	runs.forEach((run, i) => {
		const { name, step, loss, bits_per_byte } = run, list = $("run-list");
		if (!rows.has(name)) rows.set(name, el("li", {}, el("a", { href: `#runs/${encodeURIComponent(name)}` }, el("b", {}, name), el("small"), el("span"))));
		const row = rows.get(name), [link] = row.children, [, facts, state] = link.children;
		if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
		const values = finite(bits_per_byte) ? `${number(bits_per_byte)} bpb` : finite(loss) ? `${t("loss")} ${number(loss)}` : "";
		facts.textContent = finite(step) ? `${t("step")} ${whole(step)} · ${values}` : "";
		state.className = `state ${condition(run)}`;
		state.textContent = t(condition(run));
		link.ariaCurrent = name === open?.name ? "page" : null;
	});
}

function openRun(run) {
	open = run;
	const view = run.view = {
		state: el("span"), bar: el("progress", { max: 1, "aria-label": run.name }), note: el("p", { class: "note" }),
		tiles: el("dl", { class: "tiles" }), charts: CHARTS.map(([title]) => new Chart(title)),
		history: new HeatHistory(), heat: new HeatMap(),
		samples: el("div", { class: "card samples" }),
	};
	const title = el("div", { class: "title" }, el("h2", {}, run.name), view.state);
	const pair = el("div", { class: "pair" }, ...view.charts.map((chart) => chart.node));
	$("run").replaceChildren(title, view.bar, view.note, view.tiles, pair, view.history.node, view.heat.node, view.samples);
	showRun();
}

function facts({ config, last, start, end, mtp, secondsLeft, curves }, how) {
	const latest = (key) => curves[key].at(-1)?.[1];
	const { total, active } = start?.parameters ?? {}, steps = config.steps > 0 ? ` ${t("of")} ${whole(config.steps)}` : "";
	return [
		[t("step") + steps, whole(last.step)],
		[t("loss"), number(latest("loss"))],
		[t("bpb"), number(latest("bits_per_byte"), 3)],
		[t("speed"), whole(last.tokens_per_second)],
		[t("mfu"), percent(last.mfu)],
		[t("memory"), gigabytes(last.gpu_memory ?? last.memory)],
		how === "running" ? [t("left"), duration(secondsLeft)] : [t("elapsed"), duration(end?.seconds ?? last.seconds)],
		[t("seen"), compact(last.tokens)],
		[t("params") + (finite(active) ? ` (${compact(active)} ${t("active")})` : ""), compact(total)],
		[t("mtp"), percent(mtp)],
	];
}

function showRun() {
	const { view, start, end, share, samples, name } = open;
	const how = condition({ ...runs.find((run) => run.name === name), ...(end && { alive: false, ended: end.reason }) });
	view.state.className = `state ${how}`;
	view.state.textContent = t(how);
	view.bar.hidden = !finite(share);
	view.bar.value = how === "done" ? 1 : Math.min(1, share || 0);
	view.note.hidden = !open.read || start && how !== "dead";
	view.note.textContent = t(start ? "deadText" : "nothing");
	const known = facts(open, how).filter(([, value]) => value !== "–");
	view.tiles.replaceChildren(...known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
	CHARTS.forEach(([, key, held], i) => {
		const raw = thin(open.curves[key] ?? []), norms = new Map(key === "grad_norm" ? open.curves.grad_norm : []);
		view.charts[i].series = [
			{ points: raw, kind: "raw" }, { points: key === "lr" ? raw : smooth(raw), kind: "", name: "smooth" },
			{ points: open.curves[held] ?? [], kind: "held", name: "held" },
			{ points: open.skips.filter((step) => norms.has(step)).map((step) => [step, norms.get(step)]), kind: "spike", name: "skipped" },
		];
	});
	redraw();
	view.history.draw(open.loads);
	view.heat.draw(open.loads.at(-1)?.[1], open.last.expert_max_over_mean);
	view.samples.hidden = !samples.length;
	view.samples.replaceChildren(el("h3", {}, t("samples")), ...samples.slice(-MOST_SAMPLES).reverse().map(sample));
}

function sample({ step, prompt, text }) {
	const lead = String(prompt ?? ""), words = String(text ?? ""), rest = words.startsWith(lead) ? words.slice(lead.length) : words;
	const quote = lead.trim() ? [el("b", {}, lead), rest] : [rest.trim()];
	return el("div", { class: "sample" }, el("small", {}, `${t("step")} ${whole(step)}`), el("p", {}, ...quote));
}

// ---- the clock

export function redraw() {
	const charts = open?.view.charts ?? [];
	for (const chart of charts) chart.node.hidden = chart.empty; // first: what is shown decides how wide each is
	for (const chart of charts) chart.draw();
}

// In another language, say.
export function repaint() {
	if (open) openRun(open);
	showList();
}

function showInstead(...content) {
	open = null;
	$("run").replaceChildren(el("div", { class: "empty" }, ...content));
	showList();
}

async function refresh() {
	runs = (await read("/api/runs")).runs;
	const wanted = decodeURIComponent(location.hash.split("/")[1] ?? "");
	const name = wanted || open?.name || (runs.find((run) => run.alive) ?? runs[0])?.name;
	if (!name) return showInstead(el("p", {}, t("noRuns")), el("code", {}, "minga train --data data --out runs/mine"));
	const other = open?.name !== name;
	if (other) openRun(new Run(name));
	showList();
	if (other) $("run-list").scrollLeft = rows.get(name)?.offsetLeft - $("run-list").offsetLeft; // on a narrow page the list is a strip
	const mine = open;
	for (let more = true; more;) { // the server hands out a long run in parts
		const { lines, next } = await read(`/api/runs/${encodeURIComponent(name)}?after=${mine.next}`);
		if (mine !== open) return; // another run was chosen meanwhile
		if (next < mine.next) return openRun(new Run(name)); // the file was begun anew
		for (const line of lines) mine.absorb(line);
		more = next > mine.next && lines.length > 0;
		Object.assign(mine, { next, read: true });
	}
	showRun();
}

let refreshing = false;
export async function tick() {
	if (refreshing || document.hidden || !location.hash.startsWith("#runs")) return;
	refreshing = true;
	try {
		await refresh();
	} catch (error) {
		if (error.status === 404) history.replaceState(null, "", "#runs"); // the run is gone: show another
		if (error.status) showInstead(el("p", {}, error.message)); // else the server is away, and the page says so
	}
	refreshing = false;
}
