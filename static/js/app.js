// The page of one app: install it on one of the phones that run.

import { busy } from "./actions.js";
import { call } from "./api.js";
import { showInstallation } from "./installations.js";
import { text } from "./strings.js";

const appId = document.getElementById("app").dataset.appId;
const form = document.getElementById("install");
const underWay = document.querySelector("[data-under-way]");
const names = new Map();

async function refreshPhones() {
  const { items } = await call("GET", "/api/v1/devices?state=running&limit=100", undefined, { quiet: true });
  const chosen = form.elements.device_id.value;
  names.clear();
  for (const device of items) names.set(device.id, device.name);
  form.elements.device_id.replaceChildren(...items.map(({ id, name }) => new Option(name, id, false, id === chosen)));
  form.hidden = items.length === 0;
  document.querySelector("[data-no-phones]").hidden = items.length > 0;
}

const show = (installation) => showInstallation(
  underWay, installation, text("install_on", { phone: names.get(installation.device_id) ?? "" }));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(event.submitter, async () => {
    show(await call("POST", `/api/v1/devices/${form.elements.device_id.value}/apps`, { app_id: appId }));
  });
});

document.addEventListener("app.installation", ({ detail: { data } }) => {
  if (data.app_id === appId) show({ ...data, id: data.installation_id });
});
document.addEventListener("device.state", () => refreshPhones().catch(() => {}));
refreshPhones().catch(() => {});
