// The browser of groups: list and filter, open one, its tokens coloured by log-prob, version or ratio.
import {ask} from "/static/api.js";
import {$, bytes, clock, element, fill, number} from "/static/text.js";
import {tokens} from "/static/tokens.js";

const PAGE = 25;
let cursor = null;
let rows = [];

const FILTERS = {all: "", train: "split=train", eval: "split=eval", unused: "unused=true"};
const STORED = ["group", "prompt", "stored at", "version", "age, updates", "uses", "responses", "tokens", "size", "reward"];
const TRAINED = ["group", "prompt", "trained at version", "age, updates", "uses", "responses", "tokens", "largest |log ratio|", "reward"];

function opener(groupId) {
  const button = element("button", groupId, "link");
  button.type = "button";
  button.addEventListener("click", () => open(groupId).catch(complain));
  return button;
}

function storedRow(group) {
  return [opener(group.group_id), group.prompt_id, clock(group.inserted_s), number(group.oldest_version), number(group.age_updates),
    number(group.times_sampled), number(group.num_trajectories), number(group.num_response_tokens), bytes(group.bytes), number(group.mean_reward)];
}

function trainedRow(group) {
  return [opener(group.group_id), group.prompt_id, number(group.version), number(group.age_updates), number(group.times_sampled),
    number(group.num_trajectories), number(group.num_response_tokens), number(group.log_ratio_absolute_max), number(group.mean_reward)];
}

async function list(more) {
  const kind = $("browse-kind").value;
  const prompt = $("browse-prompt").value.trim();
  const oldest = $("browse-order").value === "oldest";
  if (kind === "trained") {
    const {groups} = await ask("/v1/trained");
    const wanted = groups.filter((group) => group.prompt_id.includes(prompt));
    const shown = more ? wanted.length : PAGE;
    rows = (oldest ? wanted.toReversed() : wanted).slice(0, shown).map(trainedRow);
    cursor = rows.length < wanted.length ? "all" : null;
    fill($("group-list"), TRAINED, rows);
    $("browse-note").textContent = `${number(rows.length)} of ${number(wanted.length)} groups trained on lately`;
  } else {
    if (prompt && kind !== "all") throw new Error("a prompt goes with `all stored`: each filter has an index of its own, a mixture has none");
    const filter = prompt ? `prompt_id=${encodeURIComponent(prompt)}` : FILTERS[kind];
    const from = more && cursor ? `&cursor=${cursor}` : "";
    const page = await ask(`/v1/groups?limit=${PAGE}&oldest_first=${oldest}${from}${filter && `&${filter}`}`);
    rows = [...(more ? rows : []), ...page.groups.map(storedRow)];
    cursor = page.cursor;
    fill($("group-list"), STORED, rows);
    $("browse-note").textContent = `${number(rows.length)} groups${cursor ? ", there are more" : ""}`;
  }
  $("browse-more").hidden = cursor === null;
}

async function open(groupId) {
  const path = encodeURIComponent(groupId);
  const {groups} = await ask("/v1/trained"); // asked first: a group that left the table would be an error otherwise
  const trained = groups.some((group) => group.group_id === groupId) ? await ask(`/v1/trained/${path}`) : null;
  const stored = trained ? null : await ask(`/v1/groups/${path}`);
  const trajectories = (trained ?? stored.group).trajectories;
  $("group-title").textContent = `Group ${groupId}`;
  $("group-facts").textContent = trained
    ? `Prompt ${trained.prompt_id}. Trained on at version ${number(trained.version)}, ${number(trained.age_updates)} updates old, handed out ${number(trained.times_sampled)} times by then.`
    : `Prompt ${stored.summary.prompt_id}. Stored at ${clock(stored.summary.inserted_s)}, ${number(stored.summary.age_updates)} updates old, handed out ${number(stored.summary.times_sampled)} times, ${bytes(stored.summary.bytes)}.`;
  $("paint").options[0].disabled = !trained;
  if (!trained && $("paint").value === "ratio") $("paint").value = "logprob";
  await tokens.show(trajectories);
  $("group").hidden = false;
  $("group-title").focus();
  $("group-title").scrollIntoView({block: "start"});
}

function complain(error) {
  $("browse-note").textContent = `cannot show that: ${error.message}`;
}

export function startBrowser() {
  const refresh = (event) => {
    event?.preventDefault();
    list(false).catch(complain);
  };
  $("browse").addEventListener("submit", refresh);
  $("browse-kind").addEventListener("change", refresh);
  $("browse-order").addEventListener("change", refresh);
  $("browse-more").addEventListener("click", () => list(true).catch(complain));
  $("paint").addEventListener("change", () => tokens.paint());
  // the list is read when somebody comes near it, and again while there is nothing to see
  let near = false;
  new IntersectionObserver(([entry]) => { near = entry.isIntersecting; if (near && !rows.length) refresh(); }).observe($("groups"));
  setInterval(() => near && !rows.length && !document.hidden && refresh(), 5000);
}
