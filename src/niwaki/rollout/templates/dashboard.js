"use strict";
(() => {
  const root = document.documentElement;
  const at = (id) => document.getElementById(id);
  const NAMES = {
    error_rate: "Errors of the canary",
    prefill_latency_ratio: "Time to the first byte",
    decode_latency_ratio: "Time per token",
    top1_agreement: "Agreement on the next token",
    perplexity_ratio: "Perplexity on prompts",
    logprob_gap: "Log-probability gap",
  };
  const ABOUT = {
    error_rate: "requests on which it failed and dense did not",
    prefill_latency_ratio: "canary / dense, median of pairs at the same time",
    decode_latency_ratio: "canary / dense, median of pairs at the same time",
    top1_agreement: "tokens of audited answers, mean",
    perplexity_ratio: "canary / dense on audited prompts, geometric mean",
    logprob_gap: "canary − dense on audited answers, nats per token",
  };
  const SIDES = {
    stable: "Dense, by its share", canary: "Canary", fallback: "Dense, because the canary failed",
    important: "Dense, because they are important", shadow: "Canary, a copy that no client waits for",
  };
  const LABELS = { hold: "hold", widen: "widen", return: "return", promote: "promote", abort: "abort", begin: "begin", restart: "restart", alarm: "alarm" };
  const BAD = new Set(["return", "abort", "alarm"]);
  const GOOD = new Set(["widen", "promote"]);
  const SHARES = new Set(["error_rate", "top1_agreement"]);
  const PLOTS = [
    { id: "agreement", title: "Agreement on the next token", signals: ["top1_agreement"], percent: true },
    { id: "latency", title: "Latency, canary / dense", signals: ["prefill_latency_ratio", "decode_latency_ratio"] },
    { id: "errors", title: "Errors of the canary", signals: ["error_rate"], percent: true },
    { id: "perplexity", title: "Perplexity on prompts, canary / dense", signals: ["perplexity_ratio"] },
  ];
  const COLORS = ["#0072B2", "#D55E00"];

  const percent = (value) => `${+(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
  const number = (signal, value) => (value === null ? "–" : SHARES.has(signal) ? `${(100 * value).toFixed(1)} %` : value.toFixed(2));
  const when = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 19).replace("T", " ");

  // Text of a model or a user is inserted as text, never as markup.
  function made(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) if (value !== undefined) node.setAttribute(name, value);
    node.append(...children.filter((child) => child !== undefined));
    return node;
  }
  const chip = (text, kind) => made("span", { class: `chip ${kind}` }, text);

  function summary(data) {
    const text = {
      running: `${percent(data.share)} of requests go to the canary`,
      promoted: "promoted: the canary answers, dense is on standby",
      returned: "returned: the dense model answers everything",
      aborted: "aborted: the dense model answers everything",
    }[data.status];
    const kind = { running: "none", promoted: "pass", returned: "fail", aborted: "fail" }[data.status];
    const last = data.decisions.find((one) => !["restart", "begin"].includes(one.action));
    const verdict = at("verdict");
    verdict.className = `verdict ${kind}`;
    verdict.replaceChildren(chip(data.status, kind), text);
    if (last) verdict.append(made("span", { class: "sub" }, `${LABELS[last.action]}: ${last.reason}`));
    at("title").textContent = `Roll-out ${data.rollout}`;
    at("about").textContent = `${data.identity} · started ${when(data.begun)} UTC · verdict every ${data.interval_s} s`;
    at("steps").replaceChildren(...data.steps.map((share, step) => {
      const on = data.status === "running" || data.status === "promoted";
      const done = on && (step < data.step || data.status === "promoted");
      const now = on && step === data.step;
      return made("li", { class: `${done ? "done" : ""} ${now ? "now" : ""}`, "aria-current": now ? "step" : undefined }, percent(share));
    }));
    at("alarms").hidden = !data.alarms.length;
    at("alarms").replaceChildren(...data.alarms.map((alarm) => made("li", {}, alarm)));
    at("certain").textContent = `The bands hold at all times at once with ${percent(data.confidence)} confidence. Drift of ${data.drift.prompts.seen} prompts and ${data.drift.agreement.seen} audits: strength ${strength(data.drift.prompts)} and ${strength(data.drift.agreement)}. The alarm is at 10,000.`;
  }
  const strength = (drift) => (drift.strength < 1e6 ? drift.strength.toFixed(1) : drift.strength.toExponential(0));

  function card(one) {
    const state = one.broken ? ["broken", "fail"] : one.kept ? ["kept", "pass"] : [one.seen ? "open" : "no data", "none"];
    const band = one.seen ? `${number(one.signal, one.low)} to ${number(one.signal, one.high)}, from ${one.seen.toLocaleString("en")}` : "";
    return made("article", { class: "card" },
      made("header", {}, made("h3", {}, NAMES[one.signal]), chip(...state)),
      made("p", { class: "meta" }, ABOUT[one.signal]),
      made("div", { class: "big" }, number(one.signal, one.value)),
      made("p", { class: "limit" }, `${one.side === "max" ? "max" : "min"} ${number(one.signal, one.limit)}`, made("span", { class: "sub" }, band)));
  }

  function decision(one) {
    const kind = BAD.has(one.action) ? "fail" : GOOD.has(one.action) ? "pass" : "none";
    return made("tr", {}, made("td", {}, when(one.at)), made("td", {}, chip(LABELS[one.action] || one.action, kind)),
      made("td", {}, ["returned", "aborted"].includes(one.status) ? "0 %" : percent(one.share)), made("td", { class: "text" }, one.reason));
  }

  function counts(rows, none) {
    if (!rows.length) return [made("tr", {}, made("th", { scope: "row" }, none), made("td", {}, ""))];
    return rows.map(([name, count]) => made("tr", {}, made("th", { scope: "row" }, name), made("td", {}, typeof count === "number" ? count.toLocaleString("en") : count)));
  }

  function audit(one) {
    const parts = [`agreement ${percent(one.scores.top1_agreement)} of ${one.tokens} tokens`, `gap ${one.scores.logprob_gap.toFixed(2)} nats per token`];
    if (one.scores.perplexity_ratio !== undefined) parts.push(`perplexity on the prompt ×${one.scores.perplexity_ratio.toFixed(2)}`);
    const node = made("article", { class: "audit" }, made("h3", {}, `${when(one.at)} · ${one.how} · ${parts.join(" · ")}`));
    if (!one.texts) return node;
    const side = (place) => one.texts.places.map((token) => (token[2] ? token[place] : made("mark", {}, token[place])));
    const prompt = one.texts.prompt;
    node.append(made("blockquote", { class: "raw" }, prompt.length > 400 ? `… ${prompt.slice(-400)}` : prompt));
    node.append(made("div", { class: "sides" },
      made("div", {}, made("h4", {}, "Answer of the canary"), made("p", { class: "raw" }, ...side(0))),
      made("div", {}, made("h4", {}, "Most likely tokens of dense"), made("p", { class: "raw" }, ...side(1)))));
    return node;
  }

  function series(data, signal) {
    return data.decisions.filter((one) => one.findings.length).map((one) => ({ at: one.at, ...one.findings.find((found) => found.signal === signal) }))
      .filter((one) => one.value !== undefined && one.value !== null).reverse();
  }

  function traces(plot, data) {
    const found = [];
    plot.signals.forEach((signal, place) => {
      const points = series(data, signal);
      const x = points.map((one) => new Date(1000 * one.at).toISOString());
      const color = COLORS[place];
      const band = { mode: "lines", line: { width: 0, color }, hoverinfo: "skip", showlegend: false };
      found.push({ ...band, x, y: points.map((one) => one.low) });
      found.push({ ...band, x, y: points.map((one) => one.high), fill: "tonexty", fillcolor: `${color}33` });
      found.push({ x, y: points.map((one) => one.value), mode: "lines+markers", name: NAMES[signal], line: { color, dash: place ? "dot" : "solid" }, marker: { symbol: place ? "square" : "circle", size: 6 } });
    });
    return found;
  }

  function limits(plot, data, ink) {
    const own = [...new Set(data.findings.filter((one) => plot.signals.includes(one.signal)).map((one) => one.limit))];
    return {
      shapes: own.map((limit) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: limit, y1: limit, line: { dash: "dash", width: 1.5, color: ink.muted } })),
      annotations: own.map((limit) => ({ xref: "paper", x: 0, y: limit, xanchor: "left", yanchor: "bottom", text: "limit", showarrow: false, font: { color: ink.muted, size: 12 } })),
    };
  }

  function draw(data) {
    const shown = PLOTS.filter((plot) => plot.signals.some((signal) => series(data, signal).length));
    at("course").hidden = !shown.length;
    for (const plot of shown.filter((one) => !at(`plot-${one.id}`))) {  // create all before the first plot: they share the width
      const node = made("div", { class: "canvas", id: `plot-${plot.id}`, style: "height: 270px", role: "img" });
      at("plots").append(made("figure", { class: "plot" }, made("figcaption", {}, plot.title), node));
    }
    for (const plot of shown) {
      const node = at(`plot-${plot.id}`);
      const last = plot.signals.map((signal) => [signal, series(data, signal).at(-1)]).filter(([, one]) => one);
      node.setAttribute("aria-label", `${plot.title}: ${last.map(([signal, one]) => `${NAMES[signal]} ${number(signal, one.value)}`).join(", ")}`);
      const ink = { text: getComputedStyle(document.body).color, grid: getComputedStyle(node.parentElement).borderTopColor, muted: getComputedStyle(at("about")).color };
      const axis = { gridcolor: ink.grid, linecolor: ink.grid, zerolinecolor: ink.grid, automargin: true };
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink.text, family: getComputedStyle(document.body).fontFamily, size: 13 },
        margin: { l: 50, r: 12, t: 8, b: 36 }, xaxis: { ...axis, type: "date", nticks: 4 }, yaxis: { ...axis, tickformat: plot.percent ? ".1%" : ".2f", rangemode: "normal" },
        showlegend: plot.signals.length > 1, legend: { orientation: "h", x: 0, y: 1.18 }, hovermode: "x unified", ...limits(plot, data, ink),
      };
      Plotly.react(node, traces(plot, data), layout, { responsive: true, displayModeBar: false });
    }
  }

  let latest = null;
  let shown = "";
  function show(data) {
    latest = data;
    summary(data);
    const { now, ...rest } = data;
    const fresh = JSON.stringify(rest);
    if (fresh === shown) return;  // keep a selection of the reader
    shown = fresh;
    at("cards").replaceChildren(...data.findings.map(card));
    at("log").replaceChildren(...data.decisions.map(decision));
    at("requests").replaceChildren(...counts(Object.entries(SIDES).filter(([side]) => data.requests[side]).map(([side, name]) => [name, data.requests[side]]), "no request yet"));
    const weights = data.skipped_frac === null ? [] : [["weights that the canary skips per answer, mean", percent(data.skipped_frac)]];
    at("skipped").replaceChildren(...counts([...weights, ...Object.entries(data.skipped)], "nothing was skipped"));
    at("audits-note").textContent = data.keep_texts ? "The tokens on which the models differ are marked." : "Numbers only. The gateway keeps texts with --keep-texts.";
    at("audit-list").replaceChildren(...data.audits.map(audit));
    draw(data);
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const themed = () => { at("theme").setAttribute("aria-pressed", String(isDark())); if (latest) draw(latest); };
  at("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
  dark.addEventListener("change", themed);
  themed();

  async function update() {
    try {
      const answer = await fetch("rollout/data", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      show(await answer.json());
      at("live").textContent = "live";
      at("live").className = "live";
      root.dataset.ready = "yes";
    } catch {
      at("live").textContent = "no connection";
      at("live").className = "live lost";
    }
    setTimeout(update, 2000);
  }
  update();
})();
