// Responses as coloured tokens: by log-prob, by the version that drew them, or by ratio; readable with keys too.
import {ask} from "/static/api.js";
import {$, element, number} from "/static/text.js";

const SHOWN = 2048; // tokens of a response that are drawn at first
const texts = new Map(); // token id -> what it reads as
const VERSIONS = 6; // --version-0 ... of page.css

async function learn(trajectories) {
  const ids = [...new Set(trajectories.flatMap((t) => [...t.prompt_ids, ...t.response_ids]))].filter((id) => !texts.has(id));
  for (let start = 0; start < ids.length; start += 60_000) {
    const some = ids.slice(start, start + 60_000);
    const answer = await ask("/v1/token_texts", {token_ids: some});
    some.forEach((id, index) => texts.set(id, answer.texts[index]));
  }
}

const read = (id) => (texts.get(id) ?? `${id} `).replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
const versionOf = (trajectory, index) => trajectory.spans.find((span) => index < span.end).version;

class Tokens {
  constructor() {
    this.trajectories = [];
    this.boxes = [];
  }

  async show(trajectories) {
    await learn(trajectories);
    this.trajectories = trajectories;
    const versions = new Set(trajectories.flatMap((t) => t.spans.map((span) => span.version)));
    this.versions = [...versions].sort((a, b) => (a ?? -1) - (b ?? -1));
    this.boxes = [];
    $("responses").replaceChildren(...trajectories.map((trajectory, position) => this.response(trajectory, position)));
    this.paint();
  }

  response(trajectory, position) {
    const box = element("div", "", "response");
    const title = element("h4", `Response ${position}: reward ${number(trajectory.reward)}, ${number(trajectory.response_ids.length)} tokens `);
    title.append(element("span", trajectory.trajectory_id, "note"));
    box.append(title);
    if (position === 0 || String(trajectory.prompt_ids) !== String(this.trajectories[0].prompt_ids)) {
      const prompt = element("p", trajectory.prompt_ids.slice(0, SHOWN).map(read).join(""), "tokens prompt");
      prompt.prepend(element("span", "prompt ", "note"));
      box.append(prompt);
    }
    const line = element("p", "", "tokens");
    line.tabIndex = 0;
    line.setAttribute("role", "group");
    line.setAttribute("aria-label", `Response ${trajectory.trajectory_id}: move with the arrow keys`);
    const add = (start, end) => {
      for (let index = start; index < end; index += 1) line.append(element("span", read(trajectory.response_ids[index])));
    };
    add(0, Math.min(SHOWN, trajectory.response_ids.length));
    line.addEventListener("mousemove", (event) => event.target !== line && this.point(position, [...line.children].indexOf(event.target)));
    line.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity}[event.key];
      if (!step) return;
      event.preventDefault();
      const at = [...line.children].findIndex((node) => node.classList.contains("here"));
      this.point(position, Math.min(line.children.length - 1, Math.max(0, at + step)));
    });
    box.append(line);
    if (trajectory.response_ids.length > SHOWN) {
      const rest = element("button", `Show all ${number(trajectory.response_ids.length)} tokens`);
      rest.addEventListener("click", () => {
        add(SHOWN, trajectory.response_ids.length);
        rest.remove();
        this.paint();
      });
      box.append(rest);
    }
    this.boxes.push(line);
    return box;
  }

  point(position, index) {
    const trajectory = this.trajectories[position];
    document.querySelectorAll(".tokens .here").forEach((node) => node.classList.remove("here"));
    const node = this.boxes[position].children[index];
    if (!node) return;
    node.classList.add("here");
    const version = versionOf(trajectory, index);
    const facts = [`token ${index}: “${read(trajectory.response_ids[index]).trim()}” (id ${trajectory.response_ids[index]})`,
      version === null ? "foreign" : `version ${number(version)}`];
    if (trajectory.response_mask[index]) {
      facts.push(`log-prob ${number(trajectory.behavior_logprobs[index])}`);
      if (trajectory.log_ratios) facts.push(`ratio ${number(Math.exp(trajectory.log_ratios[index]))}`);
    } else facts.push("masked: not trained on");
    $("token-facts").textContent = facts.join(", ");
  }

  paint() {
    const by = $("paint").value;
    this.boxes.forEach((line, position) => {
      const trajectory = this.trajectories[position];
      [...line.children].forEach((node, index) => {
        node.classList.toggle("masked", !trajectory.response_mask[index]);
        node.style.background = trajectory.response_mask[index] ? this.colour(by, trajectory, index) : "";
      });
    });
    this.drawLegend(by);
  }

  colour(by, trajectory, index) {
    if (by === "version") return this.versionColour(versionOf(trajectory, index));
    const value = by === "ratio" ? trajectory.log_ratios[index] : trajectory.behavior_logprobs[index];
    const strength = by === "ratio" ? Math.min(1, Math.abs(value) / Math.log(4)) : Math.min(1, -value / 5);
    return mixed(by === "ratio" && value > 0 ? "--more" : "--less", strength);
  }

  versionColour(version) {
    return version === null ? mixed("--warn", 0.8) : mixed(`--version-${this.versions.indexOf(version) % VERSIONS}`, 0.8);
  }

  drawLegend(by) {
    const entries = {
      logprob: [["log-prob 0", mixed("--less", 0)], ["−1", mixed("--less", 0.2)], ["−5 and less", mixed("--less", 1)]],
      ratio: [["¼ and less", mixed("--less", 1)], ["½", mixed("--less", 0.5)], ["1", ""], ["2", mixed("--more", 0.5)], ["4 and more", mixed("--more", 1)]],
      version: this.versions.map((version) => [version === null ? "foreign" : `v${version}`, this.versionColour(version)]),
    }[by];
    $("legend").replaceChildren(...entries.map(([label, colour]) => {
      const mark = element("span", label, "swatch");
      mark.style.background = colour;
      return mark;
    }));
  }
}

// weak enough that the text on it stays readable
const mixed = (variable, strength) => `color-mix(in srgb, var(${variable}) ${Math.round(55 * strength)}%, transparent)`;

export const tokens = new Tokens();
