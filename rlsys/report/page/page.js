"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  // On a touch screen a finger on a figure scrolls the page.
  const touch = matchMedia("(pointer: coarse)").matches;
  const draw = (place, figure) => {
    const axis = touch ? { fixedrange: true } : {};
    const layout = {
      ...figure.layout,
      template: data.template,
      dragmode: touch ? false : "zoom",
      xaxis: { ...figure.layout.xaxis, ...axis },
      yaxis: { ...figure.layout.yaxis, ...axis },
    };
    return Plotly.react(place, figure.data, layout, { responsive: true, displayModeBar: false });
  };

  // Figures are drawn when they come near: a phone has a page at once.
  const figures = new Map();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target, figures.get(entry.target));
    }
  }, { rootMargin: "400px" });
  document.querySelectorAll(".plot").forEach((place, i) => {
    figures.set(place, data.figures[i]);
    near.observe(place);
  });

  const metric = byId("metric");
  if (metric !== null) {
    const show = () => draw(byId("metric-plot"), data.metrics[metric.value]);
    metric.addEventListener("change", show);
    show();
  }

  // ---- responses ----

  const PAGE = 20;
  const buttons = [...document.querySelectorAll("button[data-kind]")];
  const first = buttons.find((button) => !button.disabled);
  let kind = first ? first.dataset.kind : "";
  let limit = PAGE;

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text; // never as HTML: it is what a model wrote
    return made;
  };

  const digits = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))));

  const response = (sample) => {
    const shown = element("dd", "text");
    if (!sample.pieces.length) {
      shown.textContent = sample.text;
      return shown;
    }
    for (const [text, change] of sample.pieces) {
      const piece = element("span", "piece", text);
      shown.append(piece);
      if (change === null) continue;
      const strength = Math.min(1, Math.abs(change)) * 0.6;
      piece.style.background = change < 0 ? `rgba(214, 69, 48, ${strength})` : `rgba(34, 150, 83, ${strength})`;
      shown.append(element("small", "", ` ${change < 0 ? "" : "+"}${change.toFixed(2)} `));
    }
    return shown;
  };

  const card = (sample) => {
    const made = element("article", "sample");
    const head = element("header");
    const scored = sample.score !== null;
    head.append(
      element("span", scored ? "score" : "score none", scored ? `score ${digits(sample.score)}` : `no score: ${sample.status}`),
      element("b", "", `${sample.id} #${sample.number}`),
      element("span", "", `step ${sample.step}`),
      element("span", "", data.runs[sample.run]),
    );
    const list = element("dl");
    const row = (name, content) => list.append(element("dt", "", name), content);
    row("prompt", element("dd", "text", sample.prompt));
    row("response", response(sample));
    if (sample.answer !== null) row("answer", element("dd", "text", sample.answer));
    const group = element("dd", "group");
    sample.group.forEach((score, i) => group.append(element("span", i === sample.place ? "own" : "", digits(score))));
    row("its group", group);
    made.append(head, list, element("div", "facts", sample.facts.join(" · ")));
    return made;
  };

  const number = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));

  const show = () => {
    const run = byId("run").value;
    const low = number("from", -Infinity);
    const high = number("to", Infinity);
    const text = byId("text").value.toLowerCase();
    const found = (data.kinds[kind] || [])
      .map((place) => data.samples[place])
      .filter((s) => run === "" || s.run === Number(run))
      .filter((s) => s.step >= low && s.step <= high)
      .filter((s) => text === "" || `${s.id}\n${s.prompt}\n${s.text}`.toLowerCase().includes(text));
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    byId("samples").replaceChildren(...found.slice(0, limit).map(card));
    byId("count").textContent = found.length
      ? `${Math.min(limit, found.length)} of ${found.length} responses`
      : "There is no such response.";
    byId("more").hidden = found.length <= limit;
  };

  const anew = () => {
    limit = PAGE;
    show();
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      kind = button.dataset.kind;
      anew();
    });
  }
  for (const id of ["run", "from", "to", "text"]) byId(id).addEventListener("input", anew);
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  show();
})();
