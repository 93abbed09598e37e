// Balance and order pages: usual amounts fill in the form; an order that moved while away is caught up.

import { call } from "./api.js";

const amounts = document.querySelector("[data-amounts]");
if (amounts) {
  amounts.hidden = false;
  amounts.addEventListener("click", (event) => {
    const button = event.target.closest("[data-amount]");
    if (button) document.getElementById("f-amount").value = button.dataset.amount;
  });
}

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
