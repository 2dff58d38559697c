// Tables that don't fit get a sentence above them, and fade at the edges behind which there is more.
for (const table of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "soft";
  hint.textContent = "Only a part of this table fits here: scroll in it to see the rest.";
  table.before(hint);
  const update = () => {
    const right = table.scrollWidth - table.clientWidth, below = table.scrollHeight - table.clientHeight;
    hint.hidden = right <= 1 && below <= 1;
    table.classList.toggle("more-right", table.scrollLeft < right - 1);
    table.classList.toggle("more-below", table.scrollTop < below - 1);
  };
  table.addEventListener("scroll", update);
  new ResizeObserver(update).observe(table);
}
