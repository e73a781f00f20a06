// Requests to our own service, with the token of this tab where there is one.
export class Refused extends Error {
  constructor(status, body, requestId) {
    super([body.detail, body.hint].filter(Boolean).join("; "));
    this.status = status;
    this.requestId = requestId;
  }
}

export async function ask(path, body) {
  const token = sessionStorage.getItem("token");
  const headers = {Accept: "application/json", ...(token ? {Authorization: `Bearer ${token}`} : {})};
  const sent = body === undefined ? {headers}
    : {method: "POST", headers: {...headers, "Content-Type": "application/json"}, body: JSON.stringify(body)};
  const response = await fetch(path, {...sent, cache: "no-store", signal: AbortSignal.timeout(10_000)});
  const answer = await response.json();
  if (!response.ok) throw new Refused(response.status, answer, response.headers.get("X-Request-Id"));
  return answer;
}
