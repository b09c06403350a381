// Curves and the heat map of experts: plain SVG, drawn anew at each change.
import { el, tell } from "./dom.js";
import { compact, finite, number, t, whole } from "./words.js";

const HEIGHT = 210, LEFT = 48, RIGHT = 8, TOP = 10, BOTTOM = 24;

const mean = (points) => points.reduce((sum, [, y]) => sum + y, 0) / points.length;
const nearest = (points, x) => points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);

// Means of equal shares: thousands of steps stay light.
export function thin(points, most = 500) {
	if (points.length <= most) return points;
	const bound = (i) => Math.floor(i * points.length / most);
	return Array.from({ length: most }, (_, i) => points.slice(bound(i), bound(i + 1))).map((part) => [part.at(-1)[0], mean(part)]);
}

// Means over neighbours; centred, and so without the lag of a running mean on a falling curve.
export const smooth = (points) => points.map(([x], i) => {
	const half = Math.min(12, i, points.length - 1 - i);
	return [x, mean(points.slice(i - half, i + half + 1))];
});

// About `count` round numbers (1, 2 or 5 times a power of ten) from low to high.
function ticks(low, high, count) {
	const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
	const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= 0.7 * rough);
	const first = Math.ceil(low / step), last = Math.floor(high / step + 1e-9);
	return { step, values: Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step) };
}

function range(values) {
	let low = Infinity, high = -Infinity;
	for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
	return [low, high];
}

// `series` holds { points: [[step, value]], kind: a CSS class, name: a word for the legend, or none }. The pointer and
// the arrow keys read values off the curves.
export class Chart {
	series = [];
	#at = null; // the step that is pointed at
	#svg = el("svg:svg", { role: "img", tabindex: 0, height: HEIGHT });
	#readout = el("p", { class: "readout" });
	#stepAt = () => null;

	constructor(title) {
		this.title = title;
		this.node = el("div", { class: "card" }, el("h3", {}, t(title)), this.#readout, this.#svg);
		this.#svg.addEventListener("pointermove", (event) => this.#move(this.#stepAt(event.offsetX)));
		this.#svg.addEventListener("pointerleave", () => this.#move(null));
		this.#svg.addEventListener("keydown", (event) => {
			const points = this.series.filter(({ points }) => points.length).at(-1)?.points ?? [], way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
			if (!way || !points.length) return;
			event.preventDefault();
			const next = this.#at === null ? points.length - 1 : points.indexOf(nearest(points, this.#at)) + way;
			this.#move(points[Math.max(0, Math.min(points.length - 1, next))][0]);
			tell(this.#readout.textContent);
		});
	}

	#move(step) {
		this.#at = step;
		this.draw();
	}

	get empty() { return !this.series.some(({ points }) => points.length); }

	draw() {
		const shown = this.series.filter(({ points }) => points.length), all = shown.flatMap(({ points }) => points);
		const width = this.#svg.clientWidth;
		if (!width || !all.length) return;
		const [x0, last] = range(all.map(([x]) => x)), [low, high] = range(all.map(([, y]) => y));
		const level = high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high)); // rounding is no curve
		const x1 = Math.max(last, x0 + 1), margin = level ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.06;
		const [y0, y1] = [low - margin, high + margin];
		const X = (x) => LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT);
		const Y = (y) => HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
		this.#stepAt = (px) => x0 + (px - LEFT) / (width - LEFT - RIGHT) * (x1 - x0);

		const rows = ticks(y0, y1, 5), digits = Math.max(0, -Math.floor(Math.log10(rows.step) + 1e-9));
		const parts = rows.values.flatMap((y) => [
			el("svg:line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(y), y2: Y(y) }),
			el("svg:text", { x: LEFT - 7, y: Y(y) + 4, "text-anchor": "end" }, y < 1e4 ? number(y, digits) : compact(y)),
		]);
		for (const x of ticks(x0, x1, width / 90).values.filter(Number.isInteger)) { // there is no half step
			const anchor = X(x) > width - 20 ? "end" : "middle";
			parts.push(el("svg:text", { x: X(x), y: HEIGHT - 6, "text-anchor": anchor }, x < 1e5 ? whole(x) : compact(x)));
		}
		const dot = (kind, [x, y], r) => el("svg:circle", { class: `dot ${kind}`, cx: X(x), cy: Y(y), r });
		for (const { points, kind } of shown) {
			const line = points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
			if (kind !== "spike") parts.push(el("svg:polyline", { class: `curve ${kind}`, points: line }));
			if (kind === "spike" || kind === "held" && points.length <= 40) parts.push(...points.map((point) => dot(kind, point, 3)));
		}
		const named = shown.filter(({ name }) => name);
		if (this.#at === null) {
			this.#readout.replaceChildren(...named.flatMap(({ kind, name }) => [el("span", { class: `key ${kind}` }), t(name)]));
		} else {
			const x = nearest(all, this.#at)[0], points = named.map((series) => nearest(series.points, x));
			const values = named.map(({ name }, i) => `${t(name)} ${number(points[i][1], 3)}`);
			this.#readout.textContent = [`${t("step")} ${whole(x)}`, ...values].join(" · ");
			parts.push(el("svg:line", { class: "cursor", x1: X(x), x2: X(x), y1: TOP, y2: HEIGHT - BOTTOM }));
			parts.push(...named.map(({ kind }, i) => dot(kind, points[i], 4)));
		}
		const said = named.map(({ name, points }) => `${t(name)} ${number(points[0][1])} → ${number(points.at(-1)[1])}`);
		this.#svg.ariaLabel = `${t(this.title)}: ${said.join("; ")}`;
		this.#svg.replaceChildren(...parts);
	}
}

