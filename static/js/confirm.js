// The one question dialog of the page. Escape and a click beside it mean no.

const dialog = document.getElementById("confirm");

/** Asks; resolves to whether the answer was yes. */
export function confirmed(question, yes) {
  dialog.querySelector("#confirm-question").textContent = question;
  dialog.querySelector("[data-yes]").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close("no");
});
