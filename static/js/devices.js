// The list of phones: a deleted one leaves; a page that was away for long starts afresh.

import { call } from "./api.js";
import { setState } from "./badges.js";

async function refresh() {
  const { items } = await call("GET", "/api/v1/devices?limit=100", undefined, { quiet: true });
  const states = new Map(items.map((device) => [device.id, device.state]));
  for (const card of document.querySelectorAll("li[data-device-id]")) {
    const state = states.get(card.dataset.deviceId);
    if (state) setState(card.querySelector(".state"), state);
    else if (items.length < 100) card.remove();
  }
  if (!document.querySelector("li[data-device-id]") && document.querySelector("ul.grid")) location.reload();
}

// States may have changed between the making of the page and the first live message.
document.addEventListener("live", () => refresh().catch(() => {}));
document.addEventListener("device.state", ({ detail: { data } }) => {
  if (data.state === "deleted" || data.state === "deleting") refresh().catch(() => {});
});
