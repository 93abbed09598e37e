// Installations on their way, a row each, that ends a while after it succeeded.

import { setState } from "./badges.js";
import { fill, slot } from "./slots.js";

const STAYS_MS = 4000;
// An answer may arrive after the news of what it started.
const ORDER = ["queued", "installing", "installed", "failed"];

export function showInstallation(list, installation, label) {
  let row = list.querySelector(`[data-installation-id="${CSS.escape(installation.id)}"]`);
  if (!row) {
    row = fill("under-way-row", { label, detail: "" });
    row.dataset.installationId = installation.id;
    list.prepend(row);
  }
  const badge = row.querySelector(".state");
  if (ORDER.indexOf(installation.state) < ORDER.indexOf(badge.dataset.state)) return;
  setState(badge, installation.state);
  slot(row, "detail").textContent = installation.detail ?? "";
  if (installation.state === "installed") setTimeout(() => row.remove(), STAYS_MS);
}
