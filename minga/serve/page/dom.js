// Elements and storage, in a few lines each.

export const $ = (id) => document.getElementById(id);

// el("p", { class: "note", onclick: f }, "text", node); "svg:path" makes an SVG element. Children are nodes or text,
// never markup: no text that a model or a file brings can become an element.
export function el(tag, attributes = {}, ...children) {
	const name = tag.replace("svg:", "");
	const node = document.createElementNS(`http://www.w3.org/${name === tag ? "1999/xhtml" : "2000/svg"}`, name);
	for (const [key, value] of Object.entries(attributes)) {
		if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
		else node.setAttribute(key, value);
	}
	node.append(...children);
	return node;
}

// A tree of [tag, attributes, ...children], as markdown.js makes it, into nodes, each of which `dress` may wrap.
export const build = (tree, dress) =>
	typeof tree === "string" ? tree : dress(el(tree[0], tree[1], ...tree.slice(2).map((child) => build(child, dress))));

export const recall = (key, fallback, store = localStorage) => {
	try { return JSON.parse(store.getItem(`minga.${key}`)) ?? fallback; } catch { return fallback; }
};
export const keep = (key, value, store = localStorage) => {
	try { store.setItem(`minga.${key}`, JSON.stringify(value)); } catch { /* full or closed: the page works without */ }
};

// As high as its text.
export function grow(box) {
	box.style.height = "auto";
	box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`; // and its border
}

// For those who cannot see the page: says what has just happened. Two answers may end at once, so the last few stay.
export function tell(text) {
	$("announce").append(el("p", {}, text));
	if ($("announce").childElementCount > 4) $("announce").firstElementChild.remove();
}
