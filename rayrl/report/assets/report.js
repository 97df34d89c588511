"use strict";
// Draws each chart with uPlot from the JSON in #data; text goes in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const style = getComputedStyle(document.documentElement);
  let inks = {}; // of the light or the dark page; to ask the page each time would be slow
  const ink = (name) => (inks[name] ??= style.getPropertyValue(name).trim());
  const WHOLE = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((m) => m * 10 ** power));

  const show = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(+value.toPrecision(3));
  };

  const axisLabel = (value, unit) => {
    if (value === 0) return "0";
    const power = (number) => Math.floor(Math.log10(Math.abs(number)));
    if (unit < 0.0005 || Math.abs(value) >= 1e5) {
      return value.toExponential(Math.max(1, power(value) - power(unit))).replace("e+", "e");
    }
    return value.toLocaleString("en", { maximumFractionDigits: Math.max(0, 1 - power(unit)) });
  };

  // Exponential mean without the pull of its start (the weights are normalised).
  const running = (values) => {
    const keep = values.length > 24 ? 0.85 : 0.4;
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  };

  // Where a value has gaps on both sides, so that no line shows it. undefined: no step of this phase.
  const isolated = (values) => {
    const own = [...values.keys()].filter((i) => values[i] !== undefined);
    const isGap = (k) => (values[own[k]] ?? null) === null;
    return own.filter((_, k) => !isGap(k) && isGap(k - 1) && isGap(k + 1));
  };

  // Phases stand side by side, each at one place in all charts, so that they share cursor and zoom.
  const phases = [];
  for (const line of Object.values(data).flatMap((chart) => chart.lines)) {
    const phase = (phases[line.phase] ??= { name: line.name, first: Infinity, last: -Infinity });
    for (const step of [...line.steps, ...line.alarms]) {
      phase.first = Math.min(phase.first, step);
      phase.last = Math.max(phase.last, step);
    }
  }
  const between = Math.ceil(0.02 * phases.reduce((sum, phase) => sum + phase.last - phase.first, 1));
  phases.reduce((from, phase) => {
    phase.from = from;
    return from + phase.last - phase.first + between;
  }, 0);
  const place = (line) => (step) => phases[line.phase].from + step - phases[line.phase].first;

  function plot(holder, width) {
    const { title, unit, smooth, lines } = data[holder.dataset.chart];
    const own = lines.map((line) => phases[line.phase]);
    const phaseAt = (x) => own.findLastIndex((phase) => phase.from <= x);
    const label = (step) => step.toLocaleString("en");
    const stepAt = (x) => x - own[phaseAt(x)].from + own[phaseAt(x)].first;

    const series = [{}], alone = [];
    const tables = lines.map((line) => {
      const name = `--p${line.phase % 8}`, color = () => ink(name);
      series.push({
        label: line.name, name, stroke: () => color().replace(")", " / .35)"), // oklch(… / alpha)
        points: { size: 5, stroke: color, fill: color, filter: (u, i, dense) => (dense ? null : (alone[i] ??= isolated(u.data[i]))) },
      });
      series.push({ class: "mean", name, stroke: color, width: 2, points: { show: false } });
      return [line.steps.map(place(line)), line.values, smooth ? running(line.values) : line.values];
    });
    const alarms = lines.flatMap((line) => line.alarms.map(place(line)));
    if (alarms.length) {
      const points = { show: true, size: 7, width: 0, fill: () => ink("--bad") };
      series.push({ label: "alarm", name: "--bad", scale: "alarm", paths: () => null, points });
      tables.push([alarms, alarms.map(() => 0)]);
    }

    const axis = { scale: "x", font: "11px system-ui, sans-serif", stroke: () => ink("--soft"), ticks: { show: false } };
    const grid = { stroke: () => ink("--line"), width: 1 };
    const axes = [{
      ...axis, size: 22, gap: 6, incrs: WHOLE, grid: { show: false },
      space: 14 + 7 * Math.max(...own.map((phase) => label(phase.last).length)),
      splits: (u, _, low, high, unit) => own.flatMap(({ first, last, from }) => {
        const start = Math.ceil(first / unit), count = Math.floor(last / unit) - start + 1;
        const all = Array.from({ length: Math.max(0, count) }, (_, k) => from + (start + k) * unit - first);
        return all.filter((x) => low <= x && x <= high);
      }),
      filter: (u, places, _, space, unit) => { // the last label of a phase and the next one's first
        let last = -Infinity;
        return places.map((x) => (x - last < unit * 0.8 ? null : (last = x)));
      },
      values: (u, places) => places.map((x) => (x === null ? null : label(stepAt(x)))),
    }, {
      ...axis, scale: "y", gap: 6, space: 24, grid,
      values: (u, values, _, space, unit) => values.map((value) => axisLabel(value, unit)),
      size: (u, labels, i) => { // so that no label is cut
        u.ctx.font = u.axes[i].font[0]; // in device pixels
        const widths = (labels ?? []).map((label) => u.ctx.measureText(label).width / devicePixelRatio);
        return Math.max(33, ...widths) + 8;
      },
    }];
    if (own.length > 1) { // their names, each where its phase begins, if there is room
      axes.push({
        ...axis, side: 0, size: 18, gap: 4, align: 1, grid: { ...grid, dash: [2, 3] },
        splits: (u, _, low) => own.map((phase) => Math.max(low, phase.from)),
        values: (u, places, _, space, unit) => own.map(({ name, from, first, last }, k) => {
          const end = Math.min(u.scales.x.max, from + last - first);
          return (end - places[k]) * space / unit > 7 * name.length ? name : null;
        }),
      });
    }

    // The figure beside the title, and the tip if it is this chart that is pointed at.
    const now = holder.querySelector(".now");
    const read = (u) => {
      const { left, idx, event } = u.cursor;
      const x = u.data[0][idx], { min, max } = u.scales.x;
      if (!(min <= x && x <= max && left >= 0 && left <= u.bbox.width / devicePixelRatio)) {
        now.textContent = show(tables[lines.length - 1][2].findLast((value) => value !== null));
        if (event) tip.style.opacity = 0;
        return;
      }
      const k = phaseAt(x), [value, mean] = [2 * k + 1, 2 * k + 2].map((i) => show(u.data[i][idx]));
      now.textContent = `step ${stepAt(x)} · ${value}`;
      if (!event) return;
      tip.textContent = `${own[k].name} · step ${stepAt(x)} · ${value}${smooth ? ` · mean ${mean}` : ""}${alarms.includes(x) ? " · alarm" : ""}`;
      tip.style.opacity = 1;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = event.clientY + 14 + "px";
    };

    const chart = new uPlot({
      width, height: holder.classList.contains("wide") ? 230 : 160, series, axes,
      scales: {
        x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { range: (u, low, high) => ((!low && !high) || (unit && low >= 0 && high <= 1) ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true)) },
        alarm: { range: [-0.04, 1] },
      },
      legend: { live: false, markers: { width: 0, fill: (u, i) => `var(${series[i].name})` } },
      cursor: {
        y: false, sync: { key: "steps", scales: ["x", null] },
        points: { size: 7, fill: (u, i) => `var(${series[i].name})` },
        dataIdx: (u, i, idx, x) => (x < u.scales.x.min || x > u.scales.x.max ? null : idx), // pointed at elsewhere
      },
      hooks: {
        setCursor: [read],
        setSeries: [(u, i, { show }) => show !== undefined && series[i + 1]?.class && u.setSeries(i + 1, { show })],
      },
    }, uPlot.join(tables), holder);
    chart.ctx.canvas.setAttribute("role", "img");
    chart.ctx.canvas.setAttribute("aria-label", title);
    // uPlot knows the mouse only.
    for (const [touch, mouse] of [["pointerdown", "mousemove"], ["pointermove", "mousemove"], ["pointerleave", "mouseleave"]]) {
      chart.over.addEventListener(touch, (event) => {
        if (event.pointerType !== "mouse") chart.over.dispatchEvent(new MouseEvent(mouse, event));
      });
    }
    read(chart);
    return chart;
  }

  const charts = new Map();
  const fit = (holder, width) => {
    const chart = charts.get(holder);
    if (!chart) charts.set(holder, plot(holder, width));
    else if (chart.width !== width) chart.setSize({ width, height: chart.height });
  };
  // Also tells when "more" is opened. Drawing changes heights, so it waits for the next frame.
  const observer = new ResizeObserver((entries) => requestAnimationFrame(() => {
    for (const { target, contentRect } of entries) {
      if (contentRect.width) fit(target, Math.floor(contentRect.width));
    }
  }));
  for (const holder of document.querySelectorAll(".chart")) observer.observe(holder);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    inks = {};
    charts.forEach((chart) => chart.redraw());
  });
})();
