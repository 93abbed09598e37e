// The page of one phone: follows its state and starts what the page is made of.

import { call } from "./api.js";
import { setState } from "./badges.js";
import { startPhoneApps } from "./phone-apps.js";
import { startScreen } from "./screen.js";
import { startShell } from "./shell.js";
import { text } from "./strings.js";
import { toast } from "./toast.js";

const PASSING = new Set(["creating", "starting", "stopping", "resetting", "deleting"]);
const page = document.getElementById("phone");
const id = page.dataset.deviceId;
const api = `/api/v1/devices/${id}`;
const screen = startScreen(api);
const apps = startPhoneApps(api, id, () => screen.refreshSoon());
startShell(api, () => screen.refreshSoon());
let underWay = false;
let wanted = false;

function show(state, detail) {
  const before = page.dataset.state;
  page.dataset.state = state;
  for (const badge of page.querySelectorAll('.state[data-kind="device"]')) setState(badge, state);
  for (const part of page.querySelectorAll("[data-when]")) {
    part.hidden = !part.dataset.when.split(" ").includes(state);
  }
  const notice = page.querySelector("[data-state-notice]");
  notice.hidden = !detail;
  notice.firstElementChild.className = `notice ${state === "failed" ? "error" : "info"}`;
  notice.querySelector("[data-state-detail]").textContent = detail ?? "";
  screen.follow(state);
  showLog(state === "failed");
  if (state === "running" && (before !== "running" || !apps.started)) apps.refresh();
}

/** What the container of a phone that failed had to say, asked for once it is opened. */
function showLog(failed) {
  const log = page.querySelector("[data-log]");
  log.hidden = !failed;
  if (!failed) log.open = false;
}

page.querySelector("[data-log]").addEventListener("toggle", async ({ target }) => {
  if (!target.open) return;
  const { lines } = await call("GET", `${api}/log`);
  target.querySelector("[data-log-lines]").textContent = lines.join("\n") || text("no_log");
});

function showPorts(ports) {
  const block = page.querySelector("[data-ports]");
  block.hidden = !ports;
  page.querySelector("[data-no-ports]").hidden = Boolean(ports);
  if (!ports) return;
  block.querySelector("[data-copy-source]").textContent = `adb connect ${block.dataset.adbHost}:${ports.adb}`;
  for (const place of block.querySelectorAll("[data-port]")) place.textContent = ports[place.dataset.port];
}

function gone() {
  toast(text("deleted"), "", "success");
  location.assign("/devices");
}

/** Asks how the phone is; one request at a time, so that no older answer is shown last. */
async function refresh() {
  wanted = true;
  if (underWay) return;
  underWay = true;
  while (wanted) {
    wanted = false;
    try {
      const device = await call("GET", api, undefined, { quiet: true });
      show(device.state, device.state_detail);
      showPorts(device.ports);
    } catch (problem) {
      if (problem.status === 404) gone();
    }
  }
  underWay = false;
}

page.addEventListener("done", refresh);
document.addEventListener("device.state", ({ detail: { data } }) => {
  if (data.device_id !== id) return;
  if (data.state === "deleted") gone();
  else refresh();
});
// A place in a queue or the share of a download changes without a message.
setInterval(() => {
  if (PASSING.has(page.dataset.state) && !document.hidden) refresh();
}, 2000);
// What happened between the making of the page and the first live message is asked for once.
document.addEventListener("live", refresh);
show(page.dataset.state, page.querySelector("[data-state-detail]").textContent);
