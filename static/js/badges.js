// What every page shows of the live state: state badges, the balance, the unread count.

import { money } from "./format.js";
import { text } from "./strings.js";

export function setState(badge, state) {
  badge.dataset.state = state;
  badge.textContent = text(`${badge.dataset.kind}.${state}`) || state;
}

export function setUnread(count) {
  for (const badge of document.querySelectorAll("[data-unread]")) {
    badge.dataset.unread = count;
    badge.textContent = count < 100 ? count : "99+";
    badge.setAttribute("aria-label", text("unread", { count }));
    badge.hidden = count === 0;
  }
}

function addUnread({ detail }) {
  if (detail.read_at) return;
  const badge = document.querySelector("[data-unread]");
  if (badge) setUnread(Number(badge.dataset.unread) + 1);
}

function showDevice({ detail: { data } }) {
  for (const element of document.querySelectorAll(`[data-device-id="${CSS.escape(data.device_id)}"]`)) {
    for (const badge of element.querySelectorAll('.state[data-kind="device"]')) setState(badge, data.state);
    for (const detail of element.querySelectorAll("[data-state-detail]")) {
      detail.textContent = data.detail ?? "";
      detail.hidden = !data.detail;
    }
  }
}

function showOrder({ detail: { data } }) {
  for (const element of document.querySelectorAll(`[data-order-id="${CSS.escape(data.order_id)}"]`)) {
    for (const badge of element.querySelectorAll('.state[data-kind="order"]')) setState(badge, data.state);
    for (const part of element.querySelectorAll("[data-order-when]")) {
      part.hidden = part.dataset.orderWhen !== data.state;
    }
  }
}

function showBalance({ detail: { data } }) {
  for (const element of document.querySelectorAll("[data-balance]")) {
    element.textContent = money(data.balance, data.currency);
  }
}

export function startBadges() {
  document.addEventListener("notification", addUnread);
  document.addEventListener("device.state", showDevice);
  document.addEventListener("billing.order", showOrder);
  document.addEventListener("billing.balance", showBalance);
}
