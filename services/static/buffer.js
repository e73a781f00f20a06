// The buffer's cards: room, ages, uses, outcomes, removals, pacing.
import {$, bars, bytes, fill, number, seconds} from "/static/text.js";

const BUCKETS = 8;
const MEANING = {
  accepted: "stored", duplicate: "known already", conflict: "same id, other content", stale: "over the age gate",
  full: "asked to come again", oversize: "over the size limit", invalid: "no valid record", pending: "part of a group", group_closed: "too late for its group",
};

// [[value, count], ...] -> at most BUCKETS buckets of equal width, labelled by their bounds
function bucketed(pairs) {
  if (!pairs.length) return [];
  const values = pairs.map(([value]) => value);
  const low = Math.min(...values);
  const width = Math.max(1, Math.ceil((Math.max(...values) - low + 1) / BUCKETS));
  const counts = new Map();
  for (const [value, count] of pairs) {
    const start = low + Math.floor((value - low) / width) * width;
    counts.set(start, (counts.get(start) ?? 0) + count);
  }
  return [...counts].sort(([a], [b]) => a - b).map(([start, count]) => [width === 1 ? `${start}` : `${start} – ${start + width - 1}`, count]);
}

function histogram(table, pairs) {
  const buckets = bucketed(pairs);
  const most = Math.max(1, ...buckets.map(([, count]) => count));
  bars(table, buckets.length ? buckets.map(([label, count]) => [label, count / most, number(count)]) : [["none", 0, "0"]]);
}

const full = (part) => (part > 0.9 ? "warn" : "");

export function drawBuffer(stats, points) {
  const {table, run, store, limiter, learner} = stats;
  const room = [
    ["groups", table.num_groups / run.limits.capacity_groups, `${number(table.num_groups)} of ${number(run.limits.capacity_groups)}`],
    ["bytes", table.bytes / run.limits.capacity_bytes, `${bytes(table.bytes)} of ${bytes(run.limits.capacity_bytes)}`],
    store.memory_limit_bytes
      ? ["Redis", store.memory_bytes / store.memory_limit_bytes, `${bytes(store.memory_bytes)} of ${bytes(store.memory_limit_bytes)}`]
      : ["Redis", 0, `${bytes(store.memory_bytes)}, no limit set`],
    ["disk", 1 - store.disk_free_bytes / store.disk_total_bytes, `${bytes(store.disk_free_bytes)} free of ${bytes(store.disk_total_bytes)}`],
  ];
  bars($("room"), room.map(([label, part, text]) => [label, part, text, full(part)]));
  $("room-note").textContent = `${number(table.num_response_tokens)} response tokens; ${number(table.num_fresh)} groups never handed out, `
    + `${number(table.num_foreign)} foreign, ${number(table.num_eval)} for evaluation, ${number(table.num_partial_groups)} incomplete.`;
  const latest = Math.max(0, learner?.version ?? 0, table.latest_version); // as the table reckons ages
  histogram($("ages"), Object.entries(table.stored_versions).map(([version, count]) => [latest - Number(version), count]));
  histogram($("uses"), Object.entries(table.stored_uses).map(([uses, count]) => [Number(uses), count]));
  const minuteAgo = points.findLast((point) => point.at_s <= (points.at(-1)?.at_s ?? 0) - 60) ?? points[0];
  const lately = (name, count) => number(Math.max(0, count - (minuteAgo?.counters[name] ?? count)));
  fill($("outcomes"), ["outcome", "all", "last minute", ""],
    Object.entries(table.outcomes).map(([name, count]) => [name, number(count), lately(`outcome/${name}`, count), MEANING[name] ?? ""]));
  fill($("removed"), ["reason", "all", "last minute"],
    Object.entries(table.removed).map(([name, count]) => [name.replaceAll("_", " "), number(count), lately(`removed/${name}`, count)]));
  const waits = Object.fromEntries(table.waits.map((wait) => [wait.who, `held for ${seconds(wait.since_s)}`]));
  fill($("promises"), null, [
    ["limiter", limiter.state.replaceAll("_", " ")],
    ["learner", waits.learner ?? "may draw"],
    ["actors", waits.actors ?? "may insert"],
    ["draws wanted for each insert", number(limiter.settings.samples_per_insert)],
    ["inserts ahead by", `${number(table.limiter_error)} draws`],
    ["groups before the first draw", number(limiter.settings.min_size)],
    ["draws so far, mean of a group", `${number(table.reuse_mean)}`],
    ...Object.entries(stats.promises).map(([name, value]) => [name, value]),
  ]);
}
