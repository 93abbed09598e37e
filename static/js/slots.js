// Filling in the <template>s of a page.

/** A copy of the template's first element, with texts put in where data-slot names them. */
export function fill(templateId, texts) {
  const element = document.getElementById(templateId).content.firstElementChild.cloneNode(true);
  for (const [name, value] of Object.entries(texts)) {
    slot(element, name).textContent = value;
  }
  return element;
}

export function slot(element, name) {
  return element.matches(`[data-slot="${name}"]`) ? element : element.querySelector(`[data-slot="${name}"]`);
}
