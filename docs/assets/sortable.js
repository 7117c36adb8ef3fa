// A click on the header of a table with the class "sortable" sorts it by that column;
// a second click turns the order round. Without JavaScript the table is as it was.
document$.subscribe(() => {
  const key = (row, column) => row.cells[column].textContent.trim();
  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const falling = header.ariaSort === "ascending";
        headers.forEach((other) => (other.ariaSort = null));
        header.ariaSort = falling ? "descending" : "ascending";
        const rows = [...table.tBodies[0].rows].sort((a, b) =>
          key(a, column).localeCompare(key(b, column), "en", { numeric: true }),
        );
        table.tBodies[0].append(...(falling ? rows.reverse() : rows));
      });
    });
  }
});
