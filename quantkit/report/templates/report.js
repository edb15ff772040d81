"use strict";
// Each column title of a sortable table becomes a button; without this script the table is whole.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  const said = table.parentElement.querySelector("[role=status]");
  const key = (row, column) => {
    const text = row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b
      : String(a).localeCompare(String(b), undefined, { numeric: true });
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const numeric = title.classList.contains("number");
      const was = title.getAttribute("aria-sort");
      const next = was === "descending" || (was === null && !numeric) ? "ascending" : "descending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      // What was not measured goes last, whichever way the rest is sorted.
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * compare(x, y);
      }));
      if (said) said.textContent = `Sorted by ${button.textContent}, ${next}`;
    });
  });
}
