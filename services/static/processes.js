// The learner's last batch by age, all of its metrics, the actors and the weight versions.
import {$, bytes, clock, fill, number, seconds, share, write} from "/static/text.js";

const BUCKETS = {foreign: "foreign", "0": "0", "1_3": "1 – 3", "4_15": "4 – 15", "16_63": "16 – 63", "64_plus": "64 and more"};
const BY_AGE = /^(.+\/)(.*?)age_(foreign|0|1_3|4_15|16_63|64_plus)_(.+)$/;
const FIRST = {
  "age/tokens_share": ["tokens", share], "effective_samples/share": ["eff. samples", share], "ratio/mean": ["ratio mean", number],
  "ratio/variance": ["ratio variance", number], "ratio/max": ["ratio max", number], "k1/nats_mean": ["k1, nats", number],
  "k2/nats_mean": ["k2, nats", number], "k3/nats_mean": ["k3, nats", number],
};

const title = (name) => FIRST[name]?.[0]
  ?? name.replace(/^gate\/(.+)_closed_share$/, "closed by $1").replace(/^gate\/(.+)_sequences_kept_share$/, "kept by $1")
    .replace(/^trust_region\//, "").replace(/_(estimate|lower_bound)$/, (_, proof) => `, ${proof}`).replaceAll("_", " ");

// ages across, metrics down: every metric that exists for ages has a line, whoever invents it
function byAge(metrics) {
  const ages = {};
  const names = new Set(Object.keys(FIRST));
  for (const [name, value] of Object.entries(metrics)) {
    const match = name.match(BY_AGE);
    if (!match) continue;
    const line = `${match[1]}${match[2]}${match[4]}`;
    names.add(line);
    (ages[match[3]] ??= {})[line] = value;
  }
  const shown = Object.keys(BUCKETS).filter((bucket) => ages[bucket]?.["age/tokens_share"]);
  const format = (name, value) => (FIRST[name]?.[1] ?? (name.endsWith("_share") ? share : number))(value);
  return [["age, updates", ...shown.map((bucket) => BUCKETS[bucket])],
    [...names].filter((name) => shown.some((bucket) => name in ages[bucket]))
      .map((name) => [title(name), ...shown.map((bucket) => format(name, ages[bucket][name]))])];
}

export function drawLearner(stats) {
  const metrics = stats.learner?.metrics ?? {};
  fill($("buckets"), ...byAge(metrics));
  if ($("all-metrics").open) {
    const wanted = $("metric-filter").value.trim().toLowerCase();
    fill($("metrics"), ["metric", "value"],
      Object.entries(metrics).filter(([name]) => name.includes(wanted)).sort().map(([name, value]) => [name, number(value, 4)]));
  }
}

const ago = (age) => (age < 1 ? "now" : `${seconds(age)} ago`);

export function drawActors(stats) {
  const {actors, weights, table} = stats;
  fill($("actor-list"), ["actor", "does", "version", "behind", "tokens/s", "groups", "unscored", "heard of", "last load", ""],
    actors.map((actor) => [actor.actor_id, actor.state.replaceAll("_", " "), number(actor.version),
      number(Math.max(0, table.latest_version - actor.version)), number(actor.tokens_per_s), number(actor.groups_total),
      number(actor.unscored_groups_total),
      ago(actor.age_s), seconds(actor.loads?.at(-1)?.publish_to_loaded_s), actor.detail]));
  const loads = new Map();
  for (const actor of actors) {
    for (const load of actor.loads ?? []) loads.set(load.version, [...(loads.get(load.version) ?? []), load.publish_to_loaded_s]);
  }
  const line = (version) => {
    const times = (loads.get(version.version) ?? []).sort((a, b) => a - b);
    const users = actors.filter((actor) => actor.version === version.version).length;
    return [number(version.version), clock(version.created_s), bytes(version.bytes), seconds(times[times.length >> 1]),
      number(times.length), number(users)];
  };
  fill($("versions"), ["version", "published", "size", "publish to loaded, median", "loads", "in use by"],
    weights.published.toReversed().map(line));
}

const EVALUATIONS = 8;

export function drawEvaluations({results, best_version: best, running}) {
  $("evaluations").hidden = !results.length && !running.length;
  const ks = [...new Set(results.flatMap((result) => Object.keys(result.pass_at)))].sort((a, b) => a - b);
  const line = (result) => [
    `${number(result.version)}${result.version === best ? ", the best" : ""}`, clock(result.finished_s),
    ...ks.map((k) => `${share(result.pass_at[k])}${k === "1" ? ` ± ${share(result.pass_1_standard_error)}` : ""}`),
    number(result.reward_mean), number(result.num_prompts), number(result.samples_per_prompt), number(result.response_tokens_mean), result.actor_id,
  ];
  fill($("evaluation-list"),
    ["version", "at", ...ks.map((k) => `pass@${k}`), "reward, mean", "prompts", "samples of each", "tokens, mean", "by"],
    results.slice(-EVALUATIONS).reverse().map(line));
  write($("evaluation-note"), running.map((claim) => `${claim.actor_id} evaluates version ${number(claim.version)}, for ${seconds(claim.age_s)}. `).join(""));
}
