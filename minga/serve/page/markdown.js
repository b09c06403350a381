// Markdown, as models write it: paragraphs, headings, lists in lists, quotes, tables, code, links, emphasis.
// Text in, trees of [tag, attributes, ...children] out. Whatever is not one of these stays text (dom.js).

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([\w+#.-]*)/, HEADING = /^\s{0,3}(#{1,6})\s+/, QUOTE = /^\s{0,3}>\s?/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,6})[.)])\s+(?=\S)/, RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/, DASHES = /^\s*:?-+:?\s*$/;
const MOST_DEEP = 6; // lists in quotes in lists...: what lies deeper stays text

const INLINE = new RegExp([
	/\\([\\`*_{}[\]()#+.!|~>-])/, // a sign that means itself
	/`([^`\n]+)`/,
	/\*\*(?=\S)(.+?)\*\*(?!\*)/, /(?<!\w)__(?=\S)([^_\n]+)__(?!\w)/,
	/(?<![\w*])\*(?=[^\s*])([^*\n]+?)\*(?![\w*])/, /(?<!\w)_(?=\S)([^_\n]+)_(?!\w)/,
	/~~(?=\S)(.+?)~~/,
	/!?\[([^[\]\n]+)\]\(((?:https?:\/\/|mailto:)[^\s()]+)\)/, // of an image its name: nothing is loaded from elsewhere
	/(https?:\/\/[^\s<>()"'*`]*[\w/#=&])/,
].map((part) => part.source).join("|"));

const link = (address, ...children) => ["a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children];

function inline(text, depth = 0) {
	const out = [], inner = (text) => depth < 3 ? inline(text, depth + 1) : [text];
	const put = (piece) => typeof piece === "string" && typeof out.at(-1) === "string" ? out.push(out.pop() + piece) : out.push(piece);
	for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
		const [, sign, code, strong, strong2, em, em2, gone, name, address, bare] = found;
		if (found.index) put(text.slice(0, found.index));
		if (sign) put(sign);
		else if (code) put(["code", {}, code]);
		else if (strong ?? strong2) put(["strong", {}, ...inner(strong ?? strong2)]);
		else if (em ?? em2) put(["em", {}, ...inner(em ?? em2)]);
		else if (gone) put(["del", {}, ...inner(gone)]);
		else put(bare ? link(bare, bare) : link(address, ...inner(name)));
	}
	if (text) put(text);
	return out;
}

// The cells of a table's line; a bar that means itself is written \|.
const cells = (line) => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

function table(head, dashes, lines) {
	const sides = dashes.map((cell) => cell.endsWith(":") ? cell.startsWith(":") ? "center" : "right" : "");
	const row = (tag, texts) => ["tr", {}, ...sides.map((side, i) => [tag, side ? { class: side } : {}, ...inline(texts[i] ?? "")])];
	return ["div", { class: "table", tabindex: 0 }, ["table", {},
		["thead", {}, row("th", head)], ["tbody", {}, ...lines.map((line) => row("td", cells(line)))]]];
}

export const markdown = (text) => blocks(text.split("\n"), 0);

function blocks(lines, depth) {
	const out = [], nested = depth < MOST_DEEP;
	let i = 0;
	const takeWhile = (wanted) => {
		const from = i;
		while (i < lines.length && wanted(lines[i])) i++;
		return lines.slice(from, i);
	};
	const startsTable = (at) => {
		if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return false;
		const dashes = cells(lines[at + 1]);
		return dashes.every((cell) => DASHES.test(cell)) && dashes.length === cells(lines[at]).length;
	};
	const startsBlock = (at) => [FENCE, HEADING, RULE].some((mark) => mark.test(lines[at])) ||
		nested && (ITEM.test(lines[at]) || QUOTE.test(lines[at])) || startsTable(at);
	const indent = (line) => line.length - line.trimStart().length;

	// The items of one list: those with a mark of one kind, as far in as the first. What is further in belongs to an item.
	const list = (first) => {
		const [, { length: left }, start] = first, items = [];
		while (i < lines.length) {
			const mark = ITEM.exec(lines[i]);
			if (!mark || mark[1].length > left + 1 || mark[1].length < left || !mark[2] !== !start) break;
			const own = [lines[i++].slice(mark[0].length)];
			for (;;) {
				const blank = takeWhile((line) => !line.trim()), inside = takeWhile((line) => line.trim() && indent(line) >= left + 2);
				if (inside.length) {
					const inset = Math.min(...inside.map(indent), mark[0].length);
					own.push(...blank, ...inside.map((line) => line.slice(inset)));
				} else if (blank.length && !(i < lines.length && ITEM.test(lines[i]))) {
					i -= blank.length;
					break;
				} else break;
			}
			const [head, ...rest] = blocks(own, depth + 1);
			items.push(["li", {}, ...(head[0] === "p" ? head.slice(2) : [head]), ...rest]);
		}
		return start ? ["ol", { start }, ...items] : ["ul", {}, ...items];
	};

	while (i < lines.length) {
		const line = lines[i], fence = FENCE.exec(line), heading = HEADING.exec(line), item = nested && ITEM.exec(line);
		if (fence) {
			i++;
			const [, { length: inset }, mark, language] = fence, bare = (line) => line.slice(Math.min(inset, indent(line)));
			const code = takeWhile((line) => !(line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "")));
			i++;
			out.push(["pre", { tabindex: 0, "data-language": language }, ["code", {}, code.map(bare).join("\n")]]);
		} else if (RULE.test(line)) {
			i++;
			out.push(["hr", {}]);
		} else if (item) out.push(list(item));
		else if (heading) {
			const level = Math.min(5, Math.max(3, heading[1].length + 1)); // below the page's own
			out.push([`h${level}`, {}, ...inline(lines[i++].replace(HEADING, ""))]);
		} else if (nested && QUOTE.test(line)) {
			const quoted = takeWhile((line) => QUOTE.test(line)).map((line) => line.replace(QUOTE, ""));
			out.push(["blockquote", {}, ...blocks(quoted, depth + 1)]);
		} else if (startsTable(i)) {
			i += 2;
			out.push(table(cells(line), cells(lines[i - 1]), takeWhile((line) => line.includes("|"))));
		} else if (!line.trim()) i++;
		else {
			const from = i++;
			while (i < lines.length && lines[i].trim() && !startsBlock(i)) i++;
			out.push(["p", {}, ...lines.slice(from, i).flatMap((line, row) => [...(row ? [["br", {}]] : []), ...inline(line)])]);
		}
	}
	return out;
}
