// One column: settings, the text written with them, and what is seen inside it.

import { Refusal, ask, isAbort, stream } from "./api.js";
import { drawExperts, drawHistogram, drawLosses } from "./charts.js";
import { Inside } from "./inside.js";
import { Roving, byId, complain, count, el, level, show, visible } from "./nodes.js";

const RULES = {
  none: "every token takes all its loops",
  gate: "a learned exit says when to stop",
  delta: "stop when the state stops moving",
  kl: "stop when the prediction stops moving",
  act: "Graves' summed exit probability",
};
const ENDS = {
  stop: "The text ended by itself.",
  length: "It reached the most tokens allowed.",
};
const POINT = "Point at a token, or walk through the text with the arrow keys.";
const LATER = "What each loop would have said is shown once the text is complete.";
const FAILED = "The model could not be looked into.";
const TOP = 5;

// Settings that show something at first sight: a rule that can fire, and loops to save.
function beginning({ rules, mean_loops, max_loops }) {
  const fires = (name) => rules.some((rule) => rule.name === name && rule.fires);
  const halting = ["gate", "delta", "kl"].find(fires) ?? "none";
  const loops = halting === "none" ? mean_loops : Math.max(mean_loops, Math.min(16, 4 * mean_loops));
  return { halting, loops: Math.min(loops, max_loops) };
}

export class Column {
  // `onStop` is called when the text's own Stop button is pressed: the other may be out of sight.
  constructor(title, info, onStop, settings = {}) {
    this.info = info;
    this.node = byId("column").content.firstElementChild.cloneNode(true);
    this.node.querySelector(".column-title").textContent = title;
    this.title = title;
    this.#fillControls(settings);
    this.inside = new Inside(this.#part("detail"));
    this.inside.clear("What the model would have said after each loop appears here.");
    this.roving = new Roving(this.#part("tokens"), ".token", (node) => this.#pick(node));
    this.#part("tokens").addEventListener("mouseleave", () => {
      const focused = this.node.querySelector(".token:focus");
      if (focused) this.#pick(focused); // what was only pointed at is left again
    });
    this.tokens = []; // {id, name, text, loops, loss, written, node}
    this.lens = null;
    this.unseen = LATER; // why nothing is seen inside a token where that is so
    this.scale = null; // most loops of the colours, when columns share them
    addEventListener("themechange", () => this.#draw());
    this.#part("stop").addEventListener("click", onStop);
    this.node.addEventListener("keydown", (event) => event.key === "Escape" && this.#unpick());
  }

  // ---- settings ----

  #part(name) {
    return this.node.querySelector(`[data-part="${name}"]`);
  }

  #field(name) {
    return this.node.querySelector(`[data-field="${name}"]`);
  }

