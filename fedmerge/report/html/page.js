"use strict";
// A click or a key press on a heading sorts its table; absent values stay last.
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const before = heading.getAttribute("aria-sort");
    const descending = before === "none" ? heading.classList.contains("number") : before === "ascending";
    const keyed = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.sort }));
    keyed.sort((a, b) => {
      if (a.key === undefined || b.key === undefined) return (a.key === undefined) - (b.key === undefined);
      const order = heading.classList.contains("number")
        ? Number(a.key) - Number(b.key)
        : a.key.localeCompare(b.key, "en", { numeric: true });
      return descending ? -order : order;
    });
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...keyed.map((each) => each.row));
  });
}
