// The apps page: choose or drop files; they go up one after the other and become cards.

import { fileSize, percent } from "./format.js";
import { fill, slot } from "./slots.js";
import { text } from "./strings.js";
import { upload } from "./upload.js";

const BYTES_PER_MB = 1 << 20;
const STAYS_MS = 3000;

const form = document.getElementById("upload");
const chooser = document.getElementById("upload-file");
const list = document.getElementById("apps");
const maxBytes = Number(form.dataset.maxMb) * BYTES_PER_MB;
let queue = Promise.resolve();

function showApp(app) {
  list.querySelector(`[data-app-id="${CSS.escape(app.id)}"]`)?.remove();
  const card = fill("app-card", {
    label: app.label || app.package,
    package: app.package,
    version: app.version_name ?? app.version_code ?? "–",
    size: fileSize(app.size_bytes),
  });
  card.dataset.appId = app.id;
  slot(card, "link").href = `/apps/${app.id}`;
  slot(card, "icon").src = `/api/v1/apps/${app.id}/icon`;
  list.prepend(card);
  document.getElementById("no-apps").hidden = true;
}

/** What is wrong, then the particulars, where there are any. */
function reason({ title, message }) {
  return title && title !== message ? `${title}: ${message}` : message;
}

async function send(file, row) {
  const bar = row.querySelector("progress");
  const status = slot(row, "status");
  try {
    if (file.size > maxBytes) throw new Error(text("upload.too_large"));
    const answer = await upload("/api/v1/apps", file, {
      progressed: (share) => {
        bar.value = share;
        status.textContent = text("upload.sending", { percent: percent(share) });
      },
      sent: () => {
        bar.removeAttribute("value");
        status.textContent = text("upload.checking");
      },
    });
    status.textContent = text(answer.status === 200 ? "upload.known" : "upload.done");
    bar.value = 1;
    showApp(answer.app);
    setTimeout(() => row.remove(), STAYS_MS);
  } catch (problem) {
    status.textContent = problem.status === 0 ? text("upload.interrupted") : reason(problem);
    status.classList.replace("soft", "field-error");
    bar.remove();
  }
}

function add(files) {
  for (const file of files) {
    const row = fill("upload-row", { name: file.name, status: text("upload.waiting") });
    document.getElementById("uploads").append(row);
    queue = queue.then(() => send(file, row));
  }
}

form.querySelector("[data-choose]").addEventListener("click", () => chooser.click());
chooser.addEventListener("change", () => {
  add(chooser.files);
  chooser.value = "";
});

// The whole window takes files: one dropped beside the box would otherwise leave the page.
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    form.classList.toggle("over", over);
    if (name === "drop") add(event.dataTransfer.files);
  });
}
