// Three charts of a text: its tokens by loops, its loss after each loop, its experts by loop.

import { LEVELS, Roving, count, el, level, show } from "./nodes.js";

const HEIGHT = 190;
let groups = 0; // radio buttons of one chart go by one name

// The colours that style.css gives, for a canvas.
function colours() {
  const probe = el("span", { class: "hidden" });
  document.body.append(probe);
  const of = (className) => {
    probe.className = `hidden ${className}`;
    const { color, backgroundColor } = getComputedStyle(probe);
    return { ink: color, fill: backgroundColor };
  };
  const found = {
    ink: of("ink-muted").ink,
    line: of("ink-line").ink,
    accent: of("ink-accent").ink,
    levels: Array.from({ length: LEVELS }, (_, number) => of(`level-${number}`).fill),
  };
  probe.remove();
  return found;
}

// One plot in a box, made anew when it is drawn again, and as wide as its box.
function plot(box, data, options) {
  box.uplot?.destroy();
  const width = () => Math.max(200, Math.floor(box.clientWidth));
  box.uplot = new uPlot({ width: width(), height: HEIGHT, ...options }, data, box);
  box.watch ??= new ResizeObserver(() => box.uplot.setSize({ width: width(), height: HEIGHT }));
  box.watch.observe(box);
}

function axes(paint, loops) {
  const font = "12px system-ui, sans-serif";
  const every = Math.ceil(loops / 16);
  const numbers = Array.from({ length: loops }, (_, at) => at + 1);
  const common = { stroke: paint.ink, font, ticks: { show: false } };
  return [
    {
      ...common,
      grid: { show: false },
      size: 28,
      splits: () => numbers.filter((at) => (at - 1) % every === 0),
      values: (_, splits) => splits.map(String),
    },
    { ...common, grid: { stroke: paint.line, width: 1 }, size: 44 },
  ];
}

const still = { cursor: { show: false }, legend: { show: false } };

export function drawHistogram(box, counts, scale) {
  const paint = colours();
  const loops = scale;
  const numbers = Array.from({ length: loops }, (_, at) => counts[at + 1] ?? 0);
  const fills = numbers.map((_, at) => paint.levels[level(at + 1, 1, scale)]);
  plot(box, [numbers.map((_, at) => at + 1), numbers], {
    ...still,
    scales: { x: { time: false, range: [0.4, loops + 0.6] }, y: { range: (_, __, top) => [0, top] } },
    axes: axes(paint, loops),
    series: [
      {},
      {
        stroke: paint.ink,
        width: 0.5,
        points: { show: false },
        paths: uPlot.paths.bars({
          size: [0.8, 56],
          radius: 0.1,
          disp: {
            fill: { unit: 3, values: () => fills },
            stroke: { unit: 3, values: () => fills.map(() => paint.ink) },
          },
        }),
      },
    ],
  });
  const told = numbers.flatMap((number, at) =>
    number ? [`${count(at + 1, "loop")}: ${count(number, "token")}`] : [],
  );
  box.setAttribute("aria-label", `Tokens by loops. ${told.join(", ")}.`);
}

// The mean loss of the tokens after each loop; one that has left keeps its last.
export function drawLosses(box, places, scale) {
  show(box.closest("figure"), places.length > 0);
  if (!places.length) return;
  const paint = colours();
  const loops = Math.max(...places.map((place) => place.rows.length));
  const means = Array.from({ length: loops }, (_, loop) => {
    const losses = places.map(({ rows }) => rows[Math.min(loop, rows.length - 1)].loss);
    return losses.reduce((sum, loss) => sum + loss, 0) / losses.length;
  });
  plot(box, [means.map((_, at) => at + 1), means], {
    ...still,
    scales: {
      x: { time: false, range: [0.4, scale + 0.6] },
      y: { range: (_, least, most) => padded(least, most) },
    },
    axes: axes(paint, scale),
    series: [
      {},
      {
        stroke: paint.accent,
        width: 2,
        points: { show: true, size: 7, fill: paint.accent, stroke: paint.accent },
      },
    ],
  });
  const told = means.map((mean, at) => `${count(at + 1, "loop")}: ${mean.toFixed(2)}`);
  box.setAttribute("aria-label", `Mean loss in nats after each loop. ${told.join(", ")}.`);
}

