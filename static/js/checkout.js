// While somebody pays elsewhere: looks every few seconds whether the order still waits, then goes on.
//
// It reads the checkout's own page, which whoever knows the order's number may see, signed in or not.

const EVERY_MS = 3000;
const PATIENCE_MS = 10000;

const section = document.querySelector("[data-watch]");

async function isOver() {
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const answer = await fetch(section.dataset.watch, { headers: { Accept: "text/html" }, signal });
  if (!answer.ok) return false;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const state = page.querySelector("[data-checkout-state]")?.dataset.checkoutState;
  return state !== undefined && state !== "pending";
}

async function look() {
  // What cannot be reached now is asked again.
  if (document.visibilityState === "visible" && (await isOver().catch(() => false))) {
    location.replace(section.dataset.then);
  } else {
    setTimeout(look, EVERY_MS);
  }
}

if (section) {
  section.querySelector("[data-watching]").hidden = false;
  setTimeout(look, EVERY_MS);
}
