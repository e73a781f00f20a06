// Numbers, units and elements: how everything on the page is written.
export const $ = (id) => document.getElementById(id);

const DASH = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const plain = new Intl.NumberFormat("en");

// 1234 -> 1,234; 0.01234 -> 0.0123
export function number(value, digits = 3) {
  if (!isNumber(value)) return DASH;
  if (Number.isInteger(value)) return plain.format(value);
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(1);
  return Number(value.toPrecision(digits)).toLocaleString("en", {maximumSignificantDigits: digits});
}

export const share = (value) => (isNumber(value) ? `${number(100 * value)} %` : DASH);

export function bytes(value) {
  if (!isNumber(value)) return DASH;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < units.length - 1) { value /= 1000; power += 1; }
  return `${number(power ? value : Math.round(value))} ${units[power]}`;
}

export function seconds(value) {
  if (!isNumber(value)) return DASH;
  if (value > 0 && value < 0.001) return "< 1 ms";
  if (value > 0 && value < 1) return `${number(1000 * value, 2)} ms`;
  if (value < 10) return `${number(value, 2)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return value < 172_800 ? `${number(value / 3600, 2)} h` : `${Math.round(value / 86_400)} days`;
}

export const clock = (unixSeconds) => new Date(1000 * unixSeconds).toLocaleTimeString("en-GB");

// never innerHTML: ids and sentences come from other machines
export function element(tag, text = "", className = "") {
  const node = document.createElement(tag);
  if (text !== "") node.textContent = text;
  if (className) node.className = className;
  return node;
}

// Change a text only where it differs: a screen reader and the layout are left in peace
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// lines: arrays of cells, a cell is a text or an element; the first cell of a line names it
export function fill(table, header, lines) {
  const same = table.rows.length === lines.length + (header ? 1 : 0) && lines.every((cells, index) =>
    table.rows[index + (header ? 1 : 0)].cells.length === cells.length && cells.every((cell) => typeof cell === "string"));
  if (same && table.dataset.header === String(header)) {
    lines.forEach((cells, index) => cells.forEach((cell, column) => write(table.rows[index + (header ? 1 : 0)].cells[column], cell)));
    return;
  }
  table.dataset.header = String(header);
  const rows = [];
  if (header) {
    const row = element("tr");
    row.append(...header.map((name) => Object.assign(element("th", name), {scope: "col"})));
    rows.push(row);
  }
  for (const cells of lines) {
    const row = element("tr");
    row.append(...cells.map((cell, column) => {
      const node = column ? element("td") : Object.assign(element("th"), {scope: "row"});
      if (typeof cell === "string") node.textContent = cell; else node.append(cell);
      return node;
    }));
    rows.push(row);
  }
  if (!lines.length) {
    const row = element("tr");
    row.append(element("td", "none yet", "none"));
    rows.push(row);
  }
  table.replaceChildren(...rows);
}

// lines: [label, share of the longest bar, text]
export function bars(table, lines) {
  while (table.rows.length > lines.length) table.deleteRow(-1);
  lines.forEach(([label, part, text, className = ""], index) => {
    let row = table.rows[index];
    if (!row) {
      row = table.insertRow();
      row.append(Object.assign(element("th"), {scope: "row"}), element("td"), element("td"));
      row.cells[1].append(element("i"));
    }
    const width = `${(100 * Math.min(1, Math.max(0, part))).toFixed(1)}%`;
    write(row.cells[0], label);
    const bar = row.cells[1].firstChild;
    if (bar.style.width !== width) bar.style.width = width;
    bar.className = className;
    write(row.cells[2], text);
  });
}
