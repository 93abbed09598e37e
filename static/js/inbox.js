// The inbox: new notifications come in on top; reading them all is told to the server.

import { busy } from "./actions.js";
import { call } from "./api.js";
import { setUnread } from "./badges.js";
import { moment } from "./format.js";
import { fill } from "./slots.js";

const inbox = document.getElementById("inbox");
const form = document.getElementById("mark-read");

document.addEventListener("notification", ({ detail }) => {
  if (!detail.title) return;
  if (inbox.querySelector(`[data-notification-id="${detail.id}"]`)) return;
  const item = fill("notification", { title: detail.title, body: detail.body });
  item.dataset.notificationId = detail.id;
  const time = item.querySelector("time");
  time.dateTime = detail.created_at;
  time.textContent = moment(detail.created_at);
  inbox.prepend(item);
  document.getElementById("no-notifications").hidden = true;
  form.elements.up_to_id.value = detail.id;
  form.hidden = false;
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(event.submitter, async () => {
    await call("POST", "/api/v1/notifications/read", { up_to_id: Number(form.elements.up_to_id.value) });
    for (const item of inbox.querySelectorAll(".unread")) item.classList.remove("unread");
    setUnread(0);
    form.hidden = true;
  });
});
