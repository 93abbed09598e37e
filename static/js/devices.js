// The list of phones: a deleted one leaves; a page that was away for long starts afresh.

import { call } from "./api.js";
import { setState } from "./badges.js";

function show(card, { state, state_detail: words }) {
  setState(card.querySelector(".state"), state);
  const detail = card.querySelector("[data-state-detail]");
  detail.textContent = words ?? "";
  detail.hidden = !words;
}

function somethingPasses() {
  const passing = ["creating", "starting", "stopping", "resetting", "deleting"];
  return passing.some((state) => document.querySelector(`li[data-device-id] .state[data-state="${state}"]`));
}

async function refresh() {
  const { items } = await call("GET", "/api/v1/devices?limit=100", undefined, { quiet: true });
  const devices = new Map(items.map((device) => [device.id, device]));
  for (const card of document.querySelectorAll("li[data-device-id]")) {
    const device = devices.get(card.dataset.deviceId);
    if (device) show(card, device);
    else if (items.length < 100) card.remove();
  }
  if (!document.querySelector("li[data-device-id]") && document.querySelector("ul.grid")) location.reload();
}

// States may have changed between the making of the page and the first live message.
document.addEventListener("live", () => refresh().catch(() => {}));
document.addEventListener("device.state", ({ detail: { data } }) => {
  if (data.state === "deleted" || data.state === "deleting") refresh().catch(() => {});
});
// A place in a queue or the share of a download changes without a message.
setInterval(() => {
  if (!document.hidden && somethingPasses()) refresh().catch(() => {});
}, 2000);
