for (const map of document.querySelectorAll(".map")) {
  const pictures = JSON.parse(map.querySelector("script").textContent);
  const shown = map.querySelector("img"), said = map.querySelector("output");
  const triangles = map.querySelectorAll("path");
  map.addEventListener("pointerover", (event) => {
    const point = event.target.dataset.n;
    if (point === undefined) return;
    shown.src = pictures[point];
    said.textContent = event.target.textContent;
    triangles.forEach((path, image) => path.classList.toggle("on", image == point % triangles.length));
  });
}
