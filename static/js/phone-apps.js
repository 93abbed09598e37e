// The apps of one phone: what is installed, what is on its way, what could be installed.

import { call } from "./api.js";
import { busy } from "./actions.js";
import { confirmed } from "./confirm.js";
import { showInstallation } from "./installations.js";
import { fill, slot } from "./slots.js";
import { text } from "./strings.js";
import { toast } from "./toast.js";

export function startPhoneApps(api, deviceId, screenChanged) {
  const section = document.getElementById("apps");
  const installed = section.querySelector("[data-installed]");
  const underWay = section.querySelector("[data-under-way]");
  const form = document.getElementById("install");
  let uploads = [];
  const room = { started: false, refresh };

  const uploadOf = (installation) =>
    uploads.find((app) => app.id === installation.app_id) ??
    uploads.find((app) => app.package === installation.package);

  function row(app) {
    const upload = uploads.find((candidate) => candidate.package === app.package);
    const label = upload?.label || app.package;
    const version = app.version_name ?? app.version_code ?? "";
    const element = fill("installed-row", { label, package: `${upload?.label ? `${app.package} · ` : ""}${version}` });
    if (upload) {
      slot(element, "icon").src = `/api/v1/apps/${upload.id}/icon`;
      slot(element, "icon").hidden = false;
    }
    const address = `${api}/apps/${encodeURIComponent(app.package)}`;
    element.querySelector("[data-launch]").addEventListener("click", ({ currentTarget }) =>
      busy(currentTarget, async () => {
        await call("POST", `${address}/launch`);
        toast(text("launched", { package: label }), "", "success");
        screenChanged();
      }));
    element.querySelector("[data-uninstall]").addEventListener("click", ({ currentTarget }) =>
      busy(currentTarget, async () => {
        if (!(await confirmed(text("uninstall_question", { package: label }), text("uninstall")))) return;
        await call("DELETE", address);
        toast(text("uninstalled", { package: label }), "", "success");
        screenChanged();
        await refreshInstalled();
      }));
    return element;
  }

  async function refreshInstalled() {
    const answer = await call("GET", `${api}/apps`, undefined, { quiet: true });
    const apps = Array.isArray(answer) ? answer : answer.items;
    installed.replaceChildren(...apps.map(row));
    section.querySelector("[data-no-apps]").hidden = apps.length > 0;
  }

  async function refreshUploads() {
    uploads = (await call("GET", "/api/v1/apps?limit=100", undefined, { quiet: true })).items;
    form.hidden = uploads.length === 0;
    form.elements.app_id.replaceChildren(
      ...uploads.map((app) => new Option(`${app.label || app.package} ${app.version_name ?? ""}`, app.id)));
  }

  async function refreshUnderWay() {
    const answer = await call("GET", `${api}/installations`, undefined, { quiet: true });
    for (const installation of (Array.isArray(answer) ? answer : answer.items).toReversed()) {
      if (["queued", "installing"].includes(installation.state)) {
        showInstallation(underWay, installation, uploadOf(installation)?.label || installation.package);
      }
    }
  }

  async function refresh() {
    room.started = true;
    await refreshUploads().catch(() => {});
    await Promise.allSettled([refreshInstalled(), refreshUnderWay()]);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    busy(event.submitter, async () => {
      const installation = await call("POST", `${api}/apps`, { app_id: form.elements.app_id.value });
      showInstallation(underWay, installation, uploadOf(installation)?.label || installation.package);
    });
  });

  document.addEventListener("app.installation", ({ detail: { data } }) => {
    if (data.device_id !== deviceId) return;
    showInstallation(
      underWay, { ...data, id: data.installation_id }, uploadOf(data)?.label || data.package);
    if (data.state === "installed") {
      refreshInstalled().catch(() => {});
      screenChanged();
    }
  });

  return room;
}
