"use strict";
(() => {
  const root = document.documentElement;
  const canvases = [...document.querySelectorAll("[data-plot]")].map((data) => {
    const { data: traces, layout } = JSON.parse(data.textContent);
    return { node: document.getElementById(data.dataset.plot), traces, layout };
  });

  // Custom properties are not resolved when read; real colours of elements are.
  function inks() {
    const figure = document.querySelector("figure.plot");
    const muted = document.querySelector(".note");
    return {
      "font.color": getComputedStyle(document.body).color,
      "grid": figure ? getComputedStyle(figure).borderTopColor : "#888",
      "muted": muted ? getComputedStyle(muted).color : "#888",
      "panel": figure ? getComputedStyle(figure).backgroundColor : "#fff",
    };
  }

  function themed(layout) {
    const ink = inks();
    const axis = { gridcolor: ink.grid, linecolor: ink.grid, zerolinecolor: ink.grid, tickcolor: ink.grid };
    const out = { ...layout, font: { ...layout.font, color: ink["font.color"], family: getComputedStyle(document.body).fontFamily } };
    out.hoverlabel = { bgcolor: ink.panel, bordercolor: ink.muted, font: { color: ink["font.color"] }, align: "left" };
    for (const name of ["xaxis", "yaxis"]) out[name] = { ...layout[name], ...axis };
    out.shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: ink.muted } }));
    out.annotations = (layout.annotations || []).map((one) => ({ ...one, font: { ...one.font, color: ink.muted } }));
    return out;
  }

  function draw(width) {
    for (const { node, traces, layout } of canvases) {
      const own = width ? { ...themed(layout), width: Math.min(width, node.clientWidth || width), height: parseInt(node.style.height, 10), autosize: false } : themed(layout);
      const narrow = (width || node.clientWidth) < 420;  // numbers in cells cannot be read there
      const shown = narrow ? traces.map((one) => (one.type === "heatmap" ? { ...one, texttemplate: "" } : one)) : traces;
      Plotly.react(node, shown, own, { responsive: !width, displayModeBar: false, displaylogo: false, doubleClick: "reset" });
    }
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const button = document.getElementById("theme");
  const show = () => { button.setAttribute("aria-pressed", String(isDark())); draw(); };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; show(); });
  dark.addEventListener("change", show);

  let before = null;
  addEventListener("beforeprint", () => { before = root.dataset.theme ?? ""; root.dataset.theme = "light"; draw(660); });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    draw();
  });
  document.getElementById("print").addEventListener("click", () => print());

  const copy = document.getElementById("copy");
  copy.addEventListener("click", async () => {
    const command = document.getElementById("command");
    const select = () => { const range = document.createRange(); range.selectNodeContents(command); getSelection().removeAllRanges(); getSelection().addRange(range); };
    let done = true;
    try { await navigator.clipboard.writeText(command.textContent); }
    catch { select(); done = document.execCommand("copy"); }  // the clipboard is closed to some files opened from disk
    const label = copy.textContent;
    copy.textContent = document.getElementById("copy-status").textContent = done ? copy.dataset.done : copy.dataset.failed;
    setTimeout(() => { copy.textContent = label; }, 2000);
  });

  const keyOf = (cell) => {
    const number = parseFloat(cell.dataset.key ?? cell.textContent);
    return Number.isNaN(number) ? cell.textContent : number;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.querySelectorAll("thead th")];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [keyOf(a.cells[column]), keyOf(b.cells[column])];
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    }));
  }

  document.querySelector(".tools").hidden = copy.hidden = false;
  show();
  root.dataset.ready = "yes";
})();
