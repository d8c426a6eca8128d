// Making nodes, and moving among many of them with the arrow keys. What the model wrote enters the
// page here alone, and as text: strings become text nodes, never markup.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function show(node, visible = true) {
  node.hidden = !visible;
}

// Say what is wrong, or nothing.
export function complain(node, message) {
  node.textContent = message ?? "";
  show(node, Boolean(message));
}

export const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

// A token as it is read: spaces and line breaks show.
export function visible(name) {
  return name.replace(/^ /, "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/ $/, "·");
}

// Colours go in levels from few loops to many (style.css has them).
export const LEVELS = 16;

export function level(value, least, most) {
  if (most <= least) return LEVELS - 1;
  const share = Math.min(1, Math.max(0, (value - least) / (most - least)));
  return Math.round(share * (LEVELS - 1));
}

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// One stop of the Tab key for many items: arrows move among them, as they lie on the screen.
// `look` is told of the item that has the focus or is pointed at.
export class Roving {
  constructor(box, selector, look) {
    this.box = box;
    this.selector = selector;
    this.look = look;
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("focusin", (event) => this.#at(event.target, true));
    box.addEventListener("mouseover", (event) => this.#at(event.target, false));
    box.addEventListener("click", (event) => event.target.closest(selector)?.focus());
  }

  // Let Tab reach the first item; call when items have come.
  refresh() {
    if (this.box.querySelector(`${this.selector}[tabindex="0"]`)) return;
    this.box.querySelector(this.selector)?.setAttribute("tabindex", "0");
  }

  #at(target, focused) {
    const item = target.closest(this.selector);
    if (!item) return;
    if (focused) {
      for (const other of this.box.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
      item.tabIndex = 0;
    }
    this.look(item, focused);
  }

  #key(event) {
    const item = event.target.closest(this.selector);
    if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
    const items = [...this.box.querySelectorAll(this.selector)];
    const at = items.indexOf(item);
    let next = null;
    if (event.key === "Home") next = items[0];
    else if (event.key === "End") next = items.at(-1);
    else if (event.key in KEYS) {
      const [across, down] = KEYS[event.key];
      next = down ? nearest(items, item, down) : items[at + across];
    } else return;
    event.preventDefault();
    next?.focus();
  }
}

// The item in the next line above or below whose middle is nearest. A token may be broken over two
// lines; its first part counts.
function nearest(items, from, down) {
  const place = (item) => {
    const box = item.getClientRects()[0];
    return { item, x: box.left + box.width / 2, y: box.top + box.height / 2 };
  };
  const here = place(from);
  const beyond = items.map(place).filter(({ y }) => (y - here.y) * down > 6);
  if (!beyond.length) return null;
  const line = Math.min(...beyond.map(({ y }) => (y - here.y) * down));
  const row = beyond.filter(({ y }) => (y - here.y) * down < line + 6);
  return row.reduce((a, b) => (Math.abs(b.x - here.x) < Math.abs(a.x - here.x) ? b : a)).item;
}
