// What every page runs.

import { startActions } from "./actions.js";
import { startBadges } from "./badges.js";
import { startCopying } from "./copy.js";
import { startLive } from "./live.js";
import { startMenus } from "./menus.js";
import { localiseTimes } from "./times.js";
import { toast } from "./toast.js";

localiseTimes(document);
startActions();
startCopying();
startMenus();

if (document.body.dataset.stream) {
  startBadges();
  document.addEventListener("notification", ({ detail }) => {
    // News without words, such as a charge each minute, only moves what the page shows.
    if (detail.title) toast(detail.title, detail.body);
  });
  startLive();
}
