// A walk through the house, solved loop by loop: places down, loops across.

import { ask, isAbort } from "./api.js";
import { Roving, byId, complain, count, el, show } from "./nodes.js";

const STEP = 160; // milliseconds of a loop when it plays
const START = "Move through the grid with the arrow keys, or point at a cell.";

export class Rooms {
  constructor({ missing, rooms, doors, wait, max_words, max_loops }) {
    this.rooms = rooms;
    this.doors = doors;
    this.wait = wait;
    this.short = shortened(rooms);
    this.trace = null;
    this.asking = null;
    this.timer = null;
    this.cell = null; // last pointed at or moved to
    show(byId("rooms-missing"), missing !== null);
    show(byId("rooms-panel"), missing === null);
    if (missing !== null) {
      byId("rooms-missing").textContent =
        `This part needs the model “${missing}”, which this installation does not have.`;
      return;
    }
    byId("walk-loops").max = max_loops;
    byId("walk-hops").max = max_words - 1;
    byId("walk-waits").max = max_words - 1;
    byId("walk-halting").onchange = () => {
      const none = byId("walk-halting").value === "none";
      byId("walk-threshold").disabled = none;
      if (none) byId("walk-threshold").value = "";
    };
    byId("walk-form").onsubmit = (event) => {
      event.preventDefault();
      this.#solve({ walk: byId("walk").value });
    };
    byId("draw-form").onsubmit = (event) => {
      event.preventDefault();
      if (!byId("walk-form").reportValidity()) return; // its loops and halting hold here too
      const seed = Math.floor(Math.random() * 2 ** 32);
      this.#solve({ hops: number("walk-hops") ?? 12, waits: number("walk-waits") ?? 0, seed });
    };
    byId("loop").oninput = () => {
      this.#pause();
      this.#showLoop(Number(byId("loop").value));
    };
    addEventListener("resize", () => this.#fit());
    byId("play").onclick = () => (this.timer ? this.#pause() : this.#play());
    this.roving = new Roving(byId("house"), "td", (cell) => {
      this.cell = cell;
      this.#tell();
    });
  }

  async #solve(walk) {
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    complain(byId("walk-problem"));
    byId("solve").disabled = byId("draw").disabled = true;
    try {
      const body = {
        ...walk,
        loops: number("walk-loops"),
        halting: byId("walk-halting").value,
        threshold: number("walk-threshold"),
      };
      this.trace = await ask("v1/playground/walk", body, asking.signal);
    } catch (error) {
      if (isAbort(error)) return;
      complain(byId("walk-problem"), error.message);
      this.#pause();
      show(byId("walk-result"), false); // or an old verdict would seem to be of this walk
      return;
    } finally {
      byId("solve").disabled = byId("draw").disabled = false;
    }
    byId("walk").value = this.trace.walk.join(" ");
    this.#draw();
  }

  #draw() {
    const { trace } = this;
    const loops = trace.beliefs.length;
    const truth = this.rooms[trace.truth.at(-1)];
    const said = this.rooms[trace.beliefs.at(-1).at(-1)];
    const mean = trace.stopped.reduce((sum, taken) => sum + taken, 0) / trace.stopped.length;
    const stops = mean < loops ? `; a place stopped after ${mean.toFixed(1)} on average` : "";
    byId("verdict").textContent =
      (trace.solved
        ? `Right: the walk of ${count(trace.hops.at(-1), "door")} ends in the ${truth}.`
        : `Wrong: the model says ${said}, but the walk ends in the ${truth}.`) +
      ` ${count(loops, "loop")}${stops}.`;
    byId("verdict").className = `verdict ${trace.solved ? "is-right" : "is-wrong"}`;
    byId("house").replaceChildren(this.#table());
    this.roving.refresh();
    this.cell = null;
    byId("loop").max = loops;
    show(byId("walk-result"));
    this.#fit();
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.#pause();
    this.#showLoop(calm ? loops : 0);
    if (!calm) this.#play();
  }

  #table() {
    const { trace } = this;
    const many = trace.beliefs.length > 16; // then only every fifth has room for its number
    const loops = trace.beliefs.map((_, loop) =>
      el(
        "th",
        { scope: "col", class: many && loop && (loop + 1) % 5 ? "minor" : null },
        el("span", {}, String(loop + 1)),
      ),
    );
    const rows = trace.walk.map((word, place) =>
      el(
        "tr",
        {},
        el(
          "th",
          { scope: "row" },
          el("span", { class: `door door-${this.doors.includes(word) ? word : "none"}`, "aria-hidden": "true" }),
          el("span", { class: "word" }, place ? word : `in the ${word}`),
          el("span", { class: "truth" }, `→ ${this.rooms[trace.truth[place]]}`),
        ),
        trace.beliefs.map((row, loop) => {
          const right = row[place] === trace.truth[place];
          const classes = ["cell", right ? "right" : "wrong"];
          const stop = trace.stopped[place];
          if (loop + 1 === stop && stop < trace.beliefs.length) classes.push("stop");
          if (loop + 1 > stop) classes.push("kept");
          return el(
            "td",
            { tabindex: "-1", "data-place": place, "data-loop": loop, class: "later" },
            el("span", { class: classes.join(" ") }, el("span", {}, this.short[row[place]])),
          );
        }),
      ),
    );
    return el(
      "table",
      { class: "house" },
      el("caption", { class: "hidden" }, "What is believed at each place after each loop"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "loop"), loops)),
      el("tbody", {}, rows),
    );
  }

  // Tell the cells how many of them share the width, and what the words leave of it.
  #fit() {
    const house = byId("house");
    const words = house.querySelector("th");
    if (!words?.offsetWidth) return;
    house.style.setProperty("--loops", this.trace.beliefs.length);
    house.style.setProperty("--label", `${words.offsetWidth}px`);
  }

  // Show what is believed after so many loops; later cells are empty.
  #showLoop(shown) {
    this.shown = shown;
    byId("loop").value = shown;
    const { beliefs, truth } = this.trace;
    const right = shown ? beliefs[shown - 1].filter((room, place) => room === truth[place]).length : 0;
    byId("shown").textContent = `${count(shown, "loop")} of ${beliefs.length}: ${right} of ${count(truth.length, "place")} right`;
    byId("loop").setAttribute("aria-valuetext", byId("shown").textContent);
    for (const cell of byId("house").querySelectorAll("td")) {
      const later = Number(cell.dataset.loop) >= shown;
      cell.classList.toggle("later", later);
      cell.classList.toggle("now", Number(cell.dataset.loop) === shown - 1);
      cell.setAttribute("aria-label", this.#told(cell));
    }
    this.#tell();
    this.#follow(shown);
  }

  // Keep the newest column in sight, without moving the page.
  #follow(shown) {
    const box = byId("house");
    const head = box.querySelectorAll("thead th")[shown];
    const first = box.querySelector("thead th");
    if (!head || !shown) {
      box.scrollLeft = 0;
      return;
    }
    const end = head.offsetLeft + head.offsetWidth;
    if (end > box.scrollLeft + box.clientWidth) box.scrollLeft = end - box.clientWidth;
    const start = head.offsetLeft - first.offsetWidth;
    if (start < box.scrollLeft) box.scrollLeft = start;
  }

  // Tell of the last cell; told anew at each loop, for it may only now be reached.
  #tell() {
    const told = this.cell ? this.#told(this.cell) : START;
    const belief = byId("belief");
    if (belief.textContent !== told) belief.textContent = told; // or it would be read aloud again
  }

  #told(cell) {
    const { trace } = this;
    const place = Number(cell.dataset.place);
    const loop = Number(cell.dataset.loop);
    const word = trace.walk[place];
    const kind = this.doors.includes(word) ? `${word} door` : place ? word : "start";
    const where = `Loop ${loop + 1}, place ${place + 1} (${kind})`;
    if (loop >= this.shown) return `${where}: not reached yet.`;
    const room = trace.beliefs[loop][place];
    const truth = trace.truth[place];
    const verdict = room === truth ? "right" : `wrong, it is the ${this.rooms[truth]}`;
    const stop = trace.stopped[place];
    let stopped = "";
    if (loop + 1 > stop) stopped = ` Its state stands since loop ${stop}.`;
    else if (loop + 1 === stop && stop < trace.beliefs.length) stopped = " It stops here.";
    return `${where}: ${this.rooms[room]}, ${verdict}.${stopped}`;
  }

  #play() {
    if (this.shown >= this.trace.beliefs.length) this.#showLoop(0);
    byId("play").textContent = "Pause";
    this.timer = setInterval(() => {
      this.#showLoop(this.shown + 1);
      if (this.shown >= this.trace.beliefs.length) this.#pause();
    }, STEP);
  }

  #pause() {
    clearInterval(this.timer);
    this.timer = null;
    byId("play").textContent = "Play";
  }
}

function number(id) {
  const { value } = byId(id);
  return value === "" ? null : Number(value);
}

// Three letters for each room, no two alike.
function shortened(rooms) {
  const starts = rooms.map((room) => room.slice(0, 3));
  return rooms.map((room, at) =>
    starts.indexOf(starts[at]) === starts.lastIndexOf(starts[at]) ? starts[at] : room.slice(0, 2) + room.at(-1),
  );
}
