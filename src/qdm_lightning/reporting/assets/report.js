"use strict";
// Tables sort by a click on a column's head: numbers as numbers, cells without one last; equal rows keep their order.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = [...head.parentElement.children].indexOf(head);
    const body = head.closest("table").tBodies[0];
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => {
      const cell = row.cells[column];
      const number = cell.dataset.sort;
      return { row, text: cell.textContent.trim(), number: number ? Number(number) : null };
    });
    const numeric = rows.some((entry) => entry.number !== null);
    rows.sort((a, b) => {
      if (!numeric) return direction * a.text.localeCompare(b.text, "en", { numeric: true });
      if (a.number === null || b.number === null) return (a.number === null) - (b.number === null);
      return direction * (a.number - b.number);
    });
    body.append(...rows.map((entry) => entry.row));
  });
}
// Theme: as the system says, or as chosen here; kept where the browser lets a file keep anything.
const themes = ["system", "light", "dark"];
const toggle = document.getElementById("theme");
const recall = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
const keep = (name) => { try { localStorage.setItem("theme", name); } catch { /* a file may not store */ } };
const show = (name) => {
  if (name === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = name;
  toggle.textContent = `Theme: ${name}`;
};
let theme = themes.includes(recall()) ? recall() : "system";
show(theme);
toggle.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  show(theme);
  keep(theme);
});
