// Small charts over the run's history: one definition a chart, drawn by uPlot, with a legend that can be read without it.
import {$, element, write} from "/static/text.js";

const COLOURS = 7; // --line-0 ... of page.css
const HEIGHT = 150;
const DECADES = 5;
const RATE_POINTS = 4; // a slow counter moves in steps: fewer points would show its jumps
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A chart is {title, format, series: (points) -> [[label, values], ...], log}
export class Charts {
  constructor(box, definitions) {
    this.charts = definitions.map((definition) => new Chart(box, definition));
    this.watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) this.charts.find((chart) => chart.card === entry.target).show(entry.isIntersecting);
    }, {rootMargin: "200px"});
    for (const chart of this.charts) this.watcher.observe(chart.card);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.charts.forEach((chart) => chart.reset()));
  }

  draw(points) {
    for (const chart of this.charts) chart.take(points);
  }
}

class Chart {
  constructor(box, definition) {
    this.definition = definition;
    this.points = [];
    this.visible = false;
    this.plot = null;
    this.labels = "";
    this.card = element("article", "", "chart");
    this.canvas = element("div", "", "canvas");
    this.canvas.setAttribute("aria-hidden", "true"); // the legend says the latest values
    this.legend = element("ul", "", "legend");
    this.card.append(element("h3", definition.title), this.canvas, this.legend);
    box.append(this.card);
    new ResizeObserver(() => this.plot?.setSize({width: this.canvas.clientWidth, height: HEIGHT})).observe(this.canvas);
  }

  take(points) {
    this.points = points;
    if (this.visible && !document.hidden) this.draw();
  }

  show(visible) {
    this.visible = visible;
    if (visible) this.draw();
  }

  reset() {
    this.plot?.destroy();
    this.plot = null;
    this.labels = "";
    if (this.visible) this.draw();
  }

  draw() {
    const series = this.definition.series(this.points).filter(([, values]) => values.some((value) => value !== null));
    const labels = series.map(([label]) => label).join("\n");
    if (labels !== this.labels || !this.plot) this.rebuild(series, labels);
    const times = this.points.map((point) => point.at_s);
    if (this.plot) this.plot.setData([times, ...series.map(([, values]) => values)]);
    series.forEach(([, values], index) => {
      const latest = values.findLast((value) => value !== null);
      write(this.legend.children[index].lastChild, this.definition.format(latest));
    });
  }

  rebuild(series, labels) {
    this.plot?.destroy();
    this.plot = null;
    this.labels = labels;
    this.legend.replaceChildren(...series.map(([label], index) => {
      const entry = element("li");
      const mark = element("i");
      mark.style.background = style(`--line-${index % COLOURS}`);
      entry.append(mark, element("span", label), element("b"));
      return entry;
    }));
    if (!series.length) {
      this.legend.append(element("li", "no values yet"));
      this.canvas.replaceChildren();
      return;
    }
    const axis = {stroke: style("--soft"), grid: {stroke: style("--line"), width: 1}, ticks: {show: false}, font: "11px system-ui"};
    this.plot = new uPlot({
      width: this.canvas.clientWidth, height: HEIGHT, padding: [8, 8, 0, 0],
      cursor: {y: false, drag: {x: false, y: false}}, legend: {show: false},
      scales: {y: this.definition.log ? {distr: 3, range: decades} : {range: span}},
      axes: [{...axis, size: 28, space: 80, values: (_, times) => times.map(time(times.some((at) => at % 60)))},
        {...axis, size: 58, ...(this.definition.log && {filter: powers, grid: {...axis.grid, filter: powers}}), values: (_, ticks) => ticks.map((tick) => (tick === null ? null : this.definition.format(tick)))}],
      series: [{}, ...series.map(([label], index) => ({
        label, stroke: style(`--line-${index % COLOURS}`), width: 1.5, spanGaps: true, points: {show: false},
        dash: index >= COLOURS ? [6, 4] : [],
      }))],
    }, [[], ...series.map(() => [])], this.canvas);
  }
}

const time = (withSeconds) => (at) =>
  new Date(1000 * at).toLocaleTimeString("en-GB", {hour: "2-digit", minute: "2-digit", ...(withSeconds && {second: "2-digit"})});

// Zero is in sight unless the values are far from it
function span(_, low, high) {
  if (low === null) return [0, 1];
  if (low >= 0 && low < 0.6 * high) low = 0;
  return low === high ? [low - 0.5 * Math.abs(low || 1), high + 0.5 * Math.abs(high || 1)] : [low, high + 0.05 * (high - low)];
}

// Of a logarithmic axis the newest decades: what lies far below them is as good as 0
function decades(_, low, high) {
  if (low === null) return [0.1, 1];
  const top = 10 ** Math.ceil(Math.log10(high));
  return [10 ** Math.max(Math.floor(Math.log10(low)), Math.log10(top) - DECADES), top];
}

const powers = (_, ticks) => ticks.map((tick) => (Math.abs(Math.log10(tick) - Math.round(Math.log10(tick))) < 1e-6 ? tick : null));

export const gauge = (name) => (points) => points.map((point) => point.gauges[name] ?? null);

// growth of a counter per second over the last few points; a counter that fell began anew
export const rate = (name) => (points) => points.map((point, index) => {
  const before = points[Math.max(0, index - RATE_POINTS)];
  if (!before || !(name in point.counters) || !(name in before.counters)) return null;
  const grown = point.counters[name] - before.counters[name];
  const elapsed = point.at_s - before.at_s;
  return grown < 0 || elapsed <= 0 ? null : grown / elapsed;
});

export const lines = (...series) => (points) => series.map(([label, read]) => [label, read(points)]);

// one line for each gauge that a pattern finds; its first group is the label
export const found = (pattern, label = (match) => match[1]) => (points) => {
  const names = new Set(points.slice(-30).flatMap((point) => Object.keys(point.gauges)));
  return [...names].sort().map((name) => [name, name.match(pattern)]).filter(([, match]) => match)
    .map(([name, match]) => [label(match), gauge(name)(points)]);
};

export const chartsIn = (id, definitions) => new Charts($(id), definitions);
