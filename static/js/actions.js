// Buttons and forms that call the API: data-api="POST /api/v1/…".
//
// data-confirm asks first; data-then is "reload" or an address to go to; data-done is said in a
// toast. A form sends its fields as JSON and shows what was wrong beside them. What came back is
// in the event "done", dispatched on the button or form.

import { call } from "./api.js";
import { confirmed } from "./confirm.js";
import { toast } from "./toast.js";

async function run(element, body, quiet) {
  const { api, confirm, confirmButton, done, then } = element.dataset;
  if (confirm && !(await confirmed(confirm, confirmButton))) return;
  const answer = await call(...api.split(" "), body, { quiet });
  element.dispatchEvent(new CustomEvent("done", { detail: answer, bubbles: true }));
  if (done) toast(done, "", "success");
  if (then === "reload") location.reload();
  else if (then) location.assign(then);
}

/** Runs a step with the button marked busy, so that it is not pressed twice. */
export async function busy(button, step) {
  if (button?.getAttribute("aria-busy") === "true") return;
  button?.setAttribute("aria-busy", "true");
  try {
    await step();
  } catch (problem) {
    if (problem.status === undefined) throw problem;
  } finally {
    button?.removeAttribute("aria-busy");
  }
}

function showErrors(form, problem) {
  const first = problem.errors.find(({ field }) => form.elements[field]);
  for (const place of form.querySelectorAll("[data-error-for]")) {
    const error = problem.errors.find(({ field }) => field === place.dataset.errorFor);
    place.textContent = error?.message ?? "";
    place.hidden = !error;
    form.elements[place.dataset.errorFor]?.setAttribute("aria-invalid", error ? "true" : "false");
  }
  if (first) form.elements[first.field].focus();
  return Boolean(first);
}

async function submit(form) {
  const body = Object.fromEntries(new FormData(form));
  try {
    await run(form, body, true);
    showErrors(form, { errors: [] });
  } catch (problem) {
    if (!problem.errors || !showErrors(form, problem)) toast(problem.message, "", "error");
    throw problem;
  }
}

export function startActions() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-api]");
    if (button) busy(button, () => run(button));
  });
  document.addEventListener("submit", (event) => {
    const form = event.target.closest("form");
    if (form.dataset.api) {
      event.preventDefault();
      busy(event.submitter, () => submit(form));
    } else if (form.action && form.method === "post" && !event.defaultPrevented) {
      // A second click on a form that is on its way would send it twice.
      setTimeout(() => event.submitter?.setAttribute("disabled", ""), 0);
      addEventListener("pageshow", () => event.submitter?.removeAttribute("disabled"), { once: true });
    }
  });
}
