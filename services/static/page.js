// Polls /v1/stats once a second, draws it, and goes on by itself when the service comes back.
import {ask, Refused} from "/static/api.js";
import {drawBuffer} from "/static/buffer.js";
import {chartsIn, found, gauge, lines, rate} from "/static/charts.js";
import {startBrowser} from "/static/groups.js";
import {History} from "/static/history.js";
import {drawActors, drawEvaluations, drawLearner} from "/static/processes.js";
import {$, bytes, number, seconds, share, write} from "/static/text.js";
import {drawNow} from "/static/now.js";

const POLL_MS = 1000;
const perSecond = (value) => `${number(value)} /s`;
const updates = (value) => number(value);
const nats = (value) => number(value);

const charts = [
  chartsIn("charts-learning", [
    {title: "Reward of trained batches, and evaluation", format: number,
      series: (points) => [["reward, mean", gauge("reward/mean")(points)], ...found(/^pass_at\/(\d+)$/, (match) => `pass@${match[1]} on held-out prompts`)(points)]},
    {title: "Age of trained groups, updates", format: updates,
      series: lines(["median", gauge("age/updates_p50")], ["90 %", gauge("age/updates_p90")])},
    {title: "Updates per second", format: perSecond, series: lines(["updates", rate("updates")])},
  ]),
  chartsIn("charts-buffer", [
    {title: "Groups per second", format: perSecond, series: lines(["accepted", rate("inserted")], ["handed out", rate("sampled")])},
    {title: "Rollouts per second", format: perSecond, series: lines(["rollouts", rate("trajectories")])},
    {title: "Stored groups", format: number, series: lines(["stored", gauge("groups")], ["never handed out", gauge("fresh")])},
    {title: "Stored bytes", format: bytes, series: lines(["groups", gauge("bytes")], ["Redis memory", gauge("memory_bytes")])},
    {title: "Times that a group is handed out, mean", format: number, series: lines(["reuse", gauge("reuse_mean")])},
    {title: "Share of the time that the limiter holds them", format: share,
      series: lines(["learner", gauge("learner_waits")], ["actors", gauge("actors_wait")])},
  ]),
  chartsIn("charts-learner", [
    {title: "Time of an update by part", format: seconds, series: found(/^time\/(.+)_s$/, (match) => match[1].replaceAll("_", " "))},
    {title: "Effective sample size, share", format: share, series: (points) => [["all ages", gauge("effective_samples/share")(points)],
      ...found(/^effective_samples\/age_(.+)_share$/, (match) => match[1].replace("_plus", "+").replace("_", " – "))(points)]},
    {title: "Ratio pi / behavior, quantiles", format: number, log: true, series: found(/^ratio\/p(\d\d)$/, (match) => `${Number(match[1])} %`)},
    {title: "KL(behavior, pi), nats a token", format: nats, series: lines(["k1", gauge("k1/nats_mean")], ["k3", gauge("k3/nats_mean")])},
    {title: "Sequences that the trust region keeps", format: share,
      series: found(/^gate\/(.+)_sequences_kept_share$/, (match) => match[1].replaceAll("_", " "))},
    {title: "Bounds on the error of the surrogate", format: number, log: true,
      series: found(/^trust_region\/bound_(?!vacuous)(.+)$/, (match) => match[1].replaceAll("_", " "))},
  ]),
  chartsIn("charts-actors", [
    {title: "Response tokens per second, all actors", format: perSecond, series: lines(["tokens", gauge("tokens_per_s")])},
    {title: "Actors heard of", format: number, series: lines(["actors", gauge("actors")])},
    {title: "From publication to loaded, mean of actors", format: seconds, series: lines(["load", gauge("publish_to_loaded_s")])},
  ]),
];

const history = new History();

function say(text, kind) {
  write($("state"), text);
  $("state").className = kind;
  $("main").classList.toggle("old", kind === "lost");
}

function draw(stats) {
  write($("run"), stats.run.run_id);
  document.title = `${stats.run.run_id} · Stalewise`;
  drawNow(stats, history.points);
  drawBuffer(stats, history.points);
  drawLearner(stats);
  drawActors(stats);
  drawEvaluations(stats.evaluations);
}

async function look() {
  const stats = await ask("/v1/stats");
  $("login").hidden = true;
  $("main").hidden = false;
  if (await history.refresh()) charts.forEach((some) => some.draw(history.points));
  draw(stats);
  say(`live, service up for ${seconds(stats.uptime_s)}`, "live");
}

function explain(error) {
  if (error instanceof Refused && [401, 403].includes(error.status)) {
    $("login").hidden = false;
    $("main").hidden = true;
    const tried = sessionStorage.getItem("token") !== null;
    write($("refused"), tried ? error.message : "");
    say("a token is needed", "");
  } else if (error instanceof Refused) {
    say(`${error.message} (request ${error.requestId})`, "lost");
  } else {
    say(`no answer from the service, asking again: ${error.message}`, "lost");
  }
}

async function poll() {
  const began = performance.now();
  try {
    await look();
  } catch (error) {
    explain(error);
  }
  setTimeout(poll, Math.max(100, POLL_MS - (performance.now() - began)));
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
});
startBrowser();
poll();
