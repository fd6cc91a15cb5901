"use strict";
// One canvas per chart. Boxes come as columns, in order of start; a frame draws only what can be seen.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const WAITING = new Set(["waits", "exposed"]);
  const AXIS = 24, COMPUTE = 24, PORT = 12, GAP = 3, BLOCK = 9;
  const FONT = "system-ui, 'DejaVu Sans', Arial, sans-serif";
  let LABELS = 0; // width of the column of names, the same for all charts
  const state = { follow: null, hovered: null, ports: true, link: true };

  // ---- colours: each style mixed with white by shade, in steps so that strings are made once
  const STEPS = 32;
  const palette = {};
  for (const [name, style] of Object.entries(data.styles)) {
    const base = [1, 3, 5].map((at) => parseInt(style.colour.slice(at, at + 2), 16));
    palette[name] = Array.from({ length: STEPS + 1 }, (_, step) => {
      const white = (data.lightest * step) / STEPS;
      const mixed = base.map((c) => Math.round(c + (255 - c) * white));
      const linear = mixed.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      const bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      return { fill: `rgb(${mixed})`, text: (bright + 0.05) / 0.05 >= 1.05 / (bright + 0.05) ? "#000" : "#fff" };
    });
  }
  const colourOf = (row, i) => palette[row.style[i]][Math.round(row.shade[i] * STEPS)];

  // ---- times for people
  function formatTime(value, unit) {
    if (value === 0) return "0";
    if (unit !== "s") return Number(value.toPrecision(7)) + (unit ? " " + unit : "");
    for (const [factor, name] of [[1, "s"], [1e3, "ms"]]) {
      if (Math.abs(value) * factor >= 1) return Number((value * factor).toPrecision(5)) + " " + name;
    }
    return Number((value * 1e6).toPrecision(4)) + " \u00b5s";
  }

  // first box that may end after `time`: boxes of a port can overlap, so search the running maximum of ends
  function firstAfter(row, time) {
    let low = 0, high = row.reach.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (row.reach[middle] <= time) low = middle + 1; else high = middle;
    }
    return low;
  }

  class View {
    constructor(chart) {
      this.chart = chart;
      this.from = 0;
      this.to = this.whole = chart.makespan > 0 ? chart.makespan : 1;
      for (const row of chart.rows) {
        let reach = -Infinity;
        row.reach = row.end.map((end) => (reach = Math.max(reach, end)));
      }
      this.paths = new Map();
      const section = document.createElement("section");
      section.innerHTML = "<h2></h2><p></p><div class=scroll><canvas tabindex=0></canvas></div>";
      section.querySelector("h2").textContent = chart.heading;
      section.querySelector("p").textContent = chart.facts;
      this.box = section.querySelector(".scroll");
      this.canvas = section.querySelector("canvas");
      this.context = this.canvas.getContext("2d");
      byId("charts").append(section);
      this.listen();
    }

    // `stretch` makes rows higher or lower; a chart higher than `room` scrolls
    layout(stretch, room) {
      const y = this.place(stretch);
      this.box.style.maxHeight = Math.ceil(Math.min(y, room)) + "px";
      this.width = this.box.clientWidth;
      this.height = y;
      const ratio = window.devicePixelRatio || 1;
      this.canvas.width = Math.round(this.width * ratio);
      this.canvas.height = Math.round(this.height * ratio);
      this.canvas.style.width = this.width + "px";
      this.canvas.style.height = this.height + "px";
      this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    }

    place(stretch) {
      let y = AXIS, above = null;
      this.visible = [];
      for (const row of this.chart.rows) {
        if (row.port && !state.ports) continue;
        const newBlock = above && (above.port !== row.port || (!row.port && above.side !== row.side));
        if (above) y += newBlock ? BLOCK : GAP;
        const height = (row.port ? PORT : COMPUTE) * stretch;
        this.visible.push({ row, y, height });
        y += height;
        above = row;
      }
      return y + 6;
    }

    get scale() { return (this.width - LABELS - 8) / (this.to - this.from); }
    x(time) { return LABELS + (time - this.from) * this.scale; }
    time(x) { return this.from + (x - LABELS) / this.scale; }

    show(from, to) {
      const limit = this.limit();
      const span = Math.min(Math.max(to - from, limit * 1e-7), limit * 1.02);
      from = Math.min(Math.max(from, -0.01 * limit), 1.01 * limit - span);
      for (const view of this.linked()) { view.from = from; view.to = from + span; }
      redraw();
    }
    linked() { return state.link && linkable ? views : [this]; }
    limit() { return Math.max(...this.linked().map((view) => view.whole)); }
    zoom(factor, at) { this.show(at - (at - this.from) * factor, at + (this.to - at) * factor); }

    draw() {
      const c = this.context;
      c.clearRect(0, 0, this.width, this.height);
      c.font = "11px " + FONT;
      c.textBaseline = "middle";
      this.drawAxis(c);
      c.save();
      c.beginPath();
      c.rect(LABELS, AXIS - 2, this.width - LABELS, this.height);
      c.clip();
      for (const { row, y, height } of this.visible) this.drawRow(c, row, y, height);
      const followed = state.follow ?? (state.hovered && state.hovered.microBatch);
      if (followed !== null && followed !== undefined) this.drawPath(c, followed);
      this.drawMarks(c);
      c.restore();
      this.drawLabels(c);
    }

    drawAxis(c) {
      const rough = (this.to - this.from) / Math.max(2, (this.width - LABELS) / 110);
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
      c.textAlign = "center";
      for (let tick = Math.ceil(this.from / step) * step; tick <= this.to; tick += step) {
        const x = this.x(tick);
        if (x < LABELS - 1) continue;
        c.fillStyle = "#e3e3e3";
        c.fillRect(Math.round(x), AXIS - 4, 1, this.height);
        c.fillStyle = "#555";
        c.fillText(formatTime(Math.abs(tick) < step / 2 ? 0 : tick, this.chart.unit), x, AXIS - 12);
      }
    }

    drawRow(c, row, y, height) {
      const left = Math.max(LABELS, this.x(0)), right = Math.min(this.width, this.x(this.whole));
      c.fillStyle = row.port ? "#f5f5f5" : "#ececec";
      if (right > left) c.fillRect(left, y, right - left, height);
      const followed = state.follow ?? (state.hovered && state.hovered.microBatch);
      const dims = followed !== null && followed !== undefined;
      let painted = -1, written = -Infinity, run = null; // boxes too thin to tell apart are painted as one while their look is the same
      const numbers = [];
      const paint = () => {
        if (!run) return;
        c.globalAlpha = run.alpha;
        c.fillStyle = run.fill;
        c.fillRect(run.from, y, Math.max(run.to - run.from, 0.7), height);
        run = null;
      };
      c.textAlign = "center";
      for (let i = firstAfter(row, this.from); i < row.start.length && row.start[i] < this.to; i++) {
        const x0 = this.x(row.start[i]), x1 = this.x(row.end[i]), width = x1 - x0;
        const lit = !dims || row.microBatch[i] === followed;
        if (width < 1 && x1 <= painted && !(dims && lit)) continue; // this pixel is taken
        painted = Math.max(painted, Math.ceil(x0 + 0.5), x1);
        const colour = colourOf(row, i);
        const alpha = lit ? (row.port && !dims ? 0.92 : 1) : 0.22;
        if (run && width < 3 && run.fill === colour.fill && run.alpha === alpha && x0 - run.to < 0.5) {
          run.to = Math.max(run.to, x1);
          continue;
        }
        paint();
        run = { from: x0, to: x1 - (width > 5 ? 1 : 0), fill: colour.fill, alpha };
        if (width < 3) continue;
        paint();
        if (width < 8 || x0 < written || WAITING.has(row.style[i])) continue;
        const text = String(row.microBatch[i]);
        const from = Math.max(x0, LABELS), to = Math.min(x1, this.width);
        if (to - from < text.length * (row.port ? 5.5 : 6.8) + 2) continue;
        written = x1; // messages to several ranks lie on top of one another; one number will do
        numbers.push([text, (from + to) / 2, colour.text, alpha]);
      }
      paint();
      c.font = (row.port ? "9px " : "11px ") + FONT;
      for (const [text, x, fill, alpha] of numbers) {
        c.globalAlpha = alpha;
        c.fillStyle = fill;
        c.fillText(text, x, y + height / 2 + 0.5);
      }
      c.globalAlpha = 1;
    }

    // the way of one micro-batch through the groups: its stages in order of start, weight gradients left out
    path(microBatch) {
      if (!this.paths.has(microBatch)) {
        const steps = [];
        for (const row of this.chart.rows) {
          if (row.port || !row.leads) continue;
          row.microBatch.forEach((m, i) => {
            if (m === microBatch && !WAITING.has(row.style[i]) && row.style[i] !== "W") {
              steps.push({ row, start: row.start[i], end: row.end[i] });
            }
          });
        }
        this.paths.set(microBatch, steps.sort((a, b) => a.start - b.start));
      }
      return this.paths.get(microBatch);
    }

    drawPath(c, microBatch) {
      const place = new Map(this.visible.map(({ row, y, height }) => [row, y + height / 2]));
      c.strokeStyle = "rgba(0,0,0,0.75)";
      c.lineWidth = 1.3;
      c.beginPath();
      const steps = this.path(microBatch);
      for (let i = 1; i < steps.length; i++) {
        const a = steps[i - 1], b = steps[i];
        if (b.start < this.from || a.end > this.to) continue;
        c.moveTo(this.x(a.end), place.get(a.row));
        c.lineTo(this.x(b.start), place.get(b.row));
      }
      c.stroke();
    }

    drawMarks(c) {
      const end = this.x(this.whole);
      c.setLineDash([4, 3]);
      c.strokeStyle = "#444";
      c.lineWidth = 1;
      c.beginPath();
      c.moveTo(Math.round(end) + 0.5, AXIS - 2);
      c.lineTo(Math.round(end) + 0.5, this.height);
      c.stroke();
      c.setLineDash([]);
      if (cursor.time !== null && (cursor.view === this || this.linked().includes(cursor.view))) {
        c.fillStyle = "rgba(0,0,0,0.45)";
        c.fillRect(Math.round(this.x(cursor.time)), AXIS - 2, 1, this.height);
      }
      if (drag && drag.measure && (drag.view === this || this.linked().includes(drag.view))) {
        const a = this.x(drag.first), b = this.x(drag.last);
        c.fillStyle = "rgba(0,114,178,0.16)";
        c.fillRect(Math.min(a, b), AXIS, Math.abs(b - a), this.height);
        c.fillStyle = "#000";
        c.textAlign = "center";
        c.fillText(formatTime(Math.abs(drag.last - drag.first), this.chart.unit), (a + b) / 2, AXIS + 8);
      }
    }

    drawLabels(c) {
      c.textAlign = "left";
      for (const { row, y, height } of this.visible) {
        c.fillStyle = row.port ? "#777" : "#000";
        c.font = (row.port ? "9px " : "bold 12px ") + FONT;
        c.fillText(row.label, 2, y + height / 2 + 0.5);
        if (row.port) continue;
        c.font = "11px " + FONT;
        c.fillStyle = "#555";
        c.textAlign = "right";
        c.fillText(((100 * row.busy) / this.whole).toFixed(1) + "%", LABELS - 6, y + height / 2 + 0.5);
        c.textAlign = "left";
      }
    }

    at(x, y) {
      if (x < LABELS) return null;
      const place = this.visible.find((p) => y >= p.y - 1 && y <= p.y + p.height + 1);
      if (!place) return null;
      const { row } = place, time = this.time(x), slack = 1.5 / this.scale;
      let best = null, distance = slack;
      for (let i = firstAfter(row, time - slack); i < row.start.length && row.start[i] <= time + slack; i++) {
        const away = Math.max(row.start[i] - time, time - row.end[i], 0);
        if (away <= distance) { distance = away; best = i; }
      }
      return best === null ? null : { view: this, row, i: best, microBatch: row.microBatch[best] };
    }

    listen() {
      const spot = (event) => {
        const box = this.canvas.getBoundingClientRect();
        return [event.clientX - box.left, event.clientY - box.top];
      };
      this.canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        const [x] = spot(event);
        const sideways = event.shiftKey ? event.deltaY : event.deltaX;
        if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) {
          const by = sideways / this.scale;
          this.show(this.from + by, this.to + by);
        } else {
          this.zoom(Math.exp(Math.min(Math.max(event.deltaY, -200), 200) * 0.002), this.time(Math.max(x, LABELS)));
        }
      }, { passive: false });
      this.canvas.addEventListener("pointerdown", (event) => {
        const [x, y] = spot(event);
        this.canvas.setPointerCapture(event.pointerId);
        this.canvas.focus();
        const first = this.time(x);
        drag = { view: this, x, y, first, last: first, from: this.from, to: this.to, scroll: this.box.scrollTop,
          clientY: event.clientY, measure: event.shiftKey, moved: false };
      });
      this.canvas.addEventListener("pointermove", (event) => {
        const [x, y] = spot(event);
        if (drag && drag.view === this) {
          drag.moved = drag.moved || Math.abs(x - drag.x) > 3 || Math.abs(event.clientY - drag.clientY) > 3;
          if (drag.measure) {
            drag.last = this.time(x);
          } else if (drag.moved) {
            this.box.scrollTop = drag.scroll - (event.clientY - drag.clientY);
            const by = (drag.x - x) / this.scale;
            this.show(drag.from + by, drag.to + by);
          }
        }
        cursor = { view: this, time: x >= LABELS ? this.time(x) : null };
        state.hovered = drag && drag.moved ? null : this.at(x, y);
        showTip(event);
        redraw();
      });
      this.canvas.addEventListener("pointerup", (event) => {
        const done = drag;
        drag = null;
        if (done && done.measure && done.moved) {
          this.show(Math.min(done.first, done.last), Math.max(done.first, done.last));
        } else if (done && !done.moved) {
          const [x, y] = spot(event);
          const hit = this.at(x, y);
          follow(hit && hit.microBatch !== state.follow ? hit.microBatch : null);
        }
        redraw();
      });
      this.canvas.addEventListener("pointercancel", () => { drag = null; });
      this.canvas.addEventListener("pointerleave", () => {
        cursor = { view: null, time: null };
        state.hovered = null;
        byId("tip").hidden = true;
        redraw();
      });
      this.canvas.addEventListener("dblclick", () => this.show(0, this.limit()));
      this.canvas.addEventListener("keydown", (event) => {
        const middle = cursor.view === this && cursor.time !== null ? cursor.time : (this.from + this.to) / 2;
        const by = (this.to - this.from) * 0.15;
        const actions = {
          w: () => this.zoom(0.75, middle), s: () => this.zoom(1 / 0.75, middle),
          a: () => this.show(this.from - by, this.to - by), d: () => this.show(this.from + by, this.to + by),
          0: () => this.show(0, this.limit()), escape: () => follow(null),
        };
        const action = actions[event.key.toLowerCase()];
        if (action) { event.preventDefault(); action(); }
      });
    }
  }

  function showTip(event) {
    const tip = byId("tip"), hit = state.hovered;
    tip.hidden = !hit;
    if (!hit) return;
    const { row, i } = hit, { unit, names } = hit.view.chart;
    const bold = document.createElement("b");
    bold.textContent = `${data.styles[row.style[i]].label}  ${names[row.what[i]]}`;
    tip.replaceChildren(bold, [
      "", `micro-batch ${row.microBatch[i]}   on ${row.label.replace(" \u2192", "")}`,
      `start     ${formatTime(row.start[i], unit)}`, `end       ${formatTime(row.end[i], unit)}`,
      `duration  ${formatTime(row.end[i] - row.start[i], unit)}`,
    ].join("\n"));
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(0, Math.min(event.clientX + 14, window.innerWidth - box.width - 6)) + "px";
    const below = event.clientY + 16;
    tip.style.top = (below + box.height > window.innerHeight ? event.clientY - box.height - 10 : below) + "px";
  }

  function follow(microBatch) {
    state.follow = microBatch;
    byId("follow").value = microBatch === null ? "" : microBatch;
    redraw();
  }

  let waiting = false;
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; for (const view of views) view.draw(); });
  }
  // all charts share the window by what they need, with rows as high as that allows within what reads well
  function relayout() {
    const room = window.innerHeight - 92 - 62 * views.length;
    const needs = views.map((view) => view.place(1));
    const need = needs.reduce((a, b) => a + b, 0);
    const stretch = Math.min(Math.max(room / need, 0.75), 1.4);
    views.forEach((view, i) => view.layout(stretch, Math.max(200, (room * needs[i]) / need)));
    redraw();
  }

  let drag = null;
  let cursor = { view: null, time: null };
  const views = [];
  for (const chart of data.charts) views.push(new View(chart));
  const linkable = views.length > 1 && views.every((view) => view.chart.unit === views[0].chart.unit);
  if (linkable) for (const view of views) view.to = view.limit();

  const ruler = views[0].context;
  ruler.font = "bold 12px " + FONT;
  for (const { label } of data.charts.flatMap((chart) => chart.rows.filter((row) => !row.port))) {
    LABELS = Math.max(LABELS, ruler.measureText(label).width + 58);
  }

  const used = new Set(data.charts.flatMap((chart) => chart.rows.flatMap((row) => row.style)));
  for (const [name, style] of Object.entries(data.styles)) {
    if (!used.has(name)) continue;
    const item = document.createElement("span"), swatch = document.createElement("i");
    swatch.style.background = `linear-gradient(90deg, ${palette[name][0].fill}, ${palette[name][STEPS].fill})`;
    if (WAITING.has(name)) swatch.style.background = style.colour;
    item.append(swatch, style.label);
    byId("legend").append(item);
  }
  byId("linkLabel").hidden = !linkable;
  byId("link").addEventListener("change", (event) => {
    state.link = event.target.checked;
    views[0].show(views[0].from, views[0].to);
  });
  byId("ports").addEventListener("change", (event) => { state.ports = event.target.checked; relayout(); });
  byId("reset").addEventListener("click", () => { for (const view of views) view.show(0, view.limit()); });
  byId("follow").addEventListener("input", (event) => {
    follow(event.target.value === "" ? null : Number(event.target.value));
  });
  window.addEventListener("resize", relayout);
  relayout();
})();