// A line need not start at 0; one that hardly moves must not look as if it did.
function padded(least, most) {
  const room = Math.max(0.12 * (most - least), 0.1);
  return [Math.max(0, least - room), most + room];
}

// How often each expert was chosen at each loop: a table whose cells are coloured by share.
export function drawExperts(box, places, info) {
  const figure = box.closest("figure");
  show(figure, places.length > 0);
  figure.classList.toggle("wide", !info.experts || info.experts > 8);
  if (!places.length) return;
  if (!info.experts) {
    box.replaceChildren(
      el("p", { class: "hint" }, "This model's core has no experts: every token takes the same way."),
    );
    return;
  }
  const layers = Array.from({ length: info.core_layers }, (_, layer) => layer);
  const readout = el("p", { class: "readout", "aria-live": "polite" }, "Move through the cells with the arrow keys.");
  const holder = el("div", { class: "scroll" });
  const draw = (layer) => holder.replaceChildren(heatMap(shares(places, layer, info.experts), layer));
  const chosen = Number(box.querySelector("input:checked")?.value ?? 0);
  groups += 1;
  const radios = layers.map((layer) =>
    el(
      "label",
      {},
      el("input", {
        type: "radio",
        value: layer,
        name: `layer-${groups}`,
        checked: layer === chosen,
        onchange: () => draw(layer),
      }),
      el("span", {}, `Layer ${layer + 1}`),
    ),
  );
  box.replaceChildren(
    el("fieldset", { class: "segments" }, el("legend", { class: "hidden" }, "Layer"), radios),
    holder,
    readout,
  );
  draw(chosen);
  new Roving(holder, "td[tabindex]", (cell) => (readout.textContent = cell.getAttribute("aria-label")));
}

// Of each loop, each expert's share of the choices, and how many choices there were.
function shares(places, layer, experts) {
  const loops = Math.max(...places.map((place) => place.rows.length));
  const rows = Array.from({ length: loops }, () => new Array(experts).fill(0));
  for (const place of places) {
    place.rows.forEach((row, loop) => row.experts[layer].forEach((expert) => (rows[loop][expert] += 1)));
  }
  return rows.map((counts) => {
    const total = counts.reduce((sum, number) => sum + number, 0);
    return { total, shares: counts.map((number) => (total ? number / total : 0)) };
  });
}

function heatMap(rows, layer) {
  const experts = rows[0].shares.length;
  // A loop that few tokens took has wild shares, which would leave all others pale.
  const many = rows.filter(({ total }) => total >= rows[0].total / 10);
  const most = Math.max(...many.flatMap((row) => row.shares));
  const wide = experts > 32;
  const heads = Array.from({ length: experts }, (_, expert) => el("th", { scope: "col" }, String(expert + 1)));
  const body = rows.map(({ total, shares: row }, loop) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, String(loop + 1)),
      row.map((share, expert) =>
        el(
          "td",
          {
            class: `level-${level(share, 0, most)}`,
            tabindex: loop + expert ? "-1" : "0",
            "aria-label":
              `Layer ${layer + 1}, loop ${loop + 1}, expert ${expert + 1}: ` +
              `${(100 * share).toFixed(1)} % of ${count(total, "choice")}`,
          },
          wide ? "" : String(Math.round(100 * share)),
        ),
      ),
      el("td", { class: "total" }, String(total)),
    ),
  );
  return el(
    "table",
    { class: wide ? "heat small" : "heat" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "loop"), heads, el("th", { scope: "col" }, "of"))),
    el("tbody", {}, body),
  );
}
