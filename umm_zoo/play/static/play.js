// Copying. No library, no network.
"use strict";
document.addEventListener("click", event => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const area = document.createElement("textarea");
  area.value = button.dataset.copy;
  document.body.append(area);
  area.select();
  document.execCommand("copy");                       // works where the page comes from another machine without a certificate too
  area.remove();
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
});
