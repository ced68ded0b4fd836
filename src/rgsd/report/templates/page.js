"use strict";
// Draws the list of responses, ten prompts at a time, and the token maps.
// Text from a run is untrusted: it is only ever inserted as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  function make(tag, options, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(options || {})) {
      if (name === "text") element.textContent = value;
      else if (name === "class") element.className = value;
      else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const signed = (x) => (x > 0 ? "+" : x < 0 ? "\u2212" : "\u00b1") + Math.abs(100 * x).toFixed(1);
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.001 ? (100 * p).toFixed(1) : p > 0 ? "< 0.1" : "0") + " %";
  const nats = (x) => (Math.abs(x) < 0.00005 ? "0" : x.toPrecision(3)).replace("-", "\u2212");

  // --- Light and dark ---
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = $("theme");
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();

  // --- Token maps ---
  let mapCount = 0;
  const shownText = (text) => text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/^ +| +$/g, (s) => "\u2423".repeat(s.length)) || "(part of a character)";

  function quantile(values, q) {
    const sorted = [...values].sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0;
  }

  function drawMap(target, map) {
    const number = ++mapCount;
    const inLoss = map.tokens.filter((t) => t.m);
    const top = Math.max(0.01, quantile((inLoss.length ? inLoss : map.tokens).map((t) => t.d), 0.97));
    // The square root makes small divergences visible; the panel gives the exact values.
    const modes = {
      d: { name: "divergence", tint: () => "--heat", level: (t) => Math.sqrt(Math.min(1, Math.max(0, t.d) / top)) },
      c: { name: "clipped divergence", tint: () => "--heat", level: (t) => Math.sqrt(Math.min(1, Math.max(0, t.c) / top)) },
      w: { name: "direction", tint: (t) => (t.pt >= t.ps ? "--toward" : "--away"),
           level: (t) => (t.pt === t.ps ? 0 : Math.min(1, Math.abs(Math.log((t.pt + 1e-6) / (t.ps + 1e-6))) / Math.log(20))) },
    };
    const tokens = map.tokens.map((t, i) => {
      const span = make("span", { class: "tok" + (t.m ? "" : " masked") + (t.x ? " special" : ""), role: "option", id: `t${number}-${i}`, "aria-selected": "false" });
      if (t.t === "") { span.append(make("span", { class: "sign", text: "\u00b7", "aria-hidden": true })); span.setAttribute("aria-label", "part of a character"); }
      else {
        if (!t.t.trim()) span.setAttribute("aria-label", t.t.includes("\n") ? "line break" : "space");
        t.t.split(/(\n)/).forEach((part) => { if (part === "\n") span.append(make("span", { class: "sign", text: "\u23ce", "aria-hidden": true }), "\n"); else if (part) span.append(part); });
      }
      return span;
    });
    const list = make("div", { class: "toks", role: "listbox", tabindex: "0", "aria-label": "Tokens of the response. Arrow keys move." }, ...tokens);
    const panel = make("div", { class: "token", role: "status" });
    const scale = make("span", { class: "scale" });

    function color(mode) {
      map.tokens.forEach((t, i) => {
        tokens[i].style.setProperty("--h", (0.9 * modes[mode].level(t)).toFixed(3));
        tokens[i].style.setProperty("--tint", `var(${modes[mode].tint(t)})`);
      });
      scale.replaceChildren();
      const swatches = make("i");
      const steps = mode === "w" ? [["--away", 0.9], ["--away", 0.45], ["--heat", 0], ["--toward", 0.45], ["--toward", 0.9]] : [0, 0.25, 0.5, 0.7, 0.9].map((h) => ["--heat", h]);
      for (const [tint, h] of steps) {
        const b = make("b");
        b.style.setProperty("background", `rgb(var(${tint}) / ${h})`);
        swatches.append(b);
      }
      scale.append(mode === "w" ? "less likely with the rubric" : "0", swatches, mode === "w" ? "more likely with the rubric" : `${nats(top)} nats or more`);
    }

    function topTokens(title, entries, written) {
      return make("div", {}, make("h4", { text: title }), make("ol", {}, ...entries.map(([text, p]) => {
        const li = make("li", { class: text === written ? "written" : "" }, make("span", { text: shownText(text) }), make("em", { text: percent(p) }));
        li.style.setProperty("--w", `${Math.round(100 * p)}%`);
        return li;
      })));
    }

    let at = -1;
    function show(i) {
      if (i < 0 || i >= tokens.length || i === at) return;
      if (at >= 0) { tokens[at].classList.remove("on"); tokens[at].setAttribute("aria-selected", "false"); }
      at = i;
      const t = map.tokens[i];
      tokens[i].classList.add("on");
      tokens[i].setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", tokens[i].id);
      const clipped = t.d - t.c > 1e-9 ? `, ${nats(t.c)} after the clip` : "";
      panel.replaceChildren(
        make("h3", {}, "\u201c", make("code", { text: shownText(t.t) }), "\u201d"),
        make("p", { text: `Divergence: ${nats(t.d)} nats${clipped}${t.m ? "" : "; not in the loss"}. Probability of this token: teacher ${percent(t.pt)}, student ${percent(t.ps)}.` }),
        make("div", { class: "dists" }, topTokens("Teacher\u2019s top tokens", t.T, t.t), topTokens("Student\u2019s top tokens", t.S, t.t)),
      );
    }
    panel.append(make("h3", { text: "Select a token" }), make("p", { text: "Use the mouse, touch, or the arrow keys to see the most likely tokens of teacher and student at that position." }));

    const indexOf = (event) => tokens.indexOf(event.target.closest && event.target.closest(".tok"));
    list.addEventListener("mouseover", (event) => show(indexOf(event)));
    list.addEventListener("click", (event) => show(indexOf(event)));
    list.addEventListener("focus", () => { if (at < 0) show(0); });
    list.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(moves[event.key]);
      tokens[at].scrollIntoView({ block: "nearest" });
    });

    const choice = make("fieldset", {}, make("legend", { text: "Color by" }));
    Object.entries(modes).forEach(([key, mode], i) => {
      const input = make("input", { type: "radio", name: `mode${number}`, value: key, checked: i === 0 });
      input.addEventListener("change", () => color(key));
      choice.append(make("label", {}, input, mode.name));
    });
    const criteria = make("div", { class: "crit" }, make("h3", { text: "The rubric" }), make("ol", {}, ...(map.criteria || []).map((c) =>
      make("li", {}, c.weight < 0 ? make("span", { class: "tag bad", text: "pitfall" }) : null, c.weight < 0 ? " " : null, c.criterion, make("small", { text: ` (${c.weight})` }), c.is_shown ? null : make("small", { text: " not shown to the teacher" })))));
    target.replaceChildren(make("div", { class: "map" }, make("div", { class: "maphead" }, choice, scale), list, make("div", { class: "side-panel" }, panel, criteria)));
    color("d");
  }

  const view = $("mapview");
  const mapName = (m) => `${m.run ? m.run + ": " : ""}${m.example_id} (${m.policy}): ${m.question.slice(0, 70)}`;
  if (view && data.maps.length) {
    const choice = $("mapchoice");
    if (choice) {
      data.maps.forEach((m, i) => choice.append(make("option", { value: i, text: mapName(m) })));
      choice.addEventListener("change", () => drawMap(view, data.maps[choice.value]));
    }
    drawMap(view, data.maps[0]);
  }

  // --- Responses ---
  if (!data.prompts || !data.prompts.length || !$("list")) return;
  const state = { left: data.left, right: data.right, filter: "all", sort: "given", find: "", page: 0 };
  const mapped = new Map(data.maps.map((m) => [m.example_id, m]));
  for (const side of ["left", "right"]) {
    data.arms.forEach((name, i) => $(side).append(make("option", { value: i, text: name })));
    $(side).value = state[side];
  }

  const scoreOf = (prompt, k) => (prompt.a[k] ? prompt.a[k].s : null);
  function gain(prompt) {
    const a = scoreOf(prompt, state.left), b = scoreOf(prompt, state.right);
    return a === null || b === null ? null : b - a;
  }
  const isUnscored = (r) => r && (r.p || r.v.some((v) => v === null));
  let texts = null;
  function textOf(i) {
    // Built at the first search, since most readers never search.
    texts = texts || data.prompts.map((p) => [p.id, p.q, ...p.c.map((c) => c[0]), ...Object.values(p.a).map((r) => r.r)].join("\n").toLowerCase());
    return texts[i];
  }

  function chosen() {
    const keep = {
      all: () => true,
      won: (p) => gain(p) > 0,
      lost: (p) => gain(p) !== null && gain(p) < 0,
      same: (p) => gain(p) === 0,
      leak: (p) => [state.left, state.right].some((k) => p.a[k] && p.a[k].l),
      unscored: (p) => [state.left, state.right].some((k) => isUnscored(p.a[k])),
      map: (p) => mapped.has(p.id),
    }[state.filter];
    const query = state.find.trim().toLowerCase();
    const prompts = data.prompts.filter((p, i) => (p.a[state.left] || p.a[state.right]) && keep(p) && (!query || textOf(i).includes(query)));
    const length = (p) => (p.a[state.right] && p.a[state.right].n) || 0;
    // Prompts without a gain come last.
    if (state.sort === "gain") prompts.sort((a, b) => (gain(b) ?? -9) - (gain(a) ?? -9));
    if (state.sort === "loss") prompts.sort((a, b) => (gain(a) ?? 9) - (gain(b) ?? 9));
    if (state.sort === "long") prompts.sort((a, b) => length(b) - length(a));
    return prompts;
  }

  function side(prompt, k) {
    const r = prompt.a[k];
    const head = make("h4", {}, data.arms[k]);
    if (!r) return make("div", { class: "side" }, head, make("p", { class: "empty", text: "This policy has no response." }));
    head.append(make("small", { text: (r.s === null ? "unscored" : `score ${r.s.toFixed(3)}`) + (r.n === null ? "" : `, ${r.n} tokens`) }));
    if (r.t) head.append(make("span", { class: "tag", text: "cut off" }));
    if (r.l) head.append(make("span", { class: "tag bad", text: "mentions a rubric" }));
    if (r.p) head.append(make("span", { class: "tag bad", text: `judge: ${r.p}` }));
    const box = make("div", { class: "side" }, head);
    box.append(r.r.trim() ? make("div", { class: "text", dir: "auto", text: r.r, tabindex: "0", role: "group", "aria-label": `Response of ${data.arms[k]}` }) : make("p", { class: "empty", text: "The response is empty." }));
    if (r.full) box.append(make("details", {}, make("summary", { text: "With reasoning" }), make("div", { class: "text", dir: "auto", text: r.full })));
    return box;
  }

  function mark(value, weight, reason) {
    const cell = make("td", { class: "mark" });
    if (value === null || value === undefined) cell.append(make("span", { class: "open", text: value === null ? "unscored" : "–" }));
    else {
      const good = weight < 0 ? 1 - value : value;
      const word = value === 1 ? "met" : value === 0 ? (weight < 0 ? "avoided" : "not met") : value.toFixed(2);
      cell.append(make("span", { class: good >= 0.5 ? "yes" : "no", text: (good >= 0.5 ? "\u2713" : "\u2717") + " " }, make("span", { class: value > 0 && value < 1 ? "" : "mw", text: word })));
    }
    if (reason) cell.append(make("br"), make("small", { text: reason }));
    return cell;
  }

  function verdicts(prompt) {
    const [a, b] = [prompt.a[state.left], prompt.a[state.right]];
    const same = (!a || !a.c) && (!b || !b.c);
    const blocks = same ? [[prompt.c, a, b]] : [[(a && a.c) || prompt.c, a, null], [(b && b.c) || prompt.c, null, b]];
    const box = make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Criteria of ${prompt.id}` });
    for (const [criteria, left, right] of blocks) {
      const body = make("tbody");
      criteria.forEach(([text, weight], i) => {
        const before = left ? left.v[i] : undefined, after = right ? right.v[i] : undefined;
        const good = (v) => (weight < 0 ? 1 - v : v);
        const moved = typeof before === "number" && typeof after === "number" ? Math.sign(good(after) - good(before)) : 0;
        body.append(make("tr", { class: moved > 0 ? "moved-up" : moved < 0 ? "moved-down" : "" },
          make("th", { scope: "row" }, weight < 0 ? make("span", { class: "tag bad", text: "pitfall" }) : null, weight < 0 ? " " : null, text, make("small", { text: ` (${weight})` })),
          mark(before, weight, left && left.w && left.w[i]), mark(after, weight, right && right.w && right.w[i])));
      });
      box.append(make("table", { class: "verdicts" }, make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "criterion (weight)" }),
        make("th", { scope: "col", class: "mark", text: data.arms[state.left] }), make("th", { scope: "col", class: "mark", text: data.arms[state.right] }))), body));
    }
    return box;
  }

  function card(prompt) {
    const g = gain(prompt);
    const head = make("p", { class: "eyebrow" }, make("strong", { text: prompt.id }), prompt.d ? ` · ${prompt.d}` : "", " ",
      g === null ? null : make("span", { class: "tag" + (g > 0 ? " good" : g < 0 ? " bad" : ""), text: `${signed(g)} points` }));
    const box = make("article", { class: "prompt" }, head, make("h3", { text: prompt.q, dir: "auto", tabindex: prompt.q.length > 600 ? "0" : null }),
      make("div", { class: "pair" }, side(prompt, state.left), state.left === state.right ? null : side(prompt, state.right)), verdicts(prompt));
    const map = mapped.get(prompt.id);
    if (map) {
      const target = make("div");
      const details = make("details", {}, make("summary", { text: "Token map" }), target);
      details.addEventListener("toggle", () => { if (details.open && !target.firstChild) drawMap(target, map); });
      box.append(details);
    }
    return box;
  }

  function render(isNewChoice) {
    const prompts = chosen();
    const pages = Math.max(1, Math.ceil(prompts.length / data.perPage));
    if (isNewChoice) state.page = 0;
    state.page = Math.min(pages - 1, Math.max(0, state.page));
    const start = state.page * data.perPage;
    $("list").replaceChildren(...prompts.slice(start, start + data.perPage).map(card));
    $("count").textContent = prompts.length === 1 ? "1 prompt" : `${prompts.length.toLocaleString("en")} prompts`;
    $("pager").hidden = pages < 2;
    $("where").textContent = `Page ${state.page + 1} of ${pages}`;
    $("prev").disabled = state.page === 0;
    $("next").disabled = state.page === pages - 1;
  }

  for (const name of ["left", "right"]) $(name).addEventListener("change", (event) => { state[name] = Number(event.target.value); render(true); });
  for (const name of ["filter", "sort"]) $(name).addEventListener("change", (event) => { state[name] = event.target.value; render(true); });
  $("find").addEventListener("input", (event) => { state.find = event.target.value; render(true); });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const [name, by] of [["prev", -1], ["next", 1]]) {
    $(name).addEventListener("click", () => { state.page += by; render(false); $("responses").scrollIntoView(); });
  }
  render(true);
})();
