// Pages about money: usual amounts fill in the form, the balance follows what phones cost meanwhile, an order
// that moved while away is caught up, a statement goes to the printer.

import { call } from "./api.js";
import { money, stretch } from "./format.js";
import { text } from "./strings.js";

const BALANCE_EVERY_MS = 30000;

const amounts = document.querySelector("[data-amounts]");
if (amounts) {
  amounts.hidden = false;
  amounts.addEventListener("click", (event) => {
    const button = event.target.closest("[data-amount]");
    if (button) document.getElementById("f-amount").value = button.dataset.amount;
  });
}

const printing = document.querySelector("[data-print]");
if (printing) {
  printing.hidden = false;
  printing.addEventListener("click", () => print());
}

// Charges are no news of their own, they would be too many.
const spending = document.querySelector("[data-spending]");
async function showBalance() {
  if (document.visibilityState !== "visible") return;
  const now = await call("GET", "/api/v1/billing/balance", undefined, { quiet: true }).catch(() => null);
  if (!now) return;
  document.dispatchEvent(new CustomEvent("billing.balance", { detail: { data: now } }));
  const rate = now.spending_per_hour;
  spending.textContent = rate
    ? text("spending.now", { rate: money(rate, now.currency), time: stretch(now.lasts_s) })
    : text("spending.nothing");
}
if (spending) setInterval(showBalance, BALANCE_EVERY_MS);

// A payment may have arrived between the making of the page and the first live message.
document.addEventListener("live", async () => {
  for (const element of document.querySelectorAll("section[data-order-id]")) {
    const id = element.dataset.orderId;
    const order = await call("GET", `/api/v1/billing/orders/${id}`, undefined, { quiet: true }).catch(() => null);
    if (!order) continue;
    const detail = { data: { ...order, order_id: order.id } };
    document.dispatchEvent(new CustomEvent("billing.order", { detail }));
  }
});
