// Copy buttons: copy the text that stands beside them.

import { text } from "./strings.js";
import { toast } from "./toast.js";

export function startCopying() {
  document.addEventListener("click", async (event) => {
    const source = event.target.closest("[data-copy]")?.parentElement.querySelector("[data-copy-source]");
    if (!source) return;
    try {
      await navigator.clipboard.writeText(source.textContent);
      toast(text("copied"), source.textContent, "success");
    } catch {
      // Browsers forbid it on plain-HTTP addresses of other machines.
      getSelection().selectAllChildren(source);
      toast(text("copy_failed"), "", "error");
    }
  });
}
