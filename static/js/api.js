// One way to call the API: JSON in, JSON out, problems as errors and, unless told not to, as toasts.

import { text } from "./strings.js";
import { toast } from "./toast.js";

export const csrfToken = document.querySelector('meta[name="csrf-token"]').content;

/** An application/problem+json answer, or no answer at all (status 0). */
export class Problem extends Error {
  constructor(status, document = {}) {
    super(document.detail || document.title || text(status ? "failed" : "offline"));
    this.status = status;
    this.code = document.code ?? "";
    this.title = document.title ?? "";
    this.errors = document.errors ?? [];
  }
}

function showProblem(problem) {
  const title = problem.title && problem.title !== problem.message ? problem.title : "";
  toast(title || problem.message, title ? problem.message : "", "error");
}

/** The problem a failed answer holds. */
async function problemOf(response) {
  const isProblem = response.headers.get("Content-Type")?.startsWith("application/problem+json");
  return new Problem(response.status, isProblem ? await response.json() : {});
}

/**
 * Calls the API; answers the parsed JSON, or null for an answer without a body.
 * Throws a Problem, after showing it unless `quiet`.
 */
export async function call(method, path, body, { quiet = false } = {}) {
  try {
    const response = await send(method, path, body);
    if (!response.ok) throw await problemOf(response);
    const isJson = response.headers.get("Content-Type")?.startsWith("application/json");
    return isJson ? await response.json() : null;
  } catch (error) {
    const problem = error instanceof Problem ? error : new Problem(0);
    if (problem.status === 401) location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
    else if (!quiet) showProblem(problem);
    throw problem;
  }
}

function send(method, path, body) {
  const headers = { Accept: "application/json", "Accept-Language": document.documentElement.lang };
  if (method !== "GET") headers["X-CSRF-Token"] = csrfToken;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  return fetch(path, {
    method,
    headers,
    credentials: "same-origin",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
}
