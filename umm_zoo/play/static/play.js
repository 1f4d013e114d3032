// Copying, and pixels that stay pixels. No library, no network.
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
document.addEventListener("load", event => {
  const image = event.target;
  if (image.tagName === "IMG" && image.closest(".result, .entry")) image.classList.toggle("small", image.naturalWidth <= 256);
}, true);
