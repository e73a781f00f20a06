// The top of the page: four questions that a person has at night, answered in a word, and the numbers beside them.
import {$, element, number, seconds, share, write} from "/static/text.js";

const LONG_WAIT_S = 30;
const REFUSED = ["stale", "conflict", "oversize", "invalid"]; // `full` asks to come again: it is pacing, not refusal
const WINDOW_S = 600;

// verdict: {question, answer, because, mood: "good" | "warn" | "bad" | ""}
const MARKS = {good: "✓", warn: "!", bad: "✕", "": "·"};

function freshness(stats) {
  const metrics = stats.learner?.metrics ?? {};
  const age = metrics["age/updates_p50"];
  if (age === undefined) return {answer: "nothing trained yet", because: "", mood: ""};
  const samples = metrics["effective_samples/share"];
  return {
    answer: `${number(age)} updates old`,
    because: `Median of the last batch; 90 % at most ${number(metrics["age/updates_p90"])}. Effective sample size ${share(samples)}.`,
    mood: samples === undefined ? "" : samples >= 0.5 ? "good" : samples >= 0.2 ? "warn" : "bad",
  };
}

function trust(stats) {
  const metrics = stats.learner?.metrics ?? {};
  const kept = Object.entries(metrics).filter(([name]) => /^gate\/.+_sequences_kept_share$/.test(name));
  const kl = metrics["k3/nats_mean"];
  if (!kept.length && kl === undefined) return {answer: "nothing trained yet", because: "", mood: ""};
  const drift = kl === undefined ? "" : `KL ${number(kl, 2)} nats a token, largest ratio ${number(metrics["ratio/max"])}.`;
  if (!kept.length) return {answer: "no gate", because: `This objective closes nothing. ${drift}`, mood: ""};
  const [name, least] = kept.reduce((one, other) => (other[1] < one[1] ? other : one));
  const gate = name.slice("gate/".length, -"_sequences_kept_share".length).replaceAll("_", " ");
  return {
    answer: `${share(least)} kept`,
    because: `Sequences that ${gate} lets through. ${drift}`,
    mood: least >= 0.5 ? "good" : least >= 0.1 ? "warn" : "bad",
  };
}

function waiting(stats) {
  const {learner, table, actors} = stats;
  if (learner && learner.updates === learner.total_updates) return {answer: "the learner is done", because: `${number(learner.updates)} updates.`, mood: "good"};
  if (learner && learner.age_s > LONG_WAIT_S && !learner.waiting) return {answer: "the learner is silent", because: `For ${seconds(learner.age_s)}: is the process alive?`, mood: "bad"};
  const waits = [...table.waits, ...(learner?.waiting ? [learner.waiting] : [])];
  if (waits.length) {
    const longest = waits.reduce((one, other) => (other.since_s > one.since_s ? other : one));
    return {
      answer: longest.who === "learner" ? `the learner, ${seconds(longest.since_s)}` : `the actors, ${seconds(longest.since_s)}`,
      because: `${longest.reason[0].toUpperCase()}${longest.reason.slice(1)}.`,
      mood: longest.who === "learner" && longest.since_s > LONG_WAIT_S ? "bad" : longest.since_s > 4 * LONG_WAIT_S ? "warn" : "good",
    };
  }
  if (!learner && !actors.length) return {answer: "nobody is here", because: "No learner and no actor has been heard of yet.", mood: ""};
  if (!learner) return {answer: "the actors", because: "No learner has been heard of yet.", mood: "warn"};
  return {answer: "nobody", because: "Inserts and draws flow.", mood: "good"};
}

function refused(stats, points) {
  const {outcomes} = stats.table;
  const start = points.findLast((point) => point.at_s <= (points.at(-1)?.at_s ?? 0) - WINDOW_S)?.counters ?? {};
  const grown = (name) => Math.max(0, (outcomes[name] ?? 0) - (start[`outcome/${name}`] ?? 0));
  const judged = Object.keys(outcomes).filter((name) => name !== "full").reduce((sum, name) => sum + grown(name), 0);
  const bad = REFUSED.reduce((sum, name) => sum + grown(name), 0);
  if (!judged) return {answer: "nothing submitted", because: "In the last 10 minutes.", mood: ""};
  const parts = REFUSED.filter(grown).map((name) => `${number(grown(name))} ${name}`).join(", ");
  return {
    answer: bad ? `${share(bad / judged)} refused` : "nothing",
    because: `${bad ? `${parts}, of` : "Of"} ${number(judged)} groups in the last 10 minutes. ${number(grown("full"))} were asked to come again.`,
    mood: bad / judged > 0.01 ? "bad" : bad ? "warn" : "good",
  };
}

const QUESTIONS = [
  ["Is the data fresh?", freshness],
  ["Does the trust region hold?", trust],
  ["Who waits?", waiting],
  ["What was refused?", refused],
];

export function drawNow(stats, points) {
  const box = $("verdicts");
  if (!box.children.length) {
    box.append(...QUESTIONS.map(([question]) => {
      const card = element("article", "", "verdict");
      const answer = element("p", "", "answer");
      const mark = element("span", "", "mark");
      mark.setAttribute("aria-hidden", "true"); // the words say the same
      answer.append(mark, element("b"));
      card.append(element("h3", question), answer, element("p", "", "because"));
      return card;
    }));
  }
  QUESTIONS.forEach(([, judge], index) => {
    const {answer, because, mood} = judge(stats, points);
    const card = box.children[index];
    card.className = `verdict ${mood}`;
    write(card.querySelector(".mark"), MARKS[mood]);
    write(card.querySelector("b"), answer);
    write(card.querySelector(".because"), because);
  });
  drawTiles(stats, points);
}

function drawTiles(stats, points) {
  const {table, learner} = stats;
  const metrics = learner?.metrics ?? {};
  const tiles = [
    ["reward, last batch", number(metrics["reward/mean"])],
    ["updates", learner?.total_updates ? `${number(learner.updates)} of ${number(learner.total_updates)}` : number(learner?.updates)],
    ["updates a second", number(recent(points, "updates"), 2)],
    ["weight version", number(table.latest_version)],
    ["rollouts", number(table.num_trajectories_total)],
    ["rollouts a second", number(recent(points, "trajectories"))],
    ["reuse, mean", `${number(table.reuse_mean)} ×`],
    ["groups stored", number(table.num_groups)],
  ];
  const list = $("tiles");
  if (!list.children.length) {
    list.append(...tiles.map(([label]) => {
      const tile = element("div");
      tile.append(element("dt", label), element("dd"));
      return tile;
    }));
  }
  tiles.forEach(([, value], index) => write(list.children[index].lastChild, value));
}

// growth a second over about the last 20 s
function recent(points, counter) {
  const last = points.at(-1);
  const first = points.findLast((point) => point.at_s <= (last?.at_s ?? 0) - 20) ?? points[0];
  if (!last || first === last || !(counter in last.counters) || !(counter in first.counters)) return NaN;
  return Math.max(0, last.counters[counter] - first.counters[counter]) / (last.at_s - first.at_s);
}
