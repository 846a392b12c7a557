"use strict";
// What is under the pointer in a map of bit-widths. `data-layers` has, for each layer from the top
// down: name, rows, a digit per group, what is told about it.
const tip = document.getElementById("tip");
for (const map of document.querySelectorAll("svg.map")) {
  const layers = JSON.parse(map.dataset.layers);
  const size = Number(map.dataset.groupSize);
  const rows = layers.reduce((sum, layer) => sum + layer[1], 0);
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    let row = ((event.clientY - box.top) / box.height) * rows;
    const found = layers.find((layer) => (row -= layer[1]) < 0) || layers[layers.length - 1];
    const [name, , digits, told] = found;
    const at = ((event.clientX - box.left) / box.width) * digits.length;
    const group = Math.max(0, Math.min(digits.length - 1, Math.floor(at)));
    const columns = `columns ${group * size} to ${(group + 1) * size - 1}`;
    tip.textContent = `${name}, group ${group} (${columns}): ${digits[group]} bits. ${told}`;
    tip.hidden = false;
    const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
    const above = event.clientY + 24 + tip.offsetHeight > innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18}px`;
  });
  map.addEventListener("pointerleave", () => { tip.hidden = true; });
}
// Search: rows of the table behind the field that have the text.
for (const field of document.querySelectorAll("input[type=search]")) {
  const rows = field.closest("section").querySelectorAll("tbody tr");
  field.addEventListener("input", () => {
    const text = field.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  });
}
