"use strict";
// The library and the figures travel compressed inside the page; nothing is fetched.
const unpack = async (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
};

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const setTheme = () => { root.dataset.theme = root.dataset.chosen || (system.matches ? "dark" : "light"); };
setTheme();

const start = async () => {
  const figures = JSON.parse(await unpack("figures"));
  const library = document.createElement("script");
  library.textContent = await unpack("plotly");
  document.head.append(library);

  const chosen = (name) => document.querySelector(`select[name="${name}"]`)?.value ?? "";
  const keysOf = (box) =>
    JSON.parse(box.dataset.figure).map((key) => key.replace(/\{(\w+)\}/g, (_, name) => chosen(name)));

  // "@name" becomes the value of the CSS variable --name in the theme of the moment.
  const coloured = (figure) => {
    const style = getComputedStyle(root);
    const text = JSON.stringify(figure).replace(/"@([\w-]+)"/g, (_, n) => JSON.stringify(style.getPropertyValue(`--${n}`).trim()));
    return JSON.parse(text);
  };

  const draw = (box) => {
    box.dataset.drawn = "yes";
    const parts = keysOf(box).map((key) => figures[key]).filter(Boolean);
    box.hidden = parts.length === 0;
    if (box.hidden) return;
    const { data, layout } = coloured({ data: parts.flatMap((p) => p.data), layout: parts[0].layout });
    if (box.parentElement.querySelector("input[data-all]")?.checked) {
      data.forEach((trace) => { if (trace.visible === false) trace.visible = true; });
    }
    layout.font.family = getComputedStyle(document.body).fontFamily;
    Plotly.react(box, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  };

  const boxes = [...document.querySelectorAll(".figure")];
  const redraw = () => boxes.filter((box) => box.dataset.drawn).forEach(draw);
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) { seen.unobserve(target); draw(target); }
    }
  }, { rootMargin: "400px" });
  boxes.forEach((box) => seen.observe(box));

  document.addEventListener("change", ({ target }) => {
    if (target.matches("input[data-all]")) draw(target.closest("section").querySelector(".figure"));
    if (!target.matches("select")) return;
    document.querySelectorAll(`select[name="${target.name}"]`).forEach((other) => { other.value = target.value; });
    boxes.filter((box) => box.dataset.drawn && box.dataset.figure.includes(`{${target.name}}`)).forEach(draw);
  });
  document.addEventListener("input", ({ target }) => {
    if (!target.dataset.filter) return;
    const words = target.value.toLowerCase().split(/\s+/);
    document.querySelectorAll(`#${target.dataset.filter} tbody tr`).forEach((row) => {
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
  });
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.chosen = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme();
    redraw();
  });
  system.addEventListener("change", () => { setTheme(); redraw(); });
};
document.addEventListener("DOMContentLoaded", start);
