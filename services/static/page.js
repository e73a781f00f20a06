// Polls /v1/stats once a second and draws it. No state but the token and the samples of the last seconds.
const POLL_MS = 1000;
const RATE_WINDOW_MS = 10_000;
const BARS = 8;

const $ = (id) => document.getElementById(id);
const number = (value, digits = 3) =>
  typeof value !== "number" || !Number.isFinite(value) ? "–"
    : Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(digits)).toLocaleString("en", {maximumSignificantDigits: digits});

function element(tag, text, className = "") {
  const node = document.createElement(tag);
  node.textContent = text; // never innerHTML: ids and sentences come from other machines
  node.className = className;
  return node;
}

function rows(table, lines, header) {
  const bodies = lines.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => element("td", cell)));
    return row;
  });
  if (header) {
    const row = document.createElement("tr");
    row.append(...header.map((cell) => element("th", cell)));
    bodies.unshift(row);
  }
  table.replaceChildren(...bodies);
}

function bars(box, buckets) {
  const most = Math.max(1, ...buckets.map(([, count]) => count));
  box.replaceChildren(...buckets.flatMap(([label, count]) => {
    const bar = element("i", "");
    bar.style.width = `${(100 * count) / most}%`;
    return [element("span", label), bar, element("span", number(count))];
  }));
}

// [[value, count], ...] -> at most BARS buckets of equal width, labelled by their bounds
function bucketed(pairs) {
  if (!pairs.length) return [["none", 0]];
  const values = pairs.map(([value]) => value);
  const low = Math.min(...values);
  const width = Math.max(1, Math.ceil((Math.max(...values) - low + 1) / BARS));
  const counts = new Map();
  for (const [value, count] of pairs) {
    const start = low + Math.floor((value - low) / width) * width;
    counts.set(start, (counts.get(start) ?? 0) + count);
  }
  return [...counts].sort(([a], [b]) => a - b)
    .map(([start, count]) => [width === 1 ? `${start}` : `${start}–${start + width - 1}`, count]);
}

const samples = []; // {at, rollouts, updates} of the last RATE_WINDOW_MS
function rates(stats) {
  const now = {at: performance.now(), rollouts: stats.table.num_trajectories_total, updates: stats.learner?.updates ?? 0};
  samples.push(now);
  while (samples[0].at < now.at - RATE_WINDOW_MS) samples.shift();
  const seconds = (now.at - samples[0].at) / 1000;
  const rate = (field) => (seconds > 0 ? (now[field] - samples[0][field]) / seconds : NaN);
  return {rollouts: rate("rollouts"), updates: rate("updates")};
}

function draw(stats) {
  const {table, learner, actors, run} = stats;
  const metrics = learner?.metrics ?? {};
  const clock = Math.max(0, learner?.version ?? 0, table.latest_version); // as the table reckons ages
  const perSecond = rates(stats);
  $("run").textContent = run.run_id;
  const tiles = [
    ["reward, last batch", number(metrics["reward/mean"])],
    ["weight version", number(table.latest_version)],
    ["updates", learner?.total_updates ? `${number(learner.updates)} of ${number(learner.total_updates)}` : number(learner?.updates)],
    ["updates/s", number(perSecond.updates, 2)],
    ["rollouts", number(table.num_trajectories_total)],
    ["rollouts/s", number(perSecond.rollouts, 2)],
    ["age trained, median", number(metrics["age/updates_p50"])],
    ["reuse, mean", number(table.reuse_mean)],
    ["groups stored", number(table.num_groups)],
    ["MB stored", number(table.bytes / 1e6)],
  ];
  $("tiles").replaceChildren(...tiles.map(([label, value]) => {
    const tile = element("div", "", "tile");
    tile.append(element("b", value), element("span", label));
    return tile;
  }));
  const waits = [...table.waits, ...(learner?.waiting ? [learner.waiting] : [])];
  $("waits").textContent = waits.map((wait) => `${wait.who}, ${number(wait.since_s, 2)} s: ${wait.reason}`).join("; ") || "nobody";
  $("waits").className = waits.length ? "waiting" : "";
  bars($("ages"), bucketed(Object.entries(table.stored_versions).map(([version, count]) => [clock - Number(version), count])));
  bars($("uses"), bucketed(Object.entries(table.stored_uses).map(([uses, count]) => [Number(uses), count])));
  rows($("outcomes"), Object.entries(table.outcomes).map(([name, count]) => [name, number(count)]));
  rows($("removed"), Object.entries(table.removed).map(([name, count]) => [name, number(count)]));
  rows($("actors"),
    actors.map((actor) => [actor.actor_id, actor.state, number(actor.version), number(actor.tokens_per_s),
      number(actor.groups_total), `${number(actor.age_s, 2)} s ago`, actor.detail]),
    ["actor", "state", "version", "tokens/s", "groups", "heard", ""]);
  rows($("metrics"), Object.entries(metrics).sort().map(([name, value]) => [name, number(value, 4)]));
  rows($("promises"), Object.entries(stats.promises));
}

function say(text, lost) {
  $("state").textContent = text;
  $("state").className = lost ? "lost" : "";
}

async function poll() {
  const token = sessionStorage.getItem("token");
  try {
    const response = await fetch("/v1/stats", {
      headers: {Accept: "application/json", ...(token ? {Authorization: `Bearer ${token}`} : {})},
      signal: AbortSignal.timeout(10_000),
    });
    const body = await response.json();
    $("login").hidden = ![401, 403].includes(response.status);
    if (response.ok) {
      draw(body);
      say(`live, service up for ${number(Math.round(body.uptime_s))} s`, false);
    } else {
      say(`${body.detail}. ${body.hint}`, true);
    }
  } catch (error) {
    say(`no answer from the service: ${error.message}`, true);
  }
  setTimeout(poll, POLL_MS);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
});
poll();
