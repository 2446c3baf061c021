// The slider: masks of another threshold, drawn over those of the job.
if (gallery && byId("cut")) (() => {
  const slider = byId("cut"), field = byId("cut-number");
  const rule = slider.dataset.rule;
  // null: the masks of the job are shown
  let cut = null;
  const previewable = gallery.cards.filter((card) => card.dataset.levels);
  const heats = new Map(), photos = new Map(), drawn = new Map(), visible = new Set();

  const sizeOf = (card) => ["height", "width"].map((name) => Number(card.querySelector(".photo img").getAttribute(name)));
  const readHeat = async (card) => {
    const { levels, levelHeight, levelWidth, levelSteps } = card.dataset;
    const map = { text: levels, mapHeight: Number(levelHeight), mapWidth: Number(levelWidth), steps: Number(levelSteps) };
    heats.set(card, await maps.heatmap(map, ...sizeOf(card)));
  };
  let reading = null;
  const readHeats = () => (reading ??= Promise.all(previewable.map(readHeat)));
  const heatOf = (card) => heats.get(card);
  const canvasOf = (card) => {
    const panel = card.querySelector(".panel.mask");
    let canvas = panel.querySelector("canvas");
    if (!canvas) {
      canvas = document.createElement("canvas");
      [canvas.height, canvas.width] = sizeOf(card);
      panel.querySelector("img").after(canvas);
    }
    return canvas;
  };
  const photoOf = async (card) => {
    if (!photos.has(card)) {
      const image = card.querySelector(".photo img");
      image.loading = "eager";
      await image.decode();
      const canvas = document.createElement("canvas");
      [canvas.height, canvas.width] = sizeOf(card);
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      photos.set(card, context.getImageData(0, 0, canvas.width, canvas.height));
    }
    return photos.get(card);
  };

  const draw = async (card) => {
    if (drawn.get(card) === cut) return;
    const wanted = cut;
    drawn.set(card, wanted);
    if (wanted !== null) {
      const [photo] = await Promise.all([photoOf(card), readHeats()]);
      // the slider may have moved meanwhile
      if (cut !== wanted) return;
      const canvas = canvasOf(card), pixels = new ImageData(photo.data.slice(), photo.width, photo.height);
      maps.draw(pixels.data, maps.inside(heatOf(card), wanted), photo.height, photo.width);
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    }
    const canvas = card.querySelector(".panel.mask canvas");
    if (canvas) canvas.hidden = wanted === null;
    card.querySelector(".panel.mask img:not(.layer)").hidden = wanted !== null;
    card.classList.toggle("previewed", wanted !== null);
    gallery.redraw(card);
  };

  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const showShares = () => {
    const shares = [];
    for (const card of previewable) {
      const isShown = cut !== null && !card.hidden && heats.has(card);
      const kept = isShown ? maps.share(maps.inside(heatOf(card), cut)) : 0;
      if (isShown) shares.push(kept);
      const figure = card.querySelector(".kept");
      figure.hidden = !isShown;
      figure.querySelector("dd").textContent = percent(kept);
    }
    const mean = shares.reduce((sum, share) => sum + share, 0) / shares.length;
    const empty = shares.filter((share) => share === 0).length;
    const rows = `${shares.length} row${shares.length === 1 ? "" : "s"}`;
    byId("kept").textContent = cut === null ? "The masks of the job are shown."
      : shares.length === 0 ? "No row with a heat map is shown."
        : `${percent(mean)} of the image is kept, on average of ${rows}${empty ? `; ${empty} of them keep nothing` : ""}.`;
  };

  const update = async () => {
    if (cut !== null) await readHeats();
    byId("own").disabled = cut === null;
    byId("rerun").hidden = cut === null;
    byId("override").textContent = `${rule === "fixed" ? "" : "masks.rule=fixed "}masks.value=${cut}`;
    for (const copier of document.querySelectorAll("[data-copies=override]")) copier.textContent = "Copy";
    showShares();
    for (const card of visible) draw(card);
    const enlarged = gallery.enlarged();
    if (enlarged && enlarged.dataset.levels) draw(enlarged);
  };
  let waiting = false;
  const set = (value) => {
    cut = value;
    const shownCut = value ?? slider.dataset.start;
    for (const input of [slider, field, byId("large-cut")]) if (document.activeElement !== input || value === null) input.value = shownCut;
    // many positions of a slider come between two frames
    if (!waiting) requestAnimationFrame(() => { waiting = false; update(); });
    waiting = true;
  };
  for (const input of [slider, field, byId("large-cut")]) {
    input.addEventListener("input", () => {
      const value = Number(input.value);
      if (input.value !== "" && value >= 0 && value <= 1) set(value);
    });
  }
  byId("own").addEventListener("click", () => set(null));

  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target);
      else visible.delete(target);
      if (isIntersecting) draw(target);
    }
  }, { rootMargin: "200px" });
  for (const card of previewable) observer.observe(card);
  gallery.listen("shown", showShares);
  gallery.listen("enlarged", (card) => {
    byId("large-preview").hidden = !card.dataset.levels;
    if (card.dataset.levels) draw(card);
  });
  set(null);
})();
