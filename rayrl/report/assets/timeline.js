"use strict";
// Draws learner, weight pushes, requests and episodes of one step as rows over wall-clock time.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");
  const LEARNER = { update: "--t0", batch: "--t4" };
  const LEFT = 82, RIGHT = 12, AXIS = 26;
  const LINES = [
    { key: "learner", label: "learner", height: 30 },
    { key: "push", label: "push", height: 18 },
    { key: "requests", label: "replicas", about: "requests", height: 64 },
    { key: "episodes", label: "env workers", about: "episodes", height: 64 },
  ];
  const GAP = 12;

  const make = (parent, tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  };

  const at = (curve, time) => {
    if (curve.mean === undefined || time < curve.began) return 0;
    return curve.mean[Math.floor((time - curve.began) / curve.width)] || 0;
  };

  const seconds = (value) => String(+value.toPrecision(3)) + " s";

  const unit = (span, count) => {
    const power = 10 ** Math.floor(Math.log10(span / count));
    return [1, 2, 5, 10].find((m) => m * power >= span / count) * power;
  };

  function draw(holder, rows, chosen) {
    holder.querySelector("svg")?.remove();
    const row = rows[chosen];
    const zero = Math.min(...row.stages.map((s) => s[1])), end = Math.max(...row.stages.map((s) => s[2]));
    const played = Math.min(zero, row.episodes.began ?? zero); // may be long before it was learned
    const margin = 0.2 * (end - played) || 1;
    const low = played - margin, high = end + margin;
    const width = Math.max(320, holder.clientWidth - 40);
    const height = LINES.reduce((sum, line) => sum + line.height + GAP, 0) + AXIS;
    const svg = make(holder, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    make(svg, "title", {}, `Timeline of step ${row.step}`);
    const x = (time) => LEFT + (width - LEFT - RIGHT) * (time - low) / (high - low);
    const back = (px) => low + (high - low) * (px - LEFT) / (width - LEFT - RIGHT);
    const clip = (time) => Math.min(Math.max(x(time), LEFT), width - RIGHT);

    const every = unit(high - low, 8);
    for (let t = Math.ceil((low - zero) / every) * every; t <= high - zero; t += every) {
      make(svg, "line", { class: "grid", x1: x(zero + t), x2: x(zero + t), y1: 0, y2: height - AXIS });
      make(svg, "text", { x: x(zero + t), y: height - 8, "text-anchor": "middle" }, seconds(Math.abs(t) < every / 2 ? 0 : t));
    }
    for (const time of [zero, end]) {
      make(svg, "line", { class: "edge", x1: x(time), x2: x(time), y1: 0, y2: height - AXIS });
    }

    const block = (y, tall, [name, began, ended], own, step, color) => {
      const from = clip(began), to = clip(ended);
      if (to <= LEFT || from >= width - RIGHT || to - from < 0.2) return;
      const waits = name === "collect";
      const style = waits ? "" : `fill:var(${color})`;
      const rect = make(svg, "rect", { class: (waits ? "waits" : "block") + (own ? "" : " other"), x: from, y, width: to - from, height: tall, rx: 3, style });
      make(rect, "title", {}, `step ${step}: ${waits ? "waits for episodes" : name}, ${seconds(ended - began)}`);
      const label = (waits ? "waits" : name) + (own ? "" : ` ${step}`);
      if (to - from > 7 * label.length + 8) {
        make(svg, "text", { class: waits || !own ? "" : "on", x: (from + to) / 2, y: y + tall / 2 + 4, "text-anchor": "middle" }, label);
      }
    };

    let top = 0;
    const columns = Array.from({ length: Math.ceil(width - LEFT - RIGHT) }, (_, i) => LEFT + i);
    for (const line of LINES) {
      make(svg, "text", { class: "name", x: 0, y: top + (line.about ? 14 : line.height / 2 + 4) }, line.label);
      if (!line.about) {
        for (const one of rows) {
          for (const stage of one.stages) {
            if (stage[0] === "idle" || (stage[0] === "push") !== (line.key === "push")) continue;
            block(top, line.height, stage, one === row, one.step, stage[0] === "push" ? "--t3" : LEARNER[stage[0]] || "--t1");
          }
        }
      } else {
        const own = columns.map((px) => at(row[line.key], back(px + 0.5)));
        const all = columns.map((px) => rows.reduce((sum, one) => sum + at(one[line.key], back(px + 0.5)), 0));
        const peak = Math.max(...all, 1e-9), base = top + line.height;
        const y = (value) => base - line.height * value / peak;
        const area = (values, style) => make(svg, "path", { class: style, d: `M${LEFT} ${base}` + values.map((v, i) => `L${columns[i]} ${y(v).toFixed(1)}`).join("") + `L${columns[columns.length - 1]} ${base}Z` });
        area(all, "area other");
        area(own, "area");
        make(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: base, y2: base });
        make(svg, "text", { x: 0, y: top + 29 }, line.about);
        make(svg, "text", { x: 0, y: top + 43 }, `peak ${+peak.toPrecision(3)}`);
      }
      top += line.height + GAP;
    }

    const hair = make(svg, "line", { class: "hair", y1: 0, y2: height - AXIS, opacity: 0 });
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const px = (event.clientX - box.left) * width / box.width, time = back(px);
      if (px < LEFT || px > width - RIGHT) return;
      const sum = (key) => rows.reduce((total, one) => total + at(one[key], time), 0).toFixed(1);
      hair.setAttribute("x1", px); hair.setAttribute("x2", px); hair.setAttribute("opacity", 0.6);
      tip.textContent = `${seconds(time - zero)} · ${sum("requests")} requests · ${sum("episodes")} episodes`;
      tip.style.opacity = 1;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = event.clientY + 14 + "px";
    });
    svg.addEventListener("pointerleave", () => { tip.style.opacity = 0; hair.setAttribute("opacity", 0); });
  }

  const holders = [...document.querySelectorAll(".timeline")].map((holder) => {
    const rows = JSON.parse(holder.dataset.steps);
    const slider = holder.querySelector("input"), said = holder.querySelector(".now");
    const redraw = () => {
      const chosen = Number(slider.value);
      said.textContent = `step ${rows[chosen].step}`;
      draw(holder, rows, chosen);
    };
    slider.addEventListener("input", redraw);
    return redraw;
  });
  const all = () => holders.forEach((redraw) => redraw());
  let due = 0;
  addEventListener("resize", () => { cancelAnimationFrame(due); due = requestAnimationFrame(all); });
  all();
})();
