"use strict";
// Draws each chart as SVG from the JSON in #data; text goes in by textContent only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");
  const charts = [];

  const make = (parent, tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  };

  const show = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(+value.toPrecision(3));
  };

  const axis = (value, unit) => {
    if (value === 0) return "0";
    if (unit < 0.0005 || Math.abs(value) >= 1e5) return value.toExponential(1).replace("e+", "e");
    return value.toLocaleString("en", { maximumFractionDigits: Math.max(0, 1 - Math.floor(Math.log10(unit))) });
  };

  const ticks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const unit = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough) * power;
    const out = [];
    for (let v = Math.ceil(low / unit - 1e-9) * unit; v <= high + unit * 1e-9; v += unit) {
      out.push(Math.abs(v) < unit * 1e-9 ? 0 : v);
    }
    return { unit, values: out };
  };

  // Exponential mean without the pull of its start (the weights are normalised).
  const smooth = (values, keep) => {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value !== null) { sum = keep * sum + (1 - keep) * value; weight = keep * weight + (1 - keep); }
      return weight ? sum / weight : null;
    });
  };

  const line = (points) => {
    let path = "", pen = false;
    for (const [x, y] of points) {
      if (y === null) { pen = false; continue; }
      path += (pen ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1);
      pen = true;
    }
    return path;
  };

  function draw(holder, spec) {
    holder.querySelector("svg")?.remove();
    const width = Math.max(220, holder.clientWidth - 32);
    const height = holder.classList.contains("wide") ? 230 : 160;
    const right = 8, top = 20, bottom = 20;
    const svg = make(holder, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    make(svg, "title", {}, spec.title);

    const runs = spec.lines.map((entry) => ({ ...entry, smoothed: smooth(entry.values, entry.values.length > 24 ? 0.85 : 0.4) }));
    const all = runs.flatMap((run) => run.values).filter((v) => v !== null);
    if (!all.length) return;
    let low = Math.min(...all), high = Math.max(...all);
    if (spec.unit && low >= 0 && high <= 1) { low = 0; high = 1; }
    else if (low >= 0 && low < 0.5 * high) low = 0;
    if (high - low < 1e-12) { const pad = Math.abs(high) * 0.1 || 1; low -= pad; high += pad; }
    const y = (v) => top + (height - top - bottom) * (1 - (v - low) / (high - low));

    const scale = ticks(low, high, 4);
    const labels = scale.values.map((v) => make(svg, "text", { y: y(v) + 3.5, "text-anchor": "end" }, axis(v, scale.unit)));
    const left = Math.max(33, ...labels.map((label) => label.getComputedTextLength())) + 7; // none is cut
    for (const label of labels) label.setAttribute("x", left - 7);
    for (const v of scale.values) {
      make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) });
    }
    const total = runs.reduce((sum, run) => sum + Math.max(1, run.steps.length), 0);
    const gap = runs.length > 1 ? 10 : 0;
    const room = width - left - right - gap * (runs.length - 1);
    let next = left;
    for (const run of runs) {
      const from = next; // its own: `run.x` is called long after the loop has moved on
      const span = Math.max(8, room * Math.max(1, run.steps.length) / total);
      const first = run.steps[0], last = run.steps[run.steps.length - 1];
      const x = (step) => (last === first ? from + span / 2 : from + span * (step - first) / (last - first));
      run.x = x; run.from = from; run.to = from + span;
      if (run !== runs[0]) make(svg, "line", { class: "divide", x1: from - gap / 2, x2: from - gap / 2, y1: top - 12, y2: height - bottom });
      const color = `var(--p${run.color % 8})`;
      if (span > 7 * run.name.length) make(svg, "text", { class: "phase", x: from, y: top - 9, style: `fill:${color}` }, run.name);
      make(svg, "text", { x: from, y: height - 5 }, show(first));
      if (last !== first && span > 48) make(svg, "text", { x: from + span, y: height - 5, "text-anchor": "end" }, show(last));
      if (run.steps.length < 3) {
        run.steps.forEach((s, i) => run.values[i] !== null && make(svg, "circle", { cx: x(s), cy: y(run.values[i]), r: 3, style: `fill:${color}` }));
      } else {
        make(svg, "path", { class: "raw", style: `stroke:${color}`, d: line(run.steps.map((s, i) => [x(s), run.values[i] === null ? null : y(run.values[i])])) });
        make(svg, "path", { class: "smooth", style: `stroke:${color}`, d: line(run.steps.map((s, i) => [x(s), run.smoothed[i] === null ? null : y(run.smoothed[i])])) });
      }
      for (const step of run.alarms) {
        const mark = make(svg, "path", { class: "alarm", d: `M${x(step)} ${height - bottom - 6}l4 6h-8Z` });
        make(mark, "title", {}, `${run.name} · step ${step} · alarm`);
      }
      next += span + gap;
    }
    const hair = make(svg, "line", { class: "hair", y1: top, y2: height - bottom, opacity: 0 });
    const chart = { holder, spec, runs, hair, svg, width };
    charts.push(chart);
    const move = (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * width / box.width;
      const run = runs.find((r) => at <= r.to + gap / 2) || runs[runs.length - 1];
      let best = 0;
      run.steps.forEach((s, i) => { if (Math.abs(run.x(s) - at) < Math.abs(run.x(run.steps[best]) - at)) best = i; });
      point(run.name, run.steps[best]);
      tip.textContent = `${run.name} · step ${run.steps[best]} · ${show(run.values[best])}`;
      tip.style.opacity = 1;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = event.clientY + 14 + "px";
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", () => { tip.style.opacity = 0; point(null, 0); });
  }

  // One hairline in every chart that has this phase and step; the figure beside each title follows.
  function point(phase, step) {
    for (const { holder, runs, hair } of charts) {
      const run = runs.find((r) => r.name === phase);
      const i = run ? run.steps.indexOf(step) : -1;
      hair.setAttribute("opacity", i < 0 ? 0 : 0.6);
      if (i >= 0) { hair.setAttribute("x1", run.x(step)); hair.setAttribute("x2", run.x(step)); }
      const last = runs[runs.length - 1];
      const shown = i < 0 ? last.smoothed[last.smoothed.length - 1] : run.values[i];
      holder.querySelector(".now").textContent = show(shown);
    }
  }

  function all() {
    charts.length = 0;
    for (const holder of document.querySelectorAll(".chart")) {
      if (holder.clientWidth) draw(holder, data[holder.dataset.chart]);
    }
    point(null, 0);
  }
  let due = 0;
  const soon = () => { cancelAnimationFrame(due); due = requestAnimationFrame(all); };
  addEventListener("resize", soon);
  for (const box of document.querySelectorAll("details.more")) box.addEventListener("toggle", soon);
  all();
})();
