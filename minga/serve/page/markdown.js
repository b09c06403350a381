// Markdown, the part that models write most: paragraphs, lists, headings, code, bold, italics.
// Text in, trees of [tag, attributes, ...children] out. Whatever is not one of these stays text (dom.js).

const FENCE = /^\s*```/, HEADING = /^#{1,6}\s+/, BULLET = /^\s*[-*+]\s+(?=\S)/, NUMBER = /^\s*(\d{1,6})[.)]\s+(?=\S)/;
const INLINE = /`([^`\n]+)`|\*\*(?=\S)(.+?)\*\*(?!\*)|(?<![\w*])\*(?=[^\s*])([^*\n]+?)\*(?![\w*])/;

function inline(text, depth = 0) {
	const out = [], inner = (text) => depth < 3 ? inline(text, depth + 1) : [text];
	for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
		const [, code, strong, em] = found;
		if (found.index) out.push(text.slice(0, found.index));
		out.push(code ? ["code", {}, code] : strong ? ["strong", {}, ...inner(strong)] : ["em", {}, ...inner(em)]);
	}
	return text ? [...out, text] : out;
}

export function markdown(text) {
	const out = [], lines = text.split("\n");
	let i = 0;
	const takeWhile = (wanted) => {
		const from = i;
		while (i < lines.length && wanted(lines[i])) i++;
		return lines.slice(from, i);
	};
	const list = (tag, mark, attributes) =>
		out.push([tag, attributes, ...takeWhile((line) => mark.test(line)).map((line) => ["li", {}, ...inline(line.replace(mark, ""))])]);
	while (i < lines.length) {
		const line = lines[i], ordered = NUMBER.exec(line);
		if (FENCE.test(line)) {
			i++;
			const code = takeWhile((line) => !FENCE.test(line));
			i++;
			out.push(["pre", { tabindex: 0 }, ["code", {}, code.join("\n")]]);
		} else if (BULLET.test(line)) list("ul", BULLET, {});
		else if (ordered) list("ol", NUMBER, { start: ordered[1] });
		else if (HEADING.test(line)) out.push(["h3", {}, ...inline(lines[i++].replace(HEADING, ""))]);
		else if (!line.trim()) i++;
		else {
			const words = takeWhile((line) => line.trim() && ![FENCE, BULLET, NUMBER, HEADING].some((mark) => mark.test(line)));
			out.push(["p", {}, ...words.flatMap((line, row) => [...(row ? [["br", {}]] : []), ...inline(line)])]);
		}
	}
	return out;
}