const heatKey = () => ["hot", "cold"].flatMap((kind) => [el("span", { class: `key ${kind}` }), t(kind)]);

// Experts over time: one band a layer, one row an expert, the latest to the right. Cells of one shade are one path.
export class HeatHistory {
	#map = el("div");
	#readout = el("p", { class: "readout" });
	#drawn = 0;
	node = el("div", { class: "card", hidden: "" }, el("h3", {}, t("expertsOverTime")), this.#readout, this.#map);

	// `loads` holds [step, layers x experts].
	draw(loads) {
		const last = loads.at(-1)?.[1] ?? [], rows = last.flat().length;
		this.node.hidden = loads.length < 2 || !rows;
		if (this.node.hidden || this.#drawn === loads.at(-1)[0]) return;
		this.#drawn = loads.at(-1)[0];
		const span = `${t("step")} ${whole(loads[0][0])} → ${whole(this.#drawn)}`;
		this.#readout.replaceChildren(...heatKey(), ` · ${span}`);
		const columns = Math.min(loads.length, 100, Math.max(8, Math.floor(6000 / rows)));
		const shown = Array.from({ length: columns }, (_, i) => loads[Math.floor((i + 1) * loads.length / columns) - 1][1]);
		const high = Math.min(8, Math.max(1, 200 / rows)), paths = {};
		let y = 0;
		last.forEach((row, layer) => {
			row.forEach((_, expert) => {
				shown.forEach((table, column) => {
					const load = table[layer]?.[expert] ?? 1, shade = Math.round(5 * Math.min(1, Math.abs(Math.log2(Math.max(load, 0.05)))));
					if (shade) (paths[`${load > 1 ? "hot" : "cold"} ${shade}`] ??= []).push(`M${column} ${y.toFixed(1)}h1v${high}h-1z`);
				});
				y += high;
			});
			y += 4;
		});
		const drawn = Object.entries(paths).map(([key, parts]) => {
			const [kind, shade] = key.split(" ");
			return el("svg:path", { class: kind, "fill-opacity": shade / 5, d: parts.join("") });
		});
		const box = { viewBox: `0 0 ${columns} ${y - 4}`, preserveAspectRatio: "none", height: y - 4,
			role: "img", "aria-label": `${t("expertsOverTime")}: ${span}` };
		const ground = el("svg:rect", { class: "cell", width: columns, height: y - 4 });
		this.#map.replaceChildren(el("svg:svg", box, ground, ...drawn));
	}
}

// Rows are layers, numbered while they are few, and columns experts; colour is the distance from an even share, full at
// twice or half of it.
export class HeatMap {
	#map = el("div");
	#readout = el("p", { class: "readout" });
	#drawn = null;
	node = el("div", { class: "card", hidden: "" }, el("h3", {}, t("experts")), this.#readout, this.#map);

	draw(table, worst) {
		this.node.hidden = !table;
		if (!table || table === this.#drawn) return;
		this.#drawn = table;
		const said = finite(worst) ? `${t("worst")} ${number(worst)}` : "";
		this.#readout.replaceChildren(...heatKey(), said && ` · ${said}`);
		const named = table.length <= 12, height = named ? 24 : 10;
		const left = named ? 3 : 0, width = (100 - left) / Math.max(...table.map((row) => row.length)); // in percent
		const names = named ? table.map((_, layer) => el("svg:text", { x: 0, y: layer * height + 15 }, whole(layer + 1))) : [];
		const cells = table.flatMap((row, layer) => row.map((load, expert) => {
			const distance = Math.min(1, Math.abs(Math.log2(Math.max(load, 0.05)))).toFixed(2);
			const box = { x: `${left + expert * width}%`, y: layer * height, width: `${width * 0.96}%`, height: height - 2, rx: 3 };
			const title = el("svg:title", {}, `${layer + 1}/${expert + 1}: ${number(load)}×`);
			return el("svg:g", {}, el("svg:rect", { ...box, class: "cell" }),
				el("svg:rect", { ...box, class: load > 1 ? "hot" : "cold", "fill-opacity": distance }), title);
		}));
		const box = { role: "img", "aria-label": `${t("experts")}: ${said}`, height: table.length * height };
		this.#map.replaceChildren(el("svg:svg", box, ...names, ...cells));
	}
}
