// The run's numbers over time: loaded once from the service, then the new points alone; the same after a reload.
import {ask} from "/static/api.js";

const EVERY_MS = 4000;

export class History {
  constructor() {
    this.points = [];
    this.stepSeconds = 0;
    this.askedAt = -Infinity;
  }

  // Returns whether there is something new
  async refresh() {
    if (performance.now() - this.askedAt < EVERY_MS) return false;
    this.askedAt = performance.now();
    const last = this.points.at(-1);
    let page = await ask(`/v1/history?after_s=${last ? last.at_s : 0}`);
    const anew = last && (page.step_s !== this.stepSeconds || page.points[0]?.at_s !== last.at_s);
    if (anew) page = await ask("/v1/history");
    this.points = last && !anew ? [...this.points.slice(0, -1), ...page.points] : page.points;
    this.stepSeconds = page.step_s;
    return true;
  }
}
