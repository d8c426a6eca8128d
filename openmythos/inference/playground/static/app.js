// The page from its start: asks what the model can do, then writes with one setting or two.

import { ask } from "./api.js";
import { Column } from "./column.js";
import { byId, complain } from "./nodes.js";
import { Rooms } from "./rooms.js";

const AGAIN = 1500; // milliseconds until a server that loads its model is asked again

let columns = [];
let other = null; // the second column, kept with its settings while only one is shown
const running = new Map(); // from each column that is written to its AbortController

async function start() {
  let info;
  for (;;) {
    try {
      info = await ask("v1/playground/info");
      break;
    } catch (error) {
      byId("model").textContent = error.code === "loading" ? "The model is being loaded…" : "No model";
      if (error.code !== "loading") {
        complain(byId("problem"), `${error.message} Load the page again to try once more.`);
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN));
    }
  }
  byId("model").textContent = info.model;
  byId("tokens").max = info.max_length;
  byId("tokens").value = Math.min(byId("tokens").value, Math.ceil(info.max_length / 2));
  columns = [new Column("Settings", info, stop)];
  byId("columns").append(columns[0].node);
  byId("write").disabled = false;
  byId("run").addEventListener("submit", (event) => {
    event.preventDefault();
    write();
  });
  byId("stop").addEventListener("click", stop);
  byId("compare").addEventListener("change", () => compare(info));
  compare(info); // a browser may have kept the box checked
  addEventListener("keydown", (event) => {
    const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (!sends || byId("key").open) return;
    if (!event.target.closest("#rooms")) return byId("run").requestSubmit();
    event.preventDefault(); // a button there would be pressed besides
    (event.target.closest("form") ?? byId("walk-form")).requestSubmit();
  });
  new Rooms(info.reasoner);
}

function compare(info) {
  const two = byId("compare").checked;
  if (two && columns.length === 1) {
    other ??= new Column("Setting B", info, stop, { ...columns[0].values(), loops: 1 });
    columns.push(other);
    byId("columns").append(other.node);
  } else if (!two && columns.length === 2) {
    running.get(other)?.abort();
    columns.pop().node.remove();
  }
  columns[0].node.querySelector("h2").textContent = two ? "Setting A" : "Settings";
  byId("columns").classList.toggle("two", two);
}

function stop() {
  for (const controller of running.values()) controller.abort();
}

// Write with every column at once, until all have ended or Stop is pressed.
async function write() {
  if (running.size || !columns.every((column) => column.check())) return;
  byId("write").disabled = true;
  byId("stop").disabled = false;
  const scale = Math.max(...columns.map(({ budget }) => budget));
  columns[0].reveal();
  const [prompt, most] = [byId("prompt").value, Number(byId("tokens").value)];
  try {
    await Promise.all(
      columns.map((column) => {
        running.set(column, new AbortController());
        return column.write(prompt, most, scale, running.get(column).signal);
      }),
    );
  } finally {
    running.clear();
    const stopped = document.activeElement === byId("stop");
    byId("stop").disabled = true;
    byId("write").disabled = false;
    if (stopped) byId("write").focus(); // or the focus would be lost with the button
  }
}

start();
