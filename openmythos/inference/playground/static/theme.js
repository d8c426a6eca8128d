// Light, dark, or as the system says. Runs before the page is drawn, so that nothing flashes.
"use strict";

(() => {
  const KEY = "openmythos-theme";
  const kept = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage may be forbidden
    }
  };

  const apply = (theme) => {
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    dispatchEvent(new Event("themechange")); // canvases draw themselves again
  };

  apply(kept());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(kept()));
  addEventListener("DOMContentLoaded", () => {
    for (const radio of document.querySelectorAll("#theme input")) {
      radio.checked = radio.value === (kept() ?? "system");
      radio.addEventListener("change", () => {
        try {
          localStorage.setItem(KEY, radio.value);
        } catch {
          // it then holds until the page is left
        }
        apply(radio.value);
      });
    }
  });
})();
