// Fills the navigation of every page with the parts that this server has.
"use strict";

(async () => {
  const nav = document.querySelector("nav[data-parts]");
  if (!nav) return;
  const answer = await fetch("/api/parts");
  if (!answer.ok) return;
  for (const part of await answer.json()) {
    const link = document.createElement("a");
    link.href = part.home;
    link.textContent = part.title;
    if (location.pathname === part.home) link.setAttribute("aria-current", "page");
    nav.append(link);
  }
})();
