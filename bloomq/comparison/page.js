"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (name, text) => {
    const node = document.createElement(name);
    node.textContent = text;
    return node;
  };

  const show = (index) => {
    const tensor = data[index];
    $("area").setAttribute("d", tensor.area);
    $("grid").setAttribute("d", tensor.grid);
    tensor.ends.forEach((label, i) => ($(`end-${i}`).textContent = label));
    $("caption").textContent = tensor.told;
    $("facts").replaceChildren();
    for (const [name, value] of tensor.facts) $("facts").append(make("dt", name), make("dd", value));
  };
  $("chosen").addEventListener("change", () => show(Number($("chosen").value)));

  const table = $("tensors"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const raw = row.cells[column].getAttribute("data-value"), number = Number(raw);
    return Number.isNaN(number) ? raw : number;
  };
  heads.forEach((head, column) => {
    head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => sign * (a > b ? 1 : a < b ? -1 : 0));
      body.append(...rows.map(([, row]) => row));
    });
  });
  [...body.rows].forEach((row) => row.addEventListener("click", () => {
    const index = row.cells[0].getAttribute("data-value");
    $("chosen").value = index;
    show(Number(index));
  }));
})();
