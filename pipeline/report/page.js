"use strict";
// Draws the charts, again whenever the page turns dark or light.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const specs = read("specs");
const themes = read("themes");
const dark = matchMedia("(prefers-color-scheme: dark)");
let views = [];
let last = Promise.resolve();

async function draw() {
  const kind = dark.matches ? "dark" : "light";
  document.documentElement.removeAttribute("data-drawn");
  views.forEach((view) => view.finalize());
  views = [];
  for (const place of document.querySelectorAll("[data-chart]")) {
    const spec = specs[Number(place.dataset.chart)];
    const options = {
      actions: false,
      ast: true, // interpret expressions: the security policy allows no code made from text
      config: themes[kind],
      defaultStyle: false,
      renderer: spec.usermeta?.renderer ?? "svg",
      tooltip: { theme: kind },
    };
    views.push(await vegaEmbed(place, spec, options));
    await new Promise((done) => setTimeout(done)); // keeps the page responsive
  }
  document.documentElement.setAttribute("data-drawn", kind);
}

const redraw = () => { last = last.then(draw); };
dark.addEventListener("change", redraw);
redraw();
