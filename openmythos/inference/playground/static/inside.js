// Inside one token: what the model would have said after each of its loops.

import { count, el, level, visible } from "./nodes.js";

const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)} %` : `${(100 * p).toPrecision(2)} %`);
const nats = (loss) => (loss === null ? "–" : loss.toFixed(2));

export class Inside {
  constructor(node) {
    this.node = node;
  }

  clear(message) {
    this.node.parentElement.classList.remove("open");
    this.node.replaceChildren(el("p", { class: "hint" }, message));
  }

  // `seen` is the place that the token was drawn from; without it only what the stream told, and
  // `unseen` says why there is no more.
  show(token, seen, { number, total, scale, names, unseen, onClose }) {
    this.node.parentElement.classList.add("open");
    const final = seen?.rows.at(-1);
    const loss = final ? final.loss : token.loss;
    const facts = [
      el("span", { class: "chip big" }, visible(token.name)),
      el("span", {}, `${token.written ? "token" : "prompt token"} ${number} of ${total}`),
      token.loops ? el("span", {}, el("b", {}, count(token.loops, "loop"))) : null,
      loss == null ? null : el("span", {}, el("b", {}, nats(loss)), " nats loss"),
      loss == null ? null : el("span", {}, el("b", {}, percent(Math.exp(-loss))), " likely"),
      el("button", { type: "button", class: "close", "aria-label": "Close", onclick: onClose }, "×"),
    ];
    this.node.replaceChildren(
      el("p", { class: "facts" }, facts),
      ...(seen
        ? [this.#table(token, seen, scale, names), note(seen)]
        : [el("p", { class: "hint" }, unseen)]),
    );
  }

  #table(token, seen, scale, names) {
    const experts = seen.rows[0].experts !== null;
    const heads = ["Loop", "Likeliest next tokens", "Loss", "Entropy"];
    const head = [...heads, ...(experts ? ["Experts"] : [])].map((name) =>
      el("th", { scope: "col" }, name),
    );
    const rows = seen.rows.map((row, loop) => {
      const last = loop === seen.rows.length - 1;
      return el(
        "tr",
        { class: last ? "last" : null },
        el(
          "th",
          { scope: "row" },
          el("span", { class: `swatch level-${level(loop + 1, 1, scale)}` }, String(loop + 1)),
          last ? el("span", { class: "hidden" }, " the last, drawn from") : null,
        ),
        el("td", {}, el("ul", { class: "choices" }, row.top.map((top) => choice(top, token, names)))),
        el("td", { class: "number", "data-head": "loss" }, nats(row.loss)),
        el("td", { class: "number", "data-head": "entropy" }, nats(row.entropy)),
        experts ? el("td", { class: "experts-of", "data-head": "experts" }, chosen(row.experts)) : null,
      );
    });
    return el(
      "table",
      { class: "loops" },
      el("thead", {}, el("tr", {}, head)),
      el("tbody", {}, rows),
    );
  }
}

function note(seen) {
  const layers = seen.rows[0].experts?.length ?? 0;
  const experts = layers > 1 ? " Experts of the core's layers are separated by “·”." : "";
  return el(
    "p",
    { class: "hint" },
    `The last row is what the token was drawn from, before temperature and filters.${experts}`,
  );
}

function choice([id, p], token, names) {
  const same = id === token.id;
  const item = el(
    "li",
    { class: same ? "chip same" : "chip" },
    el("span", {}, visible(names[id])),
    " ",
    el("span", { class: "p" }, percent(p)),
    same ? el("span", { class: "hidden" }, " this token") : null,
  );
  item.style.setProperty("--p", `${(100 * p).toFixed(1)}%`);
  return item;
}

// Experts are numbered from 1, layer by layer.
function chosen(layers) {
  return layers
    .map((experts) => experts.map((expert) => expert + 1).sort((a, b) => a - b).join(", "))
    .join(" · ");
}
