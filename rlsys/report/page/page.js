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

  const facts = (said) => element("div", "facts", said.join(" · "));

  const scored = (text, known) => element("span", known ? "score" : "score none", text);

  const chips = (entries) => {
    const made = element("dd", "group");
    for (const [text, own] of entries) made.append(element("span", own ? "own" : "", text));
    return made;
  };

  const question = (item) => {
    const list = element("dl");
    list.append(element("dt", "", "prompt"), element("dd", "text", item.prompt));
    return list;
  };

  const row = (list, name, content) => list.append(element("dt", "", name), content);

  const said = (score, status) =>
    score === null ? scored(`no score: ${status}`, false) : scored(`score ${digits(score)}`, true);

  const card = (sample) => {
    const made = element("article", "sample");
    const head = element("header");
    head.append(
      said(sample.score, sample.status),
      element("b", "", `${sample.id} #${sample.number}`),
      element("span", "", `step ${sample.step}`),
      element("span", "", data.runs[sample.run]),
    );
    const list = question(sample);
    row(list, "response", response(sample));
    if (sample.answer !== null) row(list, "answer", element("dd", "text", sample.answer));
    row(list, "its group", chips(sample.group.map((score, i) => [digits(score), i === sample.place])));
    made.append(head, list, facts(sample.facts));
    return made;
  };

  // ---- held-out prompts, from evaluation to evaluation ----

  const size = (change) => (change === null ? 0 : Math.abs(change[2]));

  // The change that a kind is about: [step before, step after, by how much].
  const change = (prompt) => {
    if (kind === "learned") return prompt.rise;
    if (kind === "forgotten") return prompt.fall;
    return size(prompt.fall) > size(prompt.rise) ? prompt.fall : prompt.rise;
  };

  const chosen = (prompt) => {
    const there = prompt.evaluations.filter((one) => one.responses.length);
    const between = change(prompt);
    if (byId("which").value === "all") return there;
    const steps =
      byId("which").value === "pair" && between !== null
        ? between.slice(0, 2)
        : [there[0].step, there[there.length - 1].step];
    return there.filter((one) => steps.includes(one.step));
  };

  const evaluation = (one) => {
    const made = element("section", "evaluation");
    const head = element("header");
    const known = one.score !== null;
    head.append(element("b", "", `step ${one.step}`), scored(known ? `mean score ${digits(one.score)}` : "no score", known));
    if (one.count > one.responses.length) head.append(element("span", "", `${one.responses.length} of ${one.count} responses`));
    made.append(head);
    for (const found of one.responses) {
      if (one.count > 1) made.append(said(found.score, found.status));
      made.append(element("div", "text", found.text), facts(found.facts));
    }
    return made;
  };

  const compared = (prompt) => {
    const made = element("article", "sample compared");
    const head = element("header");
    const shown = chosen(prompt);
    const ends = [shown[0], shown[shown.length - 1]].map((one) => digits(one.score));
    head.append(
      scored(shown.length > 1 ? `score ${ends.join(" → ")}` : `score ${ends[0]}`, true),
      element("b", "", prompt.id),
      element("span", "", shown.length > 1 ? `steps ${shown.map((one) => one.step).join(" → ")}` : `step ${shown[0].step}`),
      element("span", "", data.runs[prompt.run]),
    );
    const list = question(prompt);
    if (prompt.answer !== null) row(list, "answer", element("dd", "text", prompt.answer));
    row(list, "scores", chips(prompt.evaluations.map((one) => [`step ${one.step}: ${digits(one.score)}`, shown.includes(one)])));
    const columns = element("div", "evaluations");
    columns.append(...shown.map(evaluation));
    made.append(head, list, columns);
    return made;
  };

  const last = (prompt) => prompt.evaluations.reduce((found, one) => (one.score === null ? found : one.score), null);

  // Prompts that were never scored come last.
  const orders = {
    change: (a, b) => size(change(b)) - size(change(a)),
    low: (a, b) => (last(a) ?? Infinity) - (last(b) ?? Infinity) || 0,
    high: (a, b) => (last(b) ?? -Infinity) - (last(a) ?? -Infinity) || 0,
    id: (a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }),
  };

  // ---- which of them ----

  const number = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));

  const sources = {
    responses: {
      card,
      name: ["response", "responses"],
      text: (sample) => `${sample.id}\n${sample.prompt}\n${sample.text}`,
      ordered: (found) => {
        const low = number("from", -Infinity);
        const high = number("to", Infinity);
        return found.filter((sample) => sample.step >= low && sample.step <= high);
      },
    },
    held_out: {
      card: compared,
      name: ["prompt", "prompts"],
      text: (prompt) =>
        [prompt.id, prompt.prompt, ...prompt.evaluations.flatMap((one) => one.responses.map((found) => found.text))].join("\n"),
      ordered: (found) => found.sort(orders[byId("order").value]),
    },
  };

  const show = () => {
    const name = kind in data.held_out.kinds ? "held_out" : "responses";
    const source = sources[name];
    const run = byId("run").value;
    const text = byId("text").value.toLowerCase();
    const found = source.ordered(
      (data[name].kinds[kind] || [])
        .map((place) => data[name].shown[place])
        .filter((one) => run === "" || one.run === Number(run))
        .filter((one) => text === "" || source.text(one).toLowerCase().includes(text)),
    );
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    for (const own of document.querySelectorAll("[data-of]")) own.hidden = own.dataset.of !== name;
    byId("samples").replaceChildren(...found.slice(0, limit).map(source.card));
    byId("count").textContent = found.length
      ? `${Math.min(limit, found.length)} of ${found.length} ${source.name[1]}`
      : `There is no such ${source.name[0]}.`;
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
  for (const id of ["run", "from", "to", "text", "which", "order"]) byId(id).addEventListener("input", anew);
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  show();
})();
