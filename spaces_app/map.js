const buttons = () => [...element.querySelectorAll("button[data-key]")];
const prepare = () => buttons().forEach((button, index) => { button.tabIndex = index === 0 ? 0 : -1; });
const choose = (button) => {
  element.querySelectorAll("[aria-current]").forEach((other) => other.removeAttribute("aria-current"));
  button.setAttribute("aria-current", "true");
  trigger("select", { key: button.dataset.key });
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-key]");
  if (button) choose(button);
});
element.addEventListener("keydown", (event) => {
  const from = event.target.closest("button[data-key]");
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!from || !step) return;
  const cell = from.closest("td");
  const all = buttons();
  let to = all[all.indexOf(from) + step[0] + step[1]];
  if (cell) {
    let row = cell.parentElement, column = cell.cellIndex, found = null;
    do {
      if (step[0]) row = step[0] > 0 ? row.nextElementSibling : row.previousElementSibling;
      column += step[1];
      found = row && row.cells[column] && column > 0 ? row.cells[column] : null;
    } while (found && !found.querySelector("button"));
    to = found ? found.querySelector("button") : step[0] > 0 ? element.querySelector(".lmd-outside button") : null;
  }
  if (!to) return;
  event.preventDefault();
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
});
watch("value", prepare);
prepare();
