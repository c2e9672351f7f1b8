const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const quiet = { displayModeBar: false, responsive: true };
const draw = (place, traces, layout, extra) =>
  Plotly.react(element(place), traces, { ...structuredClone(data.layouts[layout]), ...extra }, quiet);
const line = (name, x, y, color, dash) => ({ type: "scatter", mode: "lines", name, x, y, line: { color, dash, width: 2.5 } });
const cutAt = (rank) => rank ? {
  shapes: [{ type: "line", x0: rank, x1: rank, y0: 0, y1: 1, yref: "paper", line: { color: data.colors.cut, dash: "dot", width: 2.5 } }],
  annotations: [{ x: rank, y: 1, yref: "paper", text: `n' = ${rank}`, showarrow: false, xanchor: "left", yanchor: "top", xshift: 4 }],
} : {};

const showMatrix = (key) => {
  const matrix = data.matrices[key];
  if (!matrix) return;
  element("matrix-title").textContent = matrix.title;
  element("matrix-told").textContent = matrix.told;
  const traces = [line("σᵢ", matrix.ranks, matrix.values, data.colors.signal)];
  if (matrix.edge !== null)
    traces.push(line("noise edge", [matrix.ranks[0], matrix.ranks.at(-1)], [matrix.edge, matrix.edge], data.colors.noise, "dash"));
  draw("spectrum", traces, "spectrum", { ...cutAt(matrix.cut), showlegend: true });
  draw("energy", [line("energy", matrix.ranks, matrix.energy, data.colors.signal)], "energy", cutAt(matrix.cut));
};
const showHead = (key) => {
  const head = data.heads[key];
  if (!head) return;
  const ranks = (values) => values.map((_, index) => index + 1);
  element("head-title").textContent = `QK (similarity) and OV (projection) of ${head.title}`;
  draw("circuit", [line("QK", ranks(head.qk), head.qk, data.colors.signal), line("OV", ranks(head.ov), head.ov, data.colors.noise, "dash")], "circuit", {});
};
const listen = (section, select, show) => {
  const place = element(section);
  const mark = (key) => place.querySelectorAll("button[data-key]").forEach((button) =>
    button.dataset.key === key ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current"));
  const choose = (key) => { mark(key); show(key); };
  place.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-key]");
    if (button) choose(button.dataset.key);
  });
  element(select)?.addEventListener("change", (event) => place.querySelectorAll("[data-measure]").forEach((table) => {
    table.hidden = table.dataset.measure !== event.target.value;
  }));
  const first = place.querySelector("button[data-key]");
  if (first) choose(first.dataset.key); else place.hidden = true;
};
listen("map", "measure", showMatrix);
listen("heads", "head-measure", showHead);
if (data.plane) Plotly.newPlot("plane", data.plane.data, { ...data.plane.layout, template: undefined }, quiet);
else element("capacity").hidden = true;
element("search").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.querySelectorAll(".lmd-table tbody tr").forEach((row) => {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  });
});
