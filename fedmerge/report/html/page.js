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
// A field that finds domains by a part of their names, on pages with too many of them for a table.
const find = document.getElementById("find");
if (find) {
  const most = 20;
  const known = JSON.parse(document.getElementById("find-data").textContent);
  const table = document.querySelector("#found table");
  find.addEventListener("input", () => {
    const part = find.value.trim().toLowerCase();
    const matching = part ? known.filter((row) => row[0].toLowerCase().includes(part)) : [];
    table.tBodies[0].replaceChildren(
      ...matching.slice(0, most).map((texts) => {
        const row = document.createElement("tr");
        texts.forEach((text, place) => {
          const cell = document.createElement(place ? "td" : "th");
          if (!place) cell.scope = "row";
          cell.className = table.tHead.rows[0].cells[place].className;
          cell.textContent = text;
          row.append(cell);
        });
        return row;
      }),
    );
    const more = matching.length > most ? `, the first ${most} are shown` : "";
    document.getElementById("find-status").textContent = part ? ` ${matching.length} of ${known.length}${more}` : "";
  });
}