  #fillControls(settings) {
    const { info } = this;
    for (const box of this.node.querySelectorAll("[data-field]")) {
      if (!box.closest("label")) box.setAttribute("aria-label", "Loops at most");
    }
    const range = this.#field("loops-range");
    const loops = this.#field("loops");
    loops.max = info.max_loops;
    range.max = Math.min(info.max_loops, Math.max(16, 4 * info.mean_loops));
    this.#part("trained").textContent = `trained with ${info.mean_loops} on average`;
    for (const rule of info.rules) this.#field("halting").append(el("option", {}, rule.name));
    for (const [name, value] of Object.entries({ ...beginning(info), ...settings })) {
      this.#field(name).value = value;
    }
    range.value = loops.value;
    range.addEventListener("input", () => (loops.value = range.value));
    loops.addEventListener("input", () => (range.value = loops.value));
    this.#field("halting").addEventListener("change", () => this.#showRule());
    this.node.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault(); // Enter in a field writes, as the button does; check() validates
      byId("run").requestSubmit();
    });
    this.#showRule();
    if (settings.threshold) this.#field("threshold").value = settings.threshold;
  }

  #showRule() {
    const rule = this.info.rules.find(({ name }) => name === this.#field("halting").value);
    const threshold = this.#field("threshold");
    threshold.disabled = rule.threshold === null;
    threshold.placeholder = rule.threshold === null ? "none" : String(+rule.threshold.toPrecision(3));
    threshold.value = "";
    const fires = rule.fires ? "" : " (this model's was never trained, so it never fires)";
    this.#part("rule").textContent = `${rule.name}: ${RULES[rule.name]}${fires}`;
  }

  // The fields' values as they are, to begin another column with.
  values() {
    const fields = ["loops", "halting", "threshold", "temperature", "seed", "top_k", "top_p", "min_p"];
    return Object.fromEntries(fields.map((name) => [name, this.#field(name).value]));
  }

  // Whether all fields hold what they may; tells the browser to show which does not.
  check() {
    const form = this.node.querySelector("form");
    const filters = form.querySelector("details");
    if (filters.querySelector(":invalid")) filters.open = true; // or there is nothing to show it at
    return form.reportValidity();
  }

  #thinking() {
    const threshold = this.#field("threshold").value;
    return {
      loops: Number(this.#field("loops").value),
      halting: this.#field("halting").value,
      threshold: threshold === "" ? null : Number(threshold),
    };
  }

  #sampling() {
    const seed = this.#field("seed").value;
    return {
      temperature: Number(this.#field("temperature").value),
      top_k: Number(this.#field("top_k").value),
      top_p: Number(this.#field("top_p").value),
      min_p: Number(this.#field("min_p").value),
      seed: seed === "" ? null : Number(seed),
    };
  }

  // Bring the text to where it can be read while it comes.
  reveal() {
    const paper = this.node.querySelector(".paper");
    const { top } = paper.getBoundingClientRect();
    if (top < 0 || top > 0.6 * innerHeight) paper.scrollIntoView({ block: "start" });
  }

  get budget() {
    return Number(this.#field("loops").value);
  }

  // ---- writing ----

  async write(prompt, maxTokens, scale, signal) {
    this.#clear(scale);
    show(this.#part("stop"));
    const began = performance.now();
    const asked = { prompt, max_tokens: maxTokens, ...this.thinking, ...this.#sampling() };
    try {
      for await (const chunk of stream("v1/playground/stream", asked, signal)) {
        this.#take(chunk, (performance.now() - began) / 1000);
      }
    } catch (error) {
      if (!isAbort(error)) {
        this.#breakOff(error, (performance.now() - began) / 1000);
        return;
      }
      this.finish = "Stopped.";
    } finally {
      const held = document.activeElement === this.#part("stop");
      show(this.#part("stop"), false);
      if (held) this.#part("status").focus({ preventScroll: true });
    }
    this.seconds ??= (performance.now() - began) / 1000;
    this.#summary();
    this.#look(); // goes on while the next text may already be asked for
  }

  // Say what went wrong, and show what is known of the tokens that came before.
  #breakOff(error, seconds) {
    this.#complain(error);
    this.unseen = FAILED;
    this.#part("status").textContent = "";
    if (this.tokens.some(({ written }) => written)) {
      this.seconds = seconds;
      this.finish = "It broke off.";
      this.#summary();
    }
    this.#showKnown();
  }

  #clear(scale) {
    this.thinking = this.#thinking();
    this.scale = scale;
    this.tokens = [];
    this.lens = this.usage = this.seconds = null;
    this.unseen = LATER;
    this.finish = "";
    this.looking?.abort();
    this.looking = null;
    this.#part("tokens").replaceChildren();
    this.inside.clear(POINT);
    this.#part("status").textContent = "Writing…";
    complain(this.#part("problem"));
    for (const name of ["legend", "charts"]) show(this.#part(name), false);
    show(this.#part("empty"), false);
  }

  #take(chunk, seconds) {
    if (chunk.usage) {
      this.usage = chunk.usage;
      this.seconds = seconds;
    }
    for (const choice of chunk.choices) {
      for (const token of choice.prompt ?? []) this.#add({ ...token, written: false });
      for (const token of choice.tokens ?? []) this.#add({ ...token, written: true });
      if (choice.rest) this.#part("tokens").append(choice.rest);
      if (choice.finish_reason) this.finish = ENDS[choice.finish_reason];
    }
    this.#legend();
  }

  #add(token) {
    const number = this.tokens.length;
    this.tokens.push(token);
    if (number === 0) return; // the mark that starts a document
    // Spaces before a token stand before its colour, and line breaks behind its number.
    const [, spaces, text, breaks] = token.text.match(/^( *)([^]*?)(\n*)$/);
    token.node = el(
      "span",
      { class: "token", role: "option", tabindex: "-1", "data-number": number },
      text,
    );
    if (!text) {
      token.node.classList.add("silent"); // a part of a character, spaces alone, or the end
      token.node.dataset.sign = visible(token.text) || "▫";
    }
    if (token.written) this.#paint(token);
    else token.node.classList.add("prompt");
    this.#name(token);
    this.#part("tokens").append(spaces, token.node, breaks);
    this.roving.refresh();
  }

  #paint(token) {
    token.node.classList.add(`level-${level(token.loops, 1, this.scale)}`);
    token.node.dataset.loops = token.loops;
  }

  #name(token) {
    const loops = token.loops ? `, ${count(token.loops, "loop")}` : "";
    const loss = token.loss == null ? "" : `, loss ${token.loss.toFixed(2)}`;
    const from = token.written ? "" : "prompt: ";
    const name = token.name.trim() || visible(token.name);
    token.node.setAttribute("aria-label", `${from}${name}${loops}${loss}`);
  }

  #summary() {
    const written = this.tokens.filter(({ written }) => written);
    const loops = written.reduce((sum, token) => sum + token.loops, 0);
    const mean = written.length ? (loops / written.length).toFixed(2) : "no";
    this.#part("status").textContent =
      `${count(written.length, "token")} in ${this.seconds.toFixed(1)} s, ${mean} loops each on ` +
      `average, at most ${this.thinking.loops}. ${this.finish}`;
  }

  #legend() {
    const counts = this.#counts();
    const total = counts.reduce((sum, number) => sum + number, 0);
    const items = counts.flatMap((number, loops) =>
      number
        ? el(
            "li",
            {},
            el("span", { class: `swatch level-${level(loops, 1, this.scale)}` }, String(loops)),
            ` ${number}`,
            el("span", { class: "hint" }, ` ${Math.round((100 * number) / total)} %`),
          )
        : [],
    );
    this.#part("legend").replaceChildren(
      el("p", { class: "hint" }, "Loops of a token, and how many took so many"),
      el("ul", {}, items),
    );
    show(this.#part("legend"), total > 0);
  }

  // Tokens written by the loops they took, from 0 to the most there may be.
  #counts() {
    const counts = new Array(this.thinking.loops + 1).fill(0);
    for (const token of this.tokens) if (token.written) counts[token.loops] += 1;
    return counts;
  }

  // ---- looking inside ----

  async #look() {
    const ids = this.tokens.map(({ id }) => id);
    const { max_tokens, max_run, max_shown } = this.info.lens;
    const { loops } = this.thinking;
    const most = Math.min(max_tokens, Math.floor(max_run / loops));
    if (ids.length < 2) return;
    if (ids.length > most) {
      const deep = most < max_tokens ? ` at ${count(loops, "loop")}` : "";
      this.unseen = `The text is too long to look into${deep}: more than ${most} tokens.`;
      this.#showKnown(this.unseen);
      return;
    }
    const first = Math.max(0, ids.length - Math.floor(max_shown / loops));
    const looking = (this.looking = new AbortController());
    this.inside.clear("Looking inside…");
    try {
      const body = { token_ids: ids, first, top: TOP, ...this.thinking };
      const lens = await ask("v1/playground/lens", body, looking.signal);
      if (this.looking !== looking) return;
      this.lens = lens;
      this.unseen =
        `Only the last ${count(ids.length - 1 - first, "token")} were looked into, ` +
        "at this many loops.";
    } catch (error) {
      if (isAbort(error) || this.looking !== looking) return;
      this.#complain(error);
      this.unseen = FAILED;
    }
    for (const [number, token] of this.tokens.entries()) {
      const seen = this.#seen(number);
      if (!seen) continue;
      if (!token.written) {
        token.loops = seen.loops;
        this.#paint(token);
      }
      token.loss = seen.rows.at(-1).loss;
      this.#name(token);
    }
    this.#showKnown();
  }

  // Draw the charts, and show the chosen token again if there is one, or else a hint.
  #showKnown(hint = POINT) {
    this.inside.clear(hint);
    this.#draw();
    const current = this.node.querySelector(".token.chosen");
    if (current) this.#pick(current);
  }

  // What was seen at the place that a token was drawn from, which is the one before it.
  #seen(number) {
    return this.lens?.places[number - 1 - this.lens.first];
  }

  #pick(node) {
    const number = Number(node.dataset.number);
    this.#choose(node);
    this.inside.show(this.tokens[number], this.#seen(number), {
      number,
      total: this.tokens.length - 1,
      scale: this.scale,
      names: this.lens?.names ?? {},
      unseen: this.unseen,
      onClose: () => this.#unpick(),
    });
  }

  // Mark one token as chosen, or none.
  #choose(node) {
    for (const other of this.node.querySelectorAll(".token.chosen")) {
      other.classList.remove("chosen");
      other.removeAttribute("aria-selected");
    }
    node?.classList.add("chosen");
    node?.setAttribute("aria-selected", "true");
  }

  #unpick() {
    const chosen = this.node.querySelector(".token.chosen");
    if (!chosen) return;
    // The focus would be lost with the button. It moves first, for a token that gets it is picked.
    if (this.inside.node.contains(document.activeElement)) chosen.focus();
    this.#choose(null);
    this.inside.clear(POINT);
  }

  #draw() {
    if (!this.tokens.length || !this.thinking || this.seconds === null) return;
    show(this.#part("charts"));
    drawHistogram(this.#part("histogram"), this.#counts(), this.scale);
    const written = this.tokens.flatMap((token, number) => (token.written ? [number] : []));
    const seen = written.flatMap((number) => this.#seen(number) ?? []);
    const places = this.lens?.places ?? [];
    this.#part("losses-of").textContent =
      seen.length < written.length ? `the last ${count(seen.length, "token")}` : "what was written";
    this.#part("experts-of").textContent =
      places.length < this.tokens.length ? `, of the last ${count(places.length, "token")}` : "";
    drawLosses(this.#part("losses"), seen, this.scale);
    drawExperts(this.#part("experts"), places, this.info);
  }

  #complain(error) {
    if (!(error instanceof Refusal)) console.error(error);
    complain(this.#part("problem"), error.message);
  }
}
