"use strict";
(() => {
  const picker = document.querySelector(".picker");
  const items = [...document.querySelectorAll(".episodes > article")];
  if (!picker || !items.length) return;
  const pick = (name) => picker.querySelector(`[data-pick=${name}]`);
  const episode = pick("episode");
  const options = [...episode.options];
  const output = picker.querySelector("output");
  const wanted = (item) =>
    ["stage", "kind", "verdict"].every((key) => ["all", item.dataset[key]].includes(pick(key).value));

  const show = (at) => {
    items.forEach((item, place) => {
      item.hidden = place !== at;
      item.firstElementChild.open = place === at;
    });
    const left = items.map((_, place) => place).filter((place) => wanted(items[place]));
    output.textContent = left.length ? `${left.indexOf(at) + 1} of ${left.length}` : "none fits";
    if (at >= 0) episode.value = String(at);
  };
  const filter = (at = Number(episode.value)) => {
    const left = options.filter((one) => wanted(items[Number(one.value)]));
    episode.replaceChildren(...left);
    show(left.some((one) => Number(one.value) === at) ? at : left.length ? Number(left[0].value) : -1);
  };
  const step = (by) => {
    const left = [...episode.options];
    if (!left.length) return;
    const at = (episode.selectedIndex + by + left.length) % left.length;
    show(Number(left[at].value));
  };
  picker.addEventListener("submit", (event) => event.preventDefault());
  picker.addEventListener("change", (event) =>
    event.target === episode ? show(Number(episode.value)) : filter());
  picker.addEventListener("click", (event) => {
    if (event.target.dataset.step) step(Number(event.target.dataset.step));
  });
  const linked = () => {
    const target = document.getElementById(location.hash.slice(1));
    const place = items.findIndex((item) => target && item.contains(target));
    if (place < 0) return false;
    for (const key of ["stage", "kind", "verdict"]) pick(key).value = "all";
    filter(place);
    items[place].scrollIntoView({ block: "nearest" });
    return true;
  };
  window.addEventListener("hashchange", linked);
  picker.hidden = false;
  if (!linked()) filter();
})();
